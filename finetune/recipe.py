"""A recipe: everything a run depends on, checked before anything heavy is imported."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune.config import LocalPath, Place, PositiveInt, Section, Strings, Text, build, override, read_tree, to_yaml
from finetune.dataset.settings import DatasetConfig
from finetune.errors import UserError, brief, did_you_mean
from finetune.files import is_file
from finetune.methods.base import Method, methods
from finetune.registry import headlines
from finetune.schedule import TrainConfig
from finetune.tracking import TrackerName

M = TypeVar("M", bound=Method)
RECIPES = Path(__file__).parent.parent / "recipes"
Precision = Literal["float32", "float16", "bfloat16"]
HEIRS = 20  # recipes that extend one another


def _is_single_file(source: str) -> bool:
    return source.endswith(".safetensors")


def _there(source: str) -> str:
    path, single = Path(source), _is_single_file(source)
    looks_local = source.startswith((".", "/")) or ("/" in source and path.parent.is_dir())
    if single and not path.is_file():
        raise ValueError(f"{source} does not exist")
    if looks_local and not single and not path.is_dir():
        raise ValueError(f"{source} is not a folder")
    return source


def _known(family: str) -> str:
    if family not in ("auto", *(names := known_families())):
        raise ValueError(f"unknown {family!r}. {did_you_mean(family, names)}")
    return family


class BaseConfig(Section):
    """The frozen model that is taught."""

    source: Annotated[Place, AfterValidator(_there)]
    """A folder in diffusers' layout, a model of the Hub, or a single-file checkpoint (.safetensors)."""
    revision: str | None = None
    config: Place | None = None
    """For a single file: the folder or model of the Hub whose configs and tokenizers it uses, if not the usual one."""
    family: Annotated[str, AfterValidator(_known)] = "auto"
    """How it is built; `auto` reads it from the checkpoint."""
    dtype: Literal["float32", "float16", "bfloat16", "auto"] = "auto"
    """Precision of what stays frozen; `auto` is that of train.precision."""
    quantize: Literal["nf4", "int8", "fp8"] | None = None
    """Keep the denoiser and T5-sized text encoders in 4 or 8 bits a weight, for less memory."""

    @model_validator(mode="after")
    def _check(self) -> BaseConfig:
        if self.config is not None and not self.is_single_file:
            raise UserError("config: is for a single-file checkpoint (.safetensors). Remove it.")
        return self

    @property
    def is_single_file(self) -> bool:
        return _is_single_file(self.source)


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
    measure_every: PositiveInt | None = None
    """Steps between measurements of the loss on the pictures of dataset.held_out. Default: a tenth of all."""
    encoder: Text | None = None
    """What judges pictures by those held out: a CLIP's folder or name. Default: `evaluation` in the base's folder."""
    patience: PositiveInt | None = None
    """Stop after so many times without better pictures, or without a lower loss where nothing judges them."""
    keep: Literal["best", "last"] = "best"
    """Which weights are exported: those with the best pictures, where `every` and an encoder tell, or the last."""


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
        problems = self._check_words() + self._check_rates()
        problems += [
            f"validation.{name}: is for pictures that are held out. Set dataset.held_out, or remove it."
            for name in ("measure_every", "encoder", "patience")
            if not self.dataset.held_out and getattr(self.validation, name) is not None
        ]
        if self.base.quantize is not None and not self.method.takes_quantized:
            problems.append("base.quantize: the method needs the base's weights as they are. Remove it.")
        if problems:
            raise UserError(problems)
        return self

    def _check_words(self) -> list[str]:
        """The placeholder stands where it is learnt, and nowhere else."""
        prior = self.method.prior_half
        problems = []
        if prior is not None and self.has_placeholder(prior.prompt):
            problems.append(f"method.class_prompt: {prior.prompt!r} names the concept; name only its class")
        if self.method.trains_word:
            problems += [
                f"dataset.captions: {caption!r} lacks {{}}, so {self.placeholder!r} would learn nothing from it"
                for caption in self.dataset.captions
                if not self.has_placeholder(caption)
            ]
        if self.method.trains_word and self.dataset.caption_dropout:
            problems.append(
                f"dataset.caption_dropout: {self.placeholder!r} is learnt from captions that have it. Remove it."
            )
        return problems

    def _check_rates(self) -> list[str]:
        if self.train.optimizer != "prodigy":
            return []
        slow = f"train.learning_rate: prodigy multiplies the rate that it finds by {self.train.learning_rate}; set 1.0"
        return [slow] * (self.train.learning_rate < 0.1) + [
            f"method.{name}: prodigy finds one rate for everything; set it to train.learning_rate"
            for name, rate in self.method.own_rates.items()
            if rate != self.train.learning_rate
        ]

    @property
    def frozen_dtype(self) -> str:
        """What the base's weights are kept in, by torch's name for it."""
        return self.train.computes if self.base.dtype == "auto" else self.base.dtype

    def has_placeholder(self, caption: str) -> bool:
        word = rf"(?<!\w){re.escape(self.placeholder)}(?!\w)"
        return "{}" in caption or re.search(word, caption) is not None

    def fill(self, text: str) -> str:
        return text.replace("{}", self.placeholder)

    def dump(self) -> dict[str, Any]:
        """Plain data, defaults included and local paths absolute: it means the same from any folder."""
        tree = self.model_dump(mode="json")
        for section in (tree["dataset"], *tree["dataset"]["folders"], tree["output"]):
            if section["folder"] is not None:
                section["folder"] = str(Path(section["folder"]).resolve())
        local_where = {"base": ("source", "config"), "dataset": ("source",), "method": ("init",)}
        for section, keys in local_where.items():
            for key in keys:
                is_local = is_file if key == "init" else Path.exists
                if tree[section].get(key) is not None and is_local(Path(tree[section][key])):
                    tree[section][key] = str(Path(tree[section][key]).resolve())
        return tree

    def to_yaml(self) -> str:
        return to_yaml(self.dump())

    def digest(self) -> str:
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()[:16]


def known_families() -> dict[str, str]:
    """Each family and its headline, without importing torch as their registry does."""
    return headlines("finetune.families")


def find(name: str) -> Path:
    """A recipe's file by its path, or by its name in `recipes/`."""
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if is_file(path):
            return path
    known = [path.stem for path in RECIPES.glob("*.yaml")]
    raise UserError(f"recipe {brief(name)}: no such file, and no recipe of that name. {did_you_mean(name, known)}")


class _UnknownMethod(Method):
    """Stands in for a method that there is not, so that the rest of its recipe is checked all the same."""

    model_config = ConfigDict(extra="allow")
    name: Any = None

    def attach(self, family: Any, placeholder: str, learning_rate: float) -> Any:
        raise NotImplementedError

    def export(self, student: Any, folder: Path, dtype: Any, header: Any) -> Any:
        raise NotImplementedError


def load(name: str, overrides: Sequence[str] = ()) -> Recipe[Any]:
    """Read, override and check a recipe; every problem in one UserError."""
    path = find(name)
    tree = override(_read(path), overrides)
    problems: list[str] = []
    method: type[Method] = _UnknownMethod
    try:
        method = _method_of(tree)
    except UserError as error:
        problems += error.problems
        tree = {**tree, "method": {}}
    try:
        recipe = build(Recipe[method], tree)
        if not problems:
            return recipe
    except UserError as error:
        problems += [*error.problems, *_lacking(tree)]
    raise UserError([f"{path}:", *(f"  {problem}" for problem in problems)])


def _lacking(tree: dict[str, Any]) -> list[str]:
    """A folder of pictures that is not there, which is else found only when the rest is right."""
    section = tree.get("dataset")
    folder = section.get("folder") if isinstance(section, dict) else None
    try:
        is_lacking = isinstance(folder, str) and not Path(folder).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # no path at all, as is said already
        return []
    return [f"dataset.folder: {folder} is not a folder"] * is_lacking


def _read(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's plain data over that of the recipe that it extends, section by section."""
    tree = read_tree(path)
    if "extends" not in tree:
        return tree
    name, heirs = tree.pop("extends"), (*heirs, path.resolve())
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: extends: expected the name of a recipe, got {brief(name)}")
    beside = path.parent / f"{name}.yaml"
    below = beside if is_file(beside) else _find_for(path, name)
    if below.resolve() in heirs or len(heirs) > HEIRS:
        why = "it extends itself" if below.resolve() in heirs else f"more than {HEIRS} recipes, one over the other"
        raise UserError(f"{path}: extends: {why}")
    return _over(_read(below, heirs), tree)


def _find_for(heir: Path, name: str) -> Path:
    try:
        return find(name)
    except UserError as error:
        raise UserError(f"{heir}: extends: {problem}" for problem in error.problems) from None


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key, a method of another name as a whole."""
    merged = {**below, **above}
    for section, settings in above.items():
        inherited = below.get(section)
        if isinstance(settings, dict) and isinstance(inherited, dict):
            other = section == "method" and settings.get("name", inherited.get("name")) != inherited.get("name")
            merged[section] = settings if other else {**inherited, **settings}
    return merged


def _method_of(tree: dict[str, Any]) -> type[Method]:
    section = tree.get("method")
    if section is not None and not isinstance(section, dict):
        raise UserError(f"method: expected a section, got {brief(section)}. Write name: below it.")
    name = (section or {}).get("name")
    if name is None:
        raise UserError(f"method.name: missing. Known: {', '.join(methods.names())}.")
    try:
        return methods[str(name)]
    except UserError as error:
        raise UserError(f"method.name: {error}") from None
