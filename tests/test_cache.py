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
from finetune.batch import Encoder
from finetune.errors import UserError
from finetune.families.base import Family, Prompt
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
    moves, resting = [], at_work.family.resting
    for name in resting:
        part = getattr(at_work.family.pipeline, name)
        part.to = lambda device, name=name: moves.append((name, str(device)))
    at_work.family.device = torch.device("meta")  # stands in for a GPU
    with at_work.family.drawing():
        assert moves == [("vae", "meta")] and at_work.family.resting == ("text_encoder",)
        for prompt in ("a thing", "a thing", "another"):
            at_work.family.pipeline.encode_prompt(prompt, torch.device("cpu"), 1, False)
    assert moves == [("vae", "meta"), ("text_encoder", "meta"), ("text_encoder", "meta")]
    assert at_work.family.resting == resting


def test_what_is_lent_to_a_device_comes_back_to_where_it_was_without_being_copied(base_folder: Any, tmp_path: Path):
    family = run.load_family(lessons.recipe(base_folder("flux"), tmp_path, "lora", "plain"))
    encoder = family.pipeline.text_encoder
    places = [part.data_ptr() for part in encoder.state_dict().values()]
    expected = family.read(["a thing"])[0].embeds

    def to_elsewhere(_: torch.device) -> None:
        encoder._apply(torch.clone)

    encoder.to = to_elsewhere
    family.to(torch.device("cpu"), resting=list(family.named_parts()))
    with family.at_hand(["text_encoder"]), family.at_hand(family.text_encoders):
        assert "text_encoder" not in family.resting
        assert not {part.data_ptr() for part in encoder.state_dict().values()} & set(places)
        assert torch.equal(family.read(["a thing"])[0].embeds, expected)
    assert set(family.resting) == set(family.named_parts())
    assert [part.data_ptr() for part in encoder.state_dict().values()] == places


@pytest.mark.parametrize("to", ["int8", "nf4", "fp8"])
def test_what_is_lent_and_packed_on_the_way_comes_back_packed(to: str, base_folder: Any, tmp_path: Path):
    settings = {"base": {"quantize": to}}
    family = run.load_family(lessons.recipe(base_folder("flux"), tmp_path, "lora", "plain", **settings))
    family.to(torch.device("cpu"), resting=list(family.named_parts()))
    found = [family.read(["a thing"])[0].embeds for _ in range(2)]
    assert torch.equal(*found)
    kinds = {weight.dtype for weight in family.pipeline.text_encoder_2.parameters()}
    assert kinds & {torch.uint8, torch.int8}
    waiting = {weight.dtype for weight in family.denoiser.parameters()}
    assert not waiting & {torch.uint8}  # which a GPU packs, when it comes there


@pytest.mark.parametrize("family", tiny.BASES)
def test_no_two_large_parts_of_the_base_are_on_the_device_at_once_before_the_first_step(
    family: str, base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nor while step 0's pictures are drawn, whose prompts are known by then."""
    resting: dict[str, set[str]] = {}
    at_work = run.load_family(lessons.recipe(base_folder(family), tmp_path / "other", "lora", "plain"))
    kinds, parts = type(at_work), set(at_work.named_parts())
    denoiser, readers = {at_work.denoiser_name}, set(at_work.text_encoders)

    def note(name: str, plain: Any) -> None:
        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            resting.setdefault(name, set(self.resting))
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(kinds, name, noted)

    for name in ("encode_prompt", "encode_image", "denoise"):
        note(name, getattr(kinds, name))
    ran = prepare(base_folder(family), tmp_path)
    assert {name: parts - left for name, left in resting.items()} == {"encode_prompt": readers, "encode_image": {"vae"}}
    assert set(ran.family.resting) == parts - denoiser
    calls = count_calls(ran)
    ran.validate(None)
    assert ran.prompts and not readers & set(calls)
    next(ran.trainer.steps())
    assert parts - resting["denoise"] == denoiser


@pytest.mark.parametrize("family", tiny.BASES)
def test_class_images_are_drawn_without_a_text_encoder_on_the_device(
    family: str, base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    at_hand, seen = Family.at_hand, []

    def noted(self: Family, names: Any) -> Any:
        seen.append(set(names) & set(self.resting))
        return at_hand(self, names)

    monkeypatch.setattr(Family, "at_hand", noted)
    settings = {**lessons.WAYS["dreambooth"]["images"], "num_class_images": 3}
    few = {"batch_size": 2, "prompts": []}
    at_work = run.prepare(lessons.recipe(base_folder(family), tmp_path, "dreambooth", settings, validation=few)).family
    readers, denoiser = set(at_work.text_encoders), at_work.denoiser_name
    assert seen[0] == readers and seen[1] == {denoiser, "vae"}
    assert not any(readers & names for names in seen if denoiser in names)


@pytest.mark.parametrize(
    ("settings", "train", "told"),
    [
        ({"rank_pattern": {"no_such_layer": 2}}, {}, "no_such_layer"),
        ({}, {"gradient_checkpointing": ["no_such_part"]}, "no_such_part"),
        ({}, {"optimizer": "no.such.Optimizer"}, "no.such.Optimizer"),
    ],
)
def test_what_does_not_fit_the_base_is_told_before_anything_is_encoded(
    settings: dict[str, Any],
    train: dict[str, Any],
    told: str,
    base_folder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", {"rank": 2, **settings}, train=train)
    monkeypatch.setattr(Encoder, "read", refuse)
    monkeypatch.setattr(Encoder, "see", refuse)
    with pytest.raises(UserError, match=told):
        run.prepare(recipe)


def test_a_picture_that_is_gone_before_it_is_encoded_is_named(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain")

    def load(recipe: Any) -> Any:
        gone.unlink()
        return run.load_family(recipe)

    gone = next(Path(str(recipe.dataset.folder)).glob("*.png"))
    with pytest.raises(UserError, match=rf"{gone.name} cannot be read any more .*Bring it back") as told:
        run.prepare(recipe, load=load)
    assert told.value.problems[1:] == ["no step is kept, --resume begins anew"]


@pytest.mark.parametrize("family", tiny.BASES)
def test_pictures_of_prompts_that_are_known_are_those_of_new_ones(family: str, base_folder: Any, tmp_path: Path):
    at_work = prepare(base_folder(family), tmp_path)

    def draw(seed: int) -> list[Any]:
        with at_work.family.drawing():
            prompts, given = ["a thing", "a red thing"], {"steps": 2, "guidance": 2.0, "size": tiny.SIZE}
            return [np.array(each) for each in render(at_work.family.pipeline, prompts, [seed, 7], **given)]

    resting = at_work.family.resting
    at_work.family.resting = ()
    expected = [draw(0), draw(1)]
    at_work.family.resting = resting
    calls = count_calls(at_work)
    assert all(np.array_equal(*pair) for pair in zip(draw(0), expected[0], strict=True))
    assert set(calls) == set(at_work.family.text_encoders)
    calls.clear()
    assert all(np.array_equal(*pair) for pair in zip(draw(1), expected[1], strict=True))
    assert not calls
