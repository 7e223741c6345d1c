"""Keeping the base's layout: where a picture is mostly noise, what is learnt is what the base itself predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lessons
import pytest
import torch

from finetune import run
from finetune.batch import COUNTS, Batch
from finetune.trainer import Trainer

SINCE = 0.7


def trainer_of(case: tuple[str, ...], base: Any, output: Path, keep_layout: float | None, **train: Any) -> Trainer:
    family, variant, method, way = case
    settings = {**lessons.WAYS[method][way], "keep_layout": keep_layout}
    return run.prepare(lessons.recipe(base(family, variant), output, method, settings, train=train)).trainer


def by_noise(values: torch.Tensor, batch: Batch) -> dict[float, float]:
    """A sample's value by the first number of its noise, for batches that hold the same samples in another order."""
    return {float(noise.flatten()[0]): float(value) for noise, value in zip(batch.noise, values, strict=True)}


@pytest.mark.parametrize("case", lessons.FAMILY_X_METHOD, ids=lessons.name)
def test_what_is_noisier_is_held_to_the_base_and_all_else_to_what_it_was(
    case: tuple[str, ...], base_folder: Any, tmp_path: Path
):
    usual = trainer_of(case, base_folder, tmp_path / "usual", None, batch_size=6)
    keeping = trainer_of(case, base_folder, tmp_path / "keeping", SINCE, batch_size=6)
    [before], [after] = usual._drawn(0)[1], keeping._drawn(0)[1]
    since = keeping.student.family.objective.time_at(torch.tensor(SINCE))
    held = by_noise(after.time >= since, after)
    for noise in list(held)[len(held) - after.num_prior :]:
        held[noise] = False  # the class half is what it was
    assert 0 < sum(held.values()) < 6, "the draw shows nothing"
    with usual.student.family.looking(), keeping.student.family.looking():  # T5 has dropout
        wanted, found = by_noise(usual.student(before), before), by_noise(keeping.student(after), after)
    assert wanted.keys() == found.keys() == held.keys()
    for noise, loss in found.items():
        assert loss < 1e-9 if held[noise] else loss == pytest.approx(wanted[noise], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("method", ["textual_inversion", "pivotal_tuning"])
def test_the_base_that_a_new_word_is_held_to_reads_what_it_began_as(method: str, base_folder: Any, tmp_path: Path):
    case = ("stable_diffusion", "epsilon", method, {"textual_inversion": "one-vector"}.get(method, "denoiser-alone"))
    trainer = trainer_of(case, base_folder, tmp_path, SINCE)
    family = trainer.student.family

    @torch.no_grad()
    def read() -> torch.Tensor:
        return family.encode_prompt(family.tokenize(["a <it>"])).embeds

    old = read()
    list(trainer.steps())
    new = read()
    with trainer.student.frozen():
        assert torch.equal(read(), old)
    assert torch.equal(read(), new) and (new - old).abs().max() > 1e-3


def test_batches_come_in_few_forms_however_many_of_their_samples_are_held(base_folder: Any, tmp_path: Path):
    case = ("stable_diffusion", "epsilon", "lora", "plain")
    trainer = trainer_of(case, base_folder, tmp_path, SINCE, batch_size=20, steps=12)
    since, forms = trainer.student.family.objective.time_at(torch.tensor(SINCE)), set()
    for step in range(12):
        [batch] = trainer._drawn(step)[1]
        count = int((batch.time >= since).sum())
        assert bool((batch.time[:count] >= since).all()) and count <= batch.num_held < count + 3
        forms.add(batch.form)
    assert 1 < len(forms) <= COUNTS


def test_a_base_that_is_held_to_itself_alone_learns_nothing(base_folder: Any, tmp_path: Path):
    case = ("stable_diffusion", "epsilon", "lora", "plain")
    trainer = trainer_of(case, base_folder, tmp_path, 1e-6)
    assert [report.loss for report in trainer.steps()] == pytest.approx([0.0] * 4, abs=1e-9)
