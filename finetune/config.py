"""Strict YAML to typed config: every problem of a recipe is reported at once, before anything heavy loads."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finetune.errors import UserError, brief, did_you_mean, is_unicode, reason
from finetune.files import read_bytes

S = TypeVar("S", bound="Section")


def _expand(path: Path) -> Path:
    """Without its tilde; a ValueError where no file can be called so."""
    try:
        path = path.expanduser()
        path.resolve().exists()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{brief(str(path))} is no path that can be read: {reason(error)}") from None
    return path


def _expand_local(text: str) -> str:
    path = _expand(Path(text))
    return str(path) if text[:1] == "~" else text


# Strict mode takes no strings for paths and no lists for tuples, which is what YAML has.
LocalPath = Annotated[Path, Field(strict=False), AfterValidator(_expand)]
# A local path, or a name of the Hub.
Place = Annotated[str, Field(pattern=r"\S"), AfterValidator(_expand_local)]
Text = Annotated[str, Field(pattern=r"\S")]
Strings = Annotated[
    tuple[Text, ...], Field(strict=False), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]

# What pydantic says in Python's words, in YAML's.
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a section",
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "model_attributes_type": "a section",
    "model_type": "a section",
    "string_type": "text",
    "too_short": "a list that is not empty",
    "tuple_type": "a list",
}
PATTERNS = {
    "^#[0-9a-fA-F]{6}$": "a colour such as #ffffff",
    r"^\S+$": "one word without spaces",
    r"^[\w.-]+$": "letters, digits, dots and dashes",
    r"\S": "text that is not empty",
}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# More than any recipe has: of a file's bytes, of its keys and values, of levels; and its whole numbers are smaller.
BYTES, ENTRIES, LEVELS, LARGEST = 2**19, 100_000, 50, 2**63


class Section(BaseModel):
    """One section of a recipe: unknown keys and wrong types are errors, nothing changes once it is read.

    A validator of several fields raises UserError with lines that begin with the key at fault, one of a single
    field ValueError.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people expect it: `1e-4` is a number, and a key that stands twice is a mistake."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _weigh(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        known = set()
        for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            name = self.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                raise UserError(f"line {key.start_mark.line + 1}: a list or a section cannot be a key")
            if name in known:
                raise UserError(f"line {key.start_mark.line + 1}: {name!r} stands twice in the same section")
            known.add(name)
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str | float:
        text = self.construct_scalar(node)
        if "\0" in text or not is_unicode(text):
            raise UserError(f"line {node.start_mark.line + 1}: {brief(text)} has characters that are no text")
        return float(text) if node.style is None and _is_number(text) else text

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        number = self.construct_yaml_int(node)
        if abs(number) >= LARGEST:
            raise UserError(f"line {node.start_mark.line + 1}: a number of more than 63 bits is not taken")
        return number


def _weigh(node: yaml.Node, known: dict[yaml.Node, tuple[int, int]], level: int = 0) -> tuple[int, int]:
    """Keys and values beneath a node, and their levels, as often as aliases repeat them: a few lines can be billions.

    Raises:
        UserError: it has too many, is nested too deeply, or is within itself.
    """
    where = f"line {node.start_mark.line + 1}"
    if node not in known and level <= LEVELS:
        known[node] = 0, 0
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        found = [_weigh(part, known, level + 1) for part in parts]
        known[node] = 1 + sum(weight for weight, _ in found), 1 + max((levels for _, levels in found), default=0)
    weight, levels = known.get(node, (1, 1))
    if not weight:
        raise UserError(f"{where}: an alias stands within what it stands for")
    if level + levels > LEVELS:
        raise UserError(f"{where}: nested too deeply, in more than {LEVELS} levels")
    if weight > ENTRIES:
        raise UserError(f"{where}: more than {ENTRIES:,} keys and values, those that aliases repeat among them")
    return weight, levels


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: text that looks like a number is quoted."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if _is_number(text) else None)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Dumper.add_representer(str, _Dumper.represent_text)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply, in more than {LEVELS} levels") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except (LookupError, AttributeError, TypeError, ArithmeticError):  # from PyYAML, which trusts tags
        raise UserError(f"{where}: not valid YAML: a value is not what its tag says") from None


def to_yaml(tree: Mapping[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def read_tree(path: Path) -> dict[str, Any]:
    """The recipe's plain data."""
    try:
        text = read_bytes(path, BYTES).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is made of `key: value` sections, got {brief(tree)}")
    return tree


def override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The same data with `section.key=value` overrides applied.

    Raises:
        UserError: with all that cannot be.
    """
    problems = []
    for text in overrides:
        try:
            _override(tree, text)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return tree


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts, shown = key.split("."), brief(text)
    if not equals or not all(parts) or len(parts) > LEVELS:
        raise UserError(f"override {shown}: expected section.key=value")
    *sections, last = parts
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"override {shown}: {section!r} is a value, not a section")
    # In a file `#` opens a comment; on a command line it is a colour or a number sign.
    is_text = "#" in value and value[:1] not in "'\"[{"
    tree[last] = value if is_text else parse_yaml(value, f"override {shown}")


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
    if error["type"] == "value_error" and isinstance(error["ctx"]["error"], UserError):
        return [f"{path}.{line}" if path else line for line in error["ctx"]["error"].problems]
    if error["type"] == "value_error":
        return [f"{path}: {error['ctx']['error']}"]
    context = error.get("ctx", {})
    expected = EXPECTED.get(error["type"]) or PATTERNS.get(context.get("pattern", ""))
    if error["type"] == "too_short" and context["min_length"] > 1:
        expected = f"at least {context['min_length']} entries"
    message = f"expected {expected}" if expected else error["msg"][0].lower() + error["msg"][1:]
    return [f"{path}: {message}, got {'nothing' if error['input'] is None else brief(error['input'])}."]


def _keys(schema: type[BaseModel], parents: Sequence[Any]) -> list[str]:
    for part in parents:
        if part in schema.model_fields:  # or else a place in a list or a name, whose schema is known already
            schema = next(_schemas(schema.model_fields[part].annotation), schema)
    return list(schema.model_fields)


def _schemas(kind: Any) -> Iterator[type[BaseModel]]:
    """Those that stand in a type: `dict[str, S]` has S."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from _schemas(inner)
