"""Strict YAML to typed config: every problem of a recipe is reported at once, before anything heavy loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from finetune.errors import UserError, did_you_mean

S = TypeVar("S", bound="Section")

# Strict mode takes no strings for paths and no lists for tuples, which is what YAML has.
LocalPath = Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """One section of a recipe: unknown keys and wrong types are errors, nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people expect it: `1e-4` is a number, and a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise UserError(f"line {line}: {key!r} stands twice in the same section")
        return super().construct_mapping(node, deep)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str | float:
        text = self.construct_scalar(node)
        try:
            return float(text) if node.style is None and text[:1] in "0123456789.-+" else text
        except ValueError:
            return text


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe's plain data with `section.key=value` overrides applied."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a list of `key: value` sections, got {type(tree).__name__}")
    problems = [problem for problem in (_override(tree, text) for text in overrides) if problem]
    if problems:
        raise UserError(problems)
    return tree


def _override(tree: dict[str, Any], text: str) -> str | None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        return f"override {text!r}: expected section.key=value"
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            return f"override {text!r}: {section!r} is a value, not a section"
    tree[last] = parse_yaml(value, f"override {text!r}")
    return None


def build(schema: type[S], tree: Mapping[str, Any]) -> S:
    """Convert plain data to `schema`, or raise one UserError that lists every problem."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise UserError(line for item in error.errors() for line in _explain(schema, item)) from None


def _explain(schema: type[Section], error: Mapping[str, Any]) -> list[str]:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        return [f"{path}: unknown key. {did_you_mean(str(key), _keys(schema, parents))}"]
    if error["type"] == "missing":
        return [f"{path}: missing. Add it to the recipe."]
    if error["type"] == "value_error":
        problems = error["ctx"]["error"]
        lines = problems.problems if isinstance(problems, UserError) else [str(problems)]
        return [f"{path}: {line}" if path else line for line in lines]
    message = error["msg"][0].lower() + error["msg"][1:]
    return [f"{path or 'recipe'}: {message}, got {error['input']!r}."]


def _keys(schema: type[BaseModel], parents: Sequence[Any]) -> list[str]:
    for part in parents:
        kinds = [schema.model_fields[part].annotation, *get_args(schema.model_fields[part].annotation)]
        schema = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(schema.model_fields)
