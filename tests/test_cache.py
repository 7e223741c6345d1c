"""What is frozen is encoded before the first step, and nothing else changes by it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import lessons
import numpy as np
import pytest
import tiny
import torch

from finetune import cache, run
from finetune.families.base import Prompt
from finetune.render import render

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


@pytest.mark.parametrize("family", tiny.BASES)
def test_wherever_there_is_room_for_what_is_encoded_the_steps_learn_the_same(
    family: str, base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    losses = {}
    for place in lessons.PLACES:
        lessons.keep_in(place, monkeypatch)
        at_work = prepare(base_folder(family), tmp_path / place, **RANDOM)
        losses[place] = [report.loss for report in at_work.trainer.steps()]
        assert bool(at_work.family.resting) == at_work.trainer.encoder.complete == (place != "nowhere")
    assert losses["file"] == losses["memory"] == losses["nowhere"]


def test_a_file_holds_tensors_of_any_precision_bit_by_bit_and_leaves_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cache, "SEGMENT", 1000)
    tensors = [
        torch.randn(7, 11),
        torch.randn(300).bfloat16(),
        torch.rand(1, 5) > 0.5,
        torch.arange(9),
        torch.tensor(2.5),
    ]
    shelf = cache.Shelf()
    laid = [shelf.lay(tensor) for tensor in tensors]
    assert all(torch.equal(found, tensor) for found, tensor in zip(laid, tensors, strict=True))
    prompt = shelf.lay(Prompt(tensors[0], pooled=tensors[1]))
    assert torch.equal(prompt.pooled, tensors[1]) and prompt.mask is None
    assert shelf.num_bytes >= 2000 and not list(tmp_path.iterdir())


def test_a_disk_that_others_have_filled_up_is_as_good_as_none(
    base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lessons.keep_in("file", monkeypatch)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    at_work = prepare(base_folder("stable_diffusion"), tmp_path)
    assert len(list(at_work.trainer.steps())) == 4 and not at_work.trainer.encoder.complete


def refuse(*_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_rests_is_there_when_it_is_needed_for_pictures(base_folder: Any, tmp_path: Path):
    at_work = prepare(base_folder("stable_diffusion"), tmp_path)
    next(at_work.trainer.steps())
    moves = []
    for name in at_work.family.resting:
        part = getattr(at_work.family.pipeline, name)
        part.to = lambda device, name=name: moves.append((name, str(device)))
    at_work.family.denoiser.to(torch.device("meta"))  # stands in for a GPU
    read = [("text_encoder", "meta"), ("text_encoder", "cpu")]
    with at_work.family.drawing():
        assert moves == [("vae", "meta")]
        for prompt in ("a thing", "a thing", "another"):
            at_work.family.pipeline.encode_prompt(prompt, torch.device("cpu"), 1, False)
    assert moves == [("vae", "meta"), *read, *read, ("vae", "cpu")]
    with at_work.family.sampling():
        assert moves[6:] == [("text_encoder", "meta"), ("vae", "meta")]


@pytest.mark.parametrize("family", tiny.BASES)
def test_pictures_of_prompts_that_are_known_are_those_of_new_ones(family: str, base_folder: Any, tmp_path: Path):
    at_work = prepare(base_folder(family), tmp_path)

    def draw(seed: int) -> list[Any]:
        with at_work.family.drawing():
            prompts, given = ["a thing", "a red thing"], {"steps": 2, "guidance": 2.0, "size": tiny.SIZE}
            return [np.array(each) for each in render(at_work.family.pipeline, prompts, [seed, 7], **given)]

    expected = [draw(0), draw(1)]
    at_work.trainer.encode()
    calls = count_calls(at_work)
    assert all(np.array_equal(*pair) for pair in zip(draw(0), expected[0], strict=True))
    assert set(calls) == set(at_work.family.text_encoders)
    calls.clear()
    assert all(np.array_equal(*pair) for pair in zip(draw(1), expected[1], strict=True))
    assert not calls
