"""Families x methods x formats x tasks: what is exported draws the same in every format and pipeline, or is refused.

All four are walked through their registries. A new plug-in fails here until it says what it exports
(a method), has a tiny base (a family) or is given something to draw from (a task).
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import drawing
import lessons
import pytest
from PIL import Image

from finetune.adapter import AdapterWeights, WordVectors
from finetune.errors import UserError
from finetune.families.base import Source, families
from finetune.formats import formats, read, write
from finetune.generate import generate, load_base
from finetune.load import Adapter, load_adapters
from finetune.methods.base import methods
from finetune.render import use_ddim
from finetune.tasks import Inputs, choose, tasks
from finetune.tasks.base import pipeline_class

# Method -> the kinds of files that it exports.
EXPORTS: dict[str, set[type[Any]]] = {
    "dreambooth": {AdapterWeights},
    "lora": {AdapterWeights},
    "pivotal_tuning": {AdapterWeights, WordVectors},
    "textual_inversion": {WordVectors},
}
ONE_ENCODER = ("embedding", "embedding_a1111")  # formats
# A case of each family and method, and every way of LoRA on one of them.
CASES = list(dict.fromkeys([*lessons.FAMILY_X_METHOD, *(case for case in lessons.CASES if case[1:3] == ("epsilon", "lora"))]))
SMALL: dict[str, Any] = {"steps": 2, "guidance": 2.0, "size": 32}
PROMPT = "a <it> thing"
SAME = 1  # of 255: rounding


@dataclass(frozen=True)
class Outcome:
    """Of one cell: why it is refused, or how far its picture is from others, of 255."""

    refused: str | None = None
    from_original: int = 0
    from_base: int = 0


def refusal(case: tuple[str, ...], format_name: str, task: str) -> str | None:
    """What the reason of a cell that does not exist must say."""
    family, _, method, way = case
    settings = lessons.WAYS[method][way]
    if formats[format_name].kind not in EXPORTS[method]:
        return "not a format of"
    if format_name in ONE_ENCODER and len(families[family].word_keys) > 1:
        return "holds the vectors of one text encoder"
    if pipeline_class(families[family].pipeline_class, tasks[task].infix) is None:
        return "diffusers has no"
    first = settings.get("denoiser") == "whole" or "convolution" in settings.get("targets", ())
    if task == "instruct_pix2pix" and formats[format_name].kind is AdapterWeights and first:
        return "changes the first convolution"
    return None


@pytest.fixture(scope="module")
def walk(base_folder: Any, lesson: Any, made: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case -> (format, task) -> what came of it."""
    walked: dict[tuple[str, ...], dict[tuple[str, str], Outcome]] = {}
    bases: dict[tuple[str, ...], Any] = {}
    pictures: dict[tuple[Any, ...], Image.Image] = {}

    def inputs_for(case: tuple[str, ...], task: str) -> Inputs:
        inputs = drawing.inputs_for(task, *made(*case[:2])[1:])
        return replace(inputs, strength=1.0) if inputs.strength else inputs

    def without_format(case: tuple[str, ...], task: str, file: Path | None) -> Image.Image:
        """What the base draws, with the exported file as diffusers alone loads it."""
        key = (file or case[:2], task)
        if key not in pictures:
            if case[:2] not in bases:
                bases[case[:2]] = load_base(Source(str(base_folder(*case[:2]))))
                use_ddim(bases[case[:2]])
            inputs = inputs_for(case, task)
            pipeline = choose(task, inputs, SMALL["steps"]).switch(copy.deepcopy(bases[case[:2]]))
            if file is not None and "lora" in file.name:
                pipeline.load_lora_weights(file.parent, weight_name=file.name)
            elif file is not None:
                load_adapters(pipeline, [file])
            (pictures[key],) = generate(pipeline, PROMPT, inputs, task=task, **SMALL)
        return pictures[key]

    def cell(case: tuple[str, ...], task: str, file: Path, original: Path) -> Outcome:
        base = str(base_folder(*case[:2]))
        try:
            (drawn,) = generate(base, PROMPT, inputs_for(case, task), task=task, adapters=[Adapter(file)], **SMALL)
        except UserError as error:
            return Outcome(str(error))
        others = without_format(case, task, original), without_format(case, task, None)
        return Outcome(None, *(drawing.distance(drawn, other) for other in others))

    def go(case: tuple[str, ...]) -> dict[tuple[str, str], Outcome]:
        if case not in walked:
            walked[case] = {}
            files = {type(read(file)): file for file in lesson(case)[1].files}
            assert files.keys() == EXPORTS[case[2]]
            folder = tmp_path_factory.mktemp("formats")
            for name in formats.names():
                original = files.get(formats[name].kind, next(iter(files.values())))
                try:
                    file = write(read(original), folder / f"{name}.safetensors", name)
                    found = {task: cell(case, task, file, original) for task in tasks.names()}
                except UserError as error:
                    found = dict.fromkeys(tasks.names(), Outcome(str(error)))
                walked[case] |= {(name, task): outcome for task, outcome in found.items()}
        return walked[case]

    return go


@pytest.mark.parametrize("case", CASES, ids=lessons.name)
def test_a_file_draws_the_same_in_every_format_and_pipeline_or_is_refused_with_the_reason(
    case: tuple[str, ...], walk: Any
):
    for cell, outcome in walk(case).items():
        print(case, cell, outcome)
        reason = refusal(case, *cell)
        if reason is not None:
            assert outcome.refused is not None and reason in outcome.refused, cell
        else:
            assert outcome.refused is None, cell
            assert outcome.from_original <= SAME < 4 * SAME < outcome.from_base, cell


def test_every_family_method_format_and_task_is_in_the_matrix(walk: Any):
    outcomes = {(case[0], case[2], *cell): outcome for case in CASES for cell, outcome in walk(case).items()}
    registries = families, methods, formats, tasks
    assert outcomes.keys() == set(product(*(registry.names() for registry in registries)))
    drawn = [cell for cell, outcome in outcomes.items() if outcome.refused is None]
    for registry, names in zip(registries, zip(*drawn, strict=True), strict=True):
        assert set(names) == set(registry.names())
    print(Counter(outcome.refused is None for case in CASES for outcome in walk(case).values()))
