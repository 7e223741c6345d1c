"""What is frozen is encoded before the first step, and nothing else changes by it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lessons
import pytest
import tiny
import torch

from finetune import cache, run

RANDOM = {"crop": "random", "flip": True}


def prepare(base: Path, output: Path, method: str = "dreambooth", way: str = "images", **dataset: Any) -> run.Run:
    pictures = output / "pictures"
    if not pictures.exists():
        tiny.save_pictures(pictures, count=3, size=48)
    return run.prepare(lessons.recipe(base, output, method, way, pictures, dataset=dataset))


def count_calls(at_work: run.Run) -> Counter[str]:
    calls: Counter[str] = Counter()
    pipeline = at_work.family.pipeline
    for name in ("vae.encoder", *at_work.family.text_encoders):
        pipeline_part, _, inner = name.partition(".")
        module = getattr(pipeline, pipeline_part)
        module = getattr(module, inner) if inner else module
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("dataset", [{}, RANDOM], ids=["center", "random"])
@pytest.mark.parametrize("family", tiny.BASES)
def test_no_step_waits_for_a_frozen_encoder(family: str, dataset: dict[str, Any], base_folder: Any, tmp_path: Path):
    at_work = prepare(base_folder(family), tmp_path, **dataset)
    steps = at_work.trainer.steps()
    next(steps)
    assert set(at_work.family.resting) == {"vae", *at_work.family.text_encoders}
    calls = count_calls(at_work)
    assert len(list(steps)) == 3 and not calls


def test_a_text_encoder_that_is_trained_stays(base_folder: Any, tmp_path: Path):
    at_work = prepare(base_folder("stable_diffusion_xl"), tmp_path, "textual_inversion", "one-vector")
    next(steps := at_work.trainer.steps())
    assert at_work.family.resting == ("vae",)
    calls = count_calls(at_work)
    next(steps)
    assert calls == {"text_encoder": 1, "text_encoder_2": 1}


def test_without_room_each_step_encodes_and_learns_the_same(
    base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    losses = []
    for room in (cache.KEPT_BYTES, 0):
        monkeypatch.setattr(cache, "KEPT_BYTES", room)
        at_work = prepare(base_folder("stable_diffusion"), tmp_path / str(room), **RANDOM)
        losses.append([report.loss for report in at_work.trainer.steps()])
        assert bool(at_work.family.resting) == bool(room)
    assert losses[0] == losses[1]


def test_what_rests_is_there_when_pictures_are_drawn(base_folder: Any, tmp_path: Path):
    at_work = prepare(base_folder("stable_diffusion"), tmp_path)
    next(at_work.trainer.steps())
    moves = []
    for name in at_work.family.resting:
        part = getattr(at_work.family.pipeline, name)
        part.to = lambda device, name=name: moves.append((name, str(device)))
    at_work.family.denoiser.to(torch.device("meta"))  # stands in for a GPU
    with at_work.family.sampling():
        assert moves == [("text_encoder", "meta"), ("vae", "meta")]
    assert moves[2:] == [("text_encoder", "cpu"), ("vae", "cpu")]
