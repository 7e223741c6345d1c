"""Adapters back into pipelines: any mix, with weights, and the pictures that training showed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lessons
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from finetune import run
from finetune.errors import UserError
from finetune.generate import generate_files
from finetune.load import Adapter, load_adapters
from finetune.render import render, use_ddim

ONE_PER_METHOD = [case for case in lessons.FAMILY_X_METHOD if case[0] == "stable_diffusion"]


@pytest.fixture(scope="module")
def trained(base_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case -> (base folder, run folder) of a finished run."""
    finished: dict[tuple[str, ...], tuple[Path, Path]] = {}

    def learn(case: tuple[str, ...], placeholder: str = "<it>") -> tuple[Path, Path]:
        if (*case, placeholder) not in finished:
            base, output = base_folder(case[0], case[1]), tmp_path_factory.mktemp("trained")
            run.train(lessons.recipe(base, output, case[2], case[3], placeholder=placeholder))
            finished[*case, placeholder] = base, output / "run"
        return finished[*case, placeholder]

    return learn


def pipeline(base: Path) -> Any:
    loaded = tiny.StableDiffusionPipeline.from_pretrained(base)
    use_ddim(loaded)
    return loaded


def draw(pipe: Any, prompts: list[str], seeds: list[int]) -> np.ndarray:
    images = render(pipe, prompts, seeds, steps=2, guidance=2.0, size=tiny.SIZE)
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


@pytest.mark.parametrize("case", ONE_PER_METHOD, ids=lessons.name)
def test_generate_makes_the_pictures_that_training_showed_last(case: tuple[str, ...], trained: Any, tmp_path: Path):
    _, folder = trained(case)
    (path,) = generate_files(
        ["a <it> thing"],
        [Adapter(folder)],
        base=None,
        revision=None,
        seed=0,
        steps=2,
        guidance=2.0,
        size=tiny.SIZE,
        folder=tmp_path,
    )
    (shown,) = (folder / "samples" / "step-000004").iterdir()
    difference = np.asarray(Image.open(path), np.int16) - np.asarray(Image.open(shown), np.int16)
    assert np.abs(difference).max() <= 1


def test_a_picture_depends_on_its_own_seed_and_not_on_its_neighbours(base_folder: Any):
    pipe = pipeline(base_folder("stable_diffusion"))
    together = draw(pipe, ["a", "b", "c"], [5, 6, 7])
    assert np.abs(together[1] - draw(pipe, ["b"], [6])[0]).max() <= 1
    assert np.abs(together[1] - draw(pipe, ["b"], [7])[0]).max() > 1


def test_a_lora_at_weight_zero_is_the_base_and_weights_scale_it(trained: Any):
    base, folder = trained(("stable_diffusion", "epsilon", "lora", "plain"))
    plain, full, half, none = (pipeline(base) for _ in range(4))
    for pipe, weight in ((full, 1.0), (half, 0.5), (none, 0.0)):
        load_adapters(pipe, [Adapter(folder, weight)])
    pictures = [draw(pipe, ["a thing"], [0]) for pipe in (plain, none, half, full)]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2]) and not np.array_equal(pictures[2], pictures[3])


def test_a_lora_and_two_embeddings_load_together(trained: Any):
    base, lora = trained(("stable_diffusion", "epsilon", "lora", "plain"))
    _, one = trained(("stable_diffusion", "epsilon", "textual_inversion", "one-vector"), "<one>")
    _, three = trained(("stable_diffusion", "epsilon", "textual_inversion", "three-vectors"), "<three>")
    mixed, without = pipeline(base), pipeline(base)
    load_adapters(mixed, [Adapter(lora, 0.7), Adapter(one), three])
    load_adapters(without, [Adapter(lora, 0.7)])
    assert {"<one>", "<three>", "<three>_1", "<three>_2"} <= mixed.tokenizer.get_vocab().keys()
    prompt = ["a <one> by a <three>"]
    assert not np.array_equal(draw(mixed, prompt, [0]), draw(without, prompt, [0]))
    assert np.array_equal(draw(mixed, ["a thing"], [0]), draw(without, ["a thing"], [0]))


def test_two_loras_at_half_weight_of_the_same_file_are_one_at_full(trained: Any):
    base, folder = trained(("stable_diffusion", "epsilon", "lora", "plain"))
    twice, once = pipeline(base), pipeline(base)
    load_adapters(twice, [Adapter(folder, 0.5), Adapter(folder, 0.5)])
    load_adapters(once, [Adapter(folder)])
    assert np.abs(draw(twice, ["a thing"], [0]) - draw(once, ["a thing"], [0])).max() <= 1


def test_an_embedding_at_weight_zero_is_the_mean_word(trained: Any):
    base, folder = trained(("stable_diffusion", "epsilon", "textual_inversion", "one-vector"))
    pipe = pipeline(base)
    mean = pipe.text_encoder.get_input_embeddings().weight.mean(0)
    load_adapters(pipe, [Adapter(folder, 0.0)])
    torch.testing.assert_close(pipe.text_encoder.get_input_embeddings().weight[-1], mean)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("nowhere.safetensors", "does not exist"), ("nowhere=much", "not a number")],
)
def test_a_wrong_adapter_is_named(text: str, problem: str):
    with pytest.raises(UserError, match=problem):
        Adapter.parse(text)


def test_files_that_are_no_adapters_are_refused(base_folder: Any, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no adapter"):
        Adapter(tmp_path / "empty").files()
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="not a safetensors file"):
        load_adapters(pipeline(base_folder("stable_diffusion")), [tmp_path / "broken.safetensors"])


def test_a_base_that_is_no_base_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be loaded"):
        generate_files(
            ["a"], [], base=str(tmp_path), revision=None, seed=0, steps=1, guidance=1.0, size=8, folder=tmp_path
        )
