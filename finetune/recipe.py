"""A recipe: everything a run depends on, checked before anything heavy is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import yaml
from pydantic import Field, model_validator

from finetune.config import LocalPath, PositiveInt, Section, Strings, build, read_tree
from finetune.dataset.scan import DatasetConfig
from finetune.errors import UserError, did_you_mean
from finetune.methods.base import Method, methods
from finetune.schedule import TrainConfig
from finetune.tracking import TrackerName

M = TypeVar("M", bound=Method)
RECIPES = Path(__file__).parent.parent / "recipes"
Precision = Literal["float32", "float16", "bfloat16"]


class BaseConfig(Section):
    """The frozen model that is taught."""

    source: str
    """A folder in diffusers' layout, or a model of the Hub."""
    revision: str | None = None
    family: str = "auto"
    """How it is built; `auto` reads it from the checkpoint."""
    dtype: Precision | Literal["auto"] = "auto"
    """Precision of what stays frozen; `auto` is that of train.precision."""

    @model_validator(mode="after")
    def _check(self) -> BaseConfig:
        if self.family not in ("auto", *(names := known_families())):
            raise UserError(f"family: unknown {self.family!r}. {did_you_mean(self.family, names)}")
        if self.source.startswith((".", "/", "~")) and not Path(self.source).expanduser().is_dir():
            raise UserError(f"source: {self.source} is not a folder")
        return self


class ValidationConfig(Section):
    """Pictures from fixed seeds, before, while and after training."""

    prompts: Strings = ()
    """`{}` is the placeholder. Picture i has the seed `seed + i`."""
    every: PositiveInt | None = None
    """Steps between them; without it, only before and after."""
    steps: PositiveInt = 25
    guidance: Annotated[float, Field(ge=1)] = 7.5
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: PositiveInt = 4


class OutputConfig(Section):
    folder: LocalPath
    dtype: Precision = "float16"


class Recipe(Section, Generic[M]):
    """The whole of a run."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    placeholder: Annotated[str, Field(pattern=r"^\S+$")] = "sks"
    """The word that comes to mean the concept; `{}` in captions and prompts stands for it."""
    base: BaseConfig
    method: M
    dataset: DatasetConfig
    train: TrainConfig
    validation: ValidationConfig = ValidationConfig()
    output: OutputConfig
    tracking: Annotated[tuple[TrackerName, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _check(self) -> Recipe[M]:
        problems = []
        if self.method.trains_word:
            problems = [
                f"dataset.captions: {caption!r} lacks {{}}, so {self.placeholder!r} would learn nothing from it"
                for caption in self.dataset.captions
                if "{}" not in caption and self.placeholder not in caption
            ]
        if problems:
            raise UserError(problems)
        return self

    def fill(self, text: str) -> str:
        return text.replace("{}", self.placeholder)

    def dump(self) -> dict[str, Any]:
        """Plain data, defaults included and local paths absolute: it means the same from any folder."""
        tree = self.model_dump(mode="json")
        for section, key in (("base", "source"), ("dataset", "folder"), ("output", "folder")):
            path = Path(tree[section][key]).expanduser()
            tree[section][key] = str(path.resolve()) if section != "base" or path.is_dir() else tree[section][key]
        return tree

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()[:16]


def known_families() -> list[str]:
    """Without importing them, since they need torch."""
    folder = Path(__file__).parent / "families"
    return sorted(file.stem for file in folder.glob("[a-z]*.py") if file.stem != "base")


def find(name: str) -> Path:
    """A recipe's file by its path, or by its name in `recipes/`."""
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = [path.stem for path in RECIPES.glob("*.yaml")]
    raise UserError(f"recipe {name!r}: no such file, and no recipe of that name. {did_you_mean(name, known)}")


def load(name: str, overrides: Sequence[str] = ()) -> Recipe[Any]:
    """Read, override and check a recipe; every problem in one UserError."""
    path = find(name)
    tree = read_tree(path, overrides)
    try:
        return build(Recipe[_method_of(tree)], tree)
    except UserError as error:
        raise UserError([f"{path}:", *(f"  {problem}" for problem in error.problems)]) from None


def _method_of(tree: dict[str, Any]) -> type[Method]:
    section = tree.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    if not isinstance(name, str):
        raise UserError(f"method.name: missing. Known: {', '.join(methods.names())}.")
    return methods[name]
