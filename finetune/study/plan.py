"""A study's file: concepts, recipes and the variants of each that are compared. Read and checked before any run."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from finetune.config import LocalPath, PositiveInt, Section, Strings, Text, build, override, read_tree
from finetune.dataset import Picture
from finetune.errors import UserError, did_you_mean
from finetune.evaluation.prompts import Prompts
from finetune.fingerprint import fingerprint
from finetune.outline import outline
from finetune.plan import check
from finetune.recipe import Recipe, load


class Judging(Section):
    """What is drawn of each run; the settings of `finetune evaluate`."""

    prompts: Text | None = None
    seeds: PositiveInt = 1
    class_pictures: Annotated[int, Field(ge=2)] = 8
    steps: PositiveInt = 25
    guidance: Annotated[float, Field(ge=1)] = 5.0
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Of the adapter; a variant has its own by `judging.weight=0.7` among its settings."""


class _Judged(Section):
    """So that what is wrong with a weight is said under its whole name."""

    judging: Judging


class Taught(Section):
    """One concept. `{class}` in settings is its class prompt."""

    folder: LocalPath
    class_prompt: Text | None = None


class Comparison(Section):
    """One recipe and its variants: `key=value` settings, as on the command line. The first is what others are compared
    with."""

    recipe: Text
    concepts: Strings = Field(min_length=1)
    """Names of the study's groups of concepts."""
    settings: Strings = ()
    """Of all variants."""
    variants: dict[str, Strings] = Field(min_length=2)


class Study(Section):
    """The whole file."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, strict=False)
    """Of training; each concept is taught once with each."""
    settings: Strings = ()
    """Of all runs."""
    judging: Judging = Judging()
    concepts: dict[str, dict[str, Taught]]
    comparisons: dict[str, Comparison] = Field(min_length=1)


class Named(NamedTuple):
    """What a run is called in the tables."""

    comparison: str
    variant: str
    concept: str


@dataclass(frozen=True)
class Task:
    """One run of a study."""

    comparison: str
    variant: str
    concept: str
    seed: int
    recipe: str
    settings: tuple[str, ...]
    class_prompt: str | None
    judging: Judging
    digest: str  # of all that its figures depend on, the code and the judge apart: tasks of the same are one run

    def load(self, output: Path) -> Recipe[Any]:
        return load(self.recipe, [*self.settings, _setting("output.folder", output)])


def read(path: Path) -> Study:
    """Raises: UserError, with everything that is wrong in the file itself."""
    tree = read_tree(path)
    try:
        study = build(Study, tree)
    except UserError as error:
        raise UserError([f"{path}:", *(f"  {problem}" for problem in error.problems)]) from None
    problems = [
        f"{path}: comparisons.{name}.concepts: no group {group!r}. {did_you_mean(group, list(study.concepts))}"
        for name, comparison in study.comparisons.items()
        for group in comparison.concepts
        if group not in study.concepts
    ]
    named = Counter(concept for group in study.concepts.values() for concept in group)
    problems += [f"{path}: concepts: {name!r} stands twice. Rename one." for name, count in named.items() if count > 1]
    if problems:
        raise UserError(problems)
    return study.model_copy(update={"judging": _found(study.judging, path)})


def _found(judging: Judging, path: Path) -> Judging:
    """With a list of prompts that is named from the study's folder, as concepts are."""
    if judging.prompts is None:
        return judging
    beside = path.parent / judging.prompts
    found = judging.model_copy(update={"prompts": str(beside)}) if beside.is_file() else judging
    try:
        Prompts.load(found.prompts or "")
    except UserError as error:
        raise UserError(
            f"{path}: {problem.replace('--prompts', 'judging.prompts')}" for problem in error.problems
        ) from None
    return found


def tasks(study: Study, path: Path) -> list[Task]:
    """Every run, concept by concept, so that what the base alone draws is drawn once.

    Raises:
        UserError: with the problems of every recipe and every concept's pictures, each said once.
    """
    planner, problems, found = _Planner(study, path.parent), list[str](), list[Task]()
    for name, comparison in study.comparisons.items():
        for variant, settings in comparison.variants.items():
            for concept in _concepts(study, comparison):
                try:
                    found += planner.runs(Named(name, variant, concept), settings)
                except UserError as error:
                    problems += [f"{path}: comparisons.{name}.variants.{variant}: {line}" for line in error.problems]
    if problems:
        raise UserError(dict.fromkeys(problems))
    order = {name: place for place, name in enumerate(name for group in study.concepts.values() for name in group)}
    return sorted(found, key=lambda task: order[task.concept])


def _concepts(study: Study, comparison: Comparison) -> dict[str, Taught]:
    return {name: taught for group in comparison.concepts for name, taught in study.concepts[group].items()}


class _Planner:
    """Looks at each folder of pictures and at each base once."""

    def __init__(self, study: Study, folder: Path):
        self.study = study
        self.folder = folder
        self.scanned: dict[str, list[Picture]] = {}
        self.weights: dict[str, str | None] = {}
        prompts = study.judging.prompts
        self.prompts = None if prompts is None else Prompts.load(prompts).lines

    def runs(self, named: Named, settings: Sequence[str]) -> Iterator[Task]:
        """One for each seed."""
        study, comparison = self.study, self.study.comparisons[named.comparison]
        taught = _concepts(study, comparison)[named.concept]
        given = [_setting("dataset.folder", self.folder / taught.folder)]
        given += [*study.settings, *comparison.settings, *settings]
        if taught.class_prompt is None and any("{class}" in text for text in given):
            raise UserError(f"{{class}} stands in the settings, but {named.concept} has no class_prompt. Add it.")
        filled = [text.replace("{class}", taught.class_prompt or "") for text in given]
        of_recipe, judging = _split(filled, study.judging)
        for seed in dict.fromkeys(study.seeds):
            own = (*of_recipe, f"train.seed={seed}")
            digest = self.digest(load(comparison.recipe, own), taught.class_prompt, judging)
            yield Task(*named, seed, comparison.recipe, own, taught.class_prompt, judging, digest)

    def digest(self, recipe: Recipe[Any], class_prompt: str | None, judging: Judging) -> str:
        """The same on another machine: paths are taken from the study's folder, and files stand for what they hold."""
        tree = recipe.dump()
        del tree["output"]["folder"]
        pictures = [(picture.sha256, picture.captions) for picture in self._pictures(recipe)]
        drawn = judging.model_dump(exclude={"prompts", "weight"} if judging.weight == 1 else {"prompts"})
        parts = [_relative(tree, self.folder.resolve()), pictures, self._weights(recipe), drawn, self.prompts]
        return hashlib.sha256(json.dumps([*parts, class_prompt]).encode()).hexdigest()[:12]

    def _pictures(self, recipe: Recipe[Any]) -> list[Picture]:
        """Checked."""
        key = json.dumps([recipe.dump()["dataset"], recipe.method.trains_word, recipe.placeholder])
        if key not in self.scanned:
            self.scanned[key] = check(recipe)
        return self.scanned[key]

    def _weights(self, recipe: Recipe[Any]) -> str | None:
        """Of a base that is here."""
        key = recipe.base.model_dump_json()
        if key not in self.weights:
            found = outline(recipe.base)
            self.weights[key] = None if found is None else fingerprint(found.kind, found.weights)
        return self.weights[key]


def _split(settings: Sequence[str], judging: Judging) -> tuple[list[str], Judging]:
    """Those of the recipe, and the judging with the weight that they ask for."""
    weights = [text for text in settings if text.partition("=")[0] == "judging.weight"]
    tree = override({"judging": judging.model_dump()}, weights)
    return [text for text in settings if text not in weights], build(_Judged, tree).judging


def _setting(key: str, path: Path) -> str:
    return f"{key}={json.dumps(str(path), ensure_ascii=False)}"


def _relative(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _relative(value[key], folder) for key in sorted(value)}
    if isinstance(value, list):
        return [_relative(item, folder) for item in value]
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return os.path.relpath(value, folder) if is_path else value
