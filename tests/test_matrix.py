"""Families x methods x formats x tasks: each exported file draws the same in every format and pipeline, or is refused.

All four are walked through their registries. A new plug-in fails here until it says what it exports (a method),
has a tiny base (a family) or is given something to draw from (a task); a format is covered as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import drawing
import lessons
import pytest
from PIL import Image

from finetune.adapter import AdapterWeights, Content, WordVectors
from finetune.canvas import Frame
from finetune.errors import UserError
from finetune.families.base import Source, families
from finetune.formats import formats, read, write
from finetune.generate import generate, load_base
from finetune.load import Adapter, load_adapters
from finetune.methods.base import methods
from finetune.render import render, use_ddim
from finetune.tasks import Task, tasks
from finetune.tasks.base import pipeline_class

EXPORTS: dict[str, set[type[Any]]] = {
    "dreambooth": {AdapterWeights},
    "lora": {AdapterWeights},
    "pivotal_tuning": {AdapterWeights, WordVectors},
    "textual_inversion": {WordVectors},
}
ONE_ENCODER = ("embedding", "embedding_a1111")
FAMILIES, FORMATS, TASKS = ({name: kind[name] for name in kind.names()} for kind in (families, formats, tasks))
PROMPT = "a <it> thing"
SMALL: dict[str, Any] = {"steps": 2, "guidance": 2.0}
SAME, OTHER = 1, 4  # of 255; what is the same differs by rounding

Case = tuple[str, ...]  # of tests/lessons.py: family, its variant, method, a way to use it
Cell = tuple[str, str]  # format, task


def in_an_editor(case: Case) -> Case:
    """With a way of LoRA that leaves a UNet's first convolution out."""
    unet = FAMILIES[case[0]].denoiser_name == "unet"
    return (*case[:3], "plain") if unet and case[2] == "lora" else case


# A case of each family and method, for every pipeline, and LoRA's kin on one family, for one pipeline.
CASES = [in_an_editor(case) for case in lessons.FAMILY_X_METHOD]
VARIANTS = [case for case in lessons.CASES if case[:2] == CASES[0][:2] and "variant" in lessons.WAYS[case[2]][case[3]]]


@dataclass(frozen=True)
class Outcome:
    """Why a cell is refused; or how far its picture is from that of the original file and that of the base, of 255."""

    refused: str | None
    from_original: int = 0
    from_base: int = 0


def refusal(case: Case, cell: Cell) -> str | None:
    """What is said of a cell that cannot be."""
    (family, _, method, way), (name, task) = case, cell
    settings = lessons.WAYS[method][way]
    if FORMATS[name].kind not in EXPORTS[method]:
        return "not a format of"
    if name in ONE_ENCODER and len(FAMILIES[family].word_keys) > 1:
        return "holds the vectors of one text encoder"
    if pipeline_class(FAMILIES[family].pipeline_class, TASKS[task].infix) is None:
        return "diffusers has no"
    first_convolution = settings.get("denoiser") == "whole" or "convolution" in settings.get("targets", ())
    if task == "instruct_pix2pix" and FORMATS[name].kind is AdapterWeights and first_convolution:
        return "changes the first convolution"
    return None


def adapted(pipeline: Any, file: Path | None) -> Any:
    """With a file in it, by no code of ours where diffusers has a loader for all of it."""
    if file is not None and "lora" in file.name:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    elif file is not None:
        load_adapters(pipeline, [file])
    return pipeline


class Matrix:
    """Cases as they are walked. What several cells need is made once: files, bases, and pictures to compare with."""

    def __init__(self, base_folder: Any, lesson: Any, made: Any, folder: Path):
        self.base_folder, self.lesson, self.made, self.folder = base_folder, lesson, made, folder
        self.walked: dict[tuple[Any, ...], dict[Cell, Outcome]] = {}
        self.pipelines: dict[Any, Any] = {}
        self.pictures: dict[Any, Image.Image] = {}

    def walk(self, case: Case, asked: Iterable[str] = TASKS) -> dict[Cell, Outcome]:
        """Every format of a case, in the tasks that are asked for."""
        key = case, *asked
        if key not in self.walked:
            contents = {file: read(file) for file in self.lesson(case)[1].files}
            assert {type(content) for content in contents.values()} == EXPORTS[case[2]]
            found: dict[Cell, Outcome] = {}
            for name, chosen in FORMATS.items():
                # Where the format is for none of the files, what is said of one of them.
                fitting = [file for file, content in contents.items() if isinstance(content, chosen.kind)]
                original = (fitting or list(contents))[0]
                outcomes = self.in_format(case, name, original, contents[original], asked)
                found |= {(name, task): outcome for task, outcome in outcomes.items()}
            self.walked[key] = found
        return self.walked[key]

    def in_format(
        self, case: Case, name: str, original: Path, content: Content, asked: Iterable[str]
    ) -> dict[str, Outcome]:
        """Task -> what comes of a file that is written in a format."""
        try:
            file = write(content, self.folder / lessons.name(case) / f"{name}.safetensors", name)
        except UserError as error:
            return dict.fromkeys(asked, Outcome(str(error)))
        return {task: self.outcome(case, task, file, original) for task in asked}

    def outcome(self, case: Case, task: str, file: Path, original: Path) -> Outcome:
        given: Any = {"task": task, "adapters": [Adapter(file)], "size": drawing.SIZE, **SMALL}
        try:
            (drawn,) = generate(str(self.base_folder(*case[:2])), PROMPT, self.task(case, task).inputs, **given)
        except UserError as error:
            return Outcome(str(error))
        others = self.picture(case, task, original), self.picture(case, task, None)
        return Outcome(None, *(drawing.distance(drawn, other) for other in others))

    def picture(self, case: Case, task: str, file: Path | None) -> Image.Image:
        """The base's own, or with an exported file as diffusers itself loads it."""
        key = file or case[:2], task
        if key not in self.pictures:
            chosen = self.task(case, task)
            if chosen.inputs.editor is None:
                pipeline = chosen.switch(self.loaded(case, file))
            else:  # which is a denoiser of its own
                pipeline = adapted(chosen.switch(copy.deepcopy(self.loaded(case, None))), file)
            layout = chosen.lay_out(pipeline, Frame.of(pipeline, drawing.SIZE))
            inputs: Any = {"pictures": layout.pictures, "settings": layout.settings, "size": layout.size}
            self.pictures[key] = layout.finish(render(pipeline, [PROMPT], [0], **inputs, **SMALL)[0])
        return self.pictures[key]

    def loaded(self, case: Case, file: Path | None) -> Any:
        key = file or case[:2]
        if key not in self.pipelines and file is None:
            self.pipelines[key] = load_base(Source(str(self.base_folder(*case[:2]))))
            use_ddim(self.pipelines[key])
        elif key not in self.pipelines:
            self.pipelines[key] = adapted(copy.deepcopy(self.loaded(case, None)), file)
        return self.pipelines[key]

    def task(self, case: Case, name: str) -> Task:
        inputs = drawing.inputs_for(name, *self.made(*case[:2])[1:])
        return TASKS[name](replace(inputs, strength=inputs.strength and 1.0), SMALL["steps"])


@pytest.fixture(scope="module")
def matrix(base_folder: Any, lesson: Any, made: Any, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(base_folder, lesson, made, tmp_path_factory.mktemp("matrix"))


def check(case: Case, outcomes: dict[Cell, Outcome]) -> None:
    for cell, outcome in outcomes.items():
        reason = refusal(case, cell)
        if reason is None:
            assert outcome.refused is None, cell
            assert outcome.from_original <= SAME < OTHER <= outcome.from_base, cell
        else:
            assert outcome.refused is not None and reason in outcome.refused, cell


@pytest.mark.parametrize("case", CASES, ids=lessons.name)
def test_a_file_draws_the_same_in_every_format_and_pipeline_or_is_refused_with_the_reason(case: Case, matrix: Matrix):
    check(case, matrix.walk(case))


@pytest.mark.parametrize("case", VARIANTS, ids=lessons.name)
def test_a_variant_of_lora_draws_the_same_in_every_format(case: Case, matrix: Matrix):
    check(case, matrix.walk(case, ["text_to_image"]))


def test_no_family_method_format_or_task_is_left_out(matrix: Matrix):
    registries = [registry.names() for registry in (families, methods, formats, tasks)]
    outcomes = {(case[0], case[2], *cell): found for case in CASES for cell, found in matrix.walk(case).items()}
    assert outcomes.keys() == set(product(*registries))
    drawn = [cell for cell, outcome in outcomes.items() if outcome.refused is None]
    assert [set(names) for names in zip(*drawn, strict=True)] == [set(names) for names in registries]
    # What the README says of the matrix.
    assert Counter(refusal(case, cell) for case in CASES for cell in matrix.walk(case)) == {
        None: 256,
        "not a format of": 240,
        "holds the vectors of one text encoder": 72,
        "diffusers has no": 28,
        "changes the first convolution": 4,
    }
