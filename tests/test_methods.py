"""Every method on every family: what is trained, what is not, what goes out, and what comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lessons
import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from finetune import run
from finetune.architectures import ARCHITECTURES
from finetune.export import compare
from finetune.methods.base import methods
from finetune.recipe import known_families
from finetune.render import render

CAPTIONS = ["a <it> thing", "a thing"]
# diffusers itself loads no embeddings into these; finetune.load does.
WITHOUT_WORDS = ("StableDiffusion3Pipeline", "ZImagePipeline")


def state(family: Any) -> dict[str, Tensor]:
    """All weights of a family's modules."""
    parts = {name: part for name, part in family.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def test_every_registered_method_and_family_is_under_test():
    assert set(lessons.WAYS) == set(methods.names())
    assert set(tiny.BASES) == set(known_families())


@pytest.mark.parametrize("case", lessons.CASES, ids=lessons.name)
def test_everything_that_is_not_trained_stays_bit_identical(case: tuple[str, ...], lesson: Any):
    at_work, _, _ = lesson(case)
    before, after = state(run.load_family(at_work.recipe)), state(at_work.trainer.student.family)
    whole = {group.name for group in at_work.trainer.student.groups} if case[3].startswith("whole") else set()
    for name, value in before.items():
        if name.split(".")[0] not in whole:
            part, _, rest = name.partition(".")
            # peft and the extended vocabulary put the frozen weights one level deeper.
            stem, _, leaf = rest.rpartition(".")
            candidates = [name, f"{part}.{stem}.table.{leaf}"]
            candidates.append(f"{part}.{stem}.base_layer.{leaf}")
            found = next(after[candidate] for candidate in candidates if candidate in after)
            assert torch.equal(found, value), name


@pytest.mark.parametrize("case", lessons.CASES, ids=lessons.name)
def test_all_that_is_trained_is_float32_and_moves(case: tuple[str, ...], base_folder: Any, lesson: Any, tmp_path: Path):
    _, _, trained = lesson(case)
    start = run.prepare(lessons.recipe(base_folder(*case[:2]), tmp_path, *case[2:])).trainer.student.state_dict()
    assert start.keys() == trained.keys() and start
    assert all(value.dtype == torch.float32 for value in trained.values())
    moved = [name for name in start if not torch.equal(start[name], trained[name])]
    # A bias before a normalisation has no gradient; nothing else may stand still.
    assert len(moved) > 0.9 * len(start)


@pytest.mark.parametrize("case", lessons.CASES, ids=lessons.name)
def test_the_export_predicts_what_the_trained_model_does(case: tuple[str, ...], lesson: Any):
    _, result, _ = lesson(case)
    assert result.verdict.changed > 1e-3
    assert result.verdict.error < 1e-3


FRESH = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

for case in json.load(sys.stdin):
    pipeline = DiffusionPipeline.from_pretrained(case["base"], use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    for file in case["files"]:
        folder, _, name = file.rpartition("/")
        if "lora" in name:
            pipeline.load_lora_weights(folder, weight_name=name)
        elif not case["encoders"]:
            pipeline.load_textual_inversion(folder, weight_name=name)
        else:
            for key, (encoder, tokenizer) in case["encoders"].items():
                pipeline.load_textual_inversion(
                    load_file(file)[key], token="<it>", text_encoder=getattr(pipeline, encoder),
                    tokenizer=getattr(pipeline, tokenizer),
                )
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(case["captions"]))]
    size = case["size"]
    made = pipeline(
        prompt=case["captions"], generator=generator, num_inference_steps=2, guidance_scale=2.0, height=size,
        width=size, output_type="np",
    ).images
    save_file({"made": torch.from_numpy(made.copy())}, case["output"])
assert "finetune" not in sys.modules
"""


def test_plain_diffusers_in_a_fresh_process_draws_what_was_trained(lesson: Any, tmp_path: Path):
    cases, expected, names = [], [], []
    for number, case in enumerate(lessons.CASES):
        at_work, result, _ = lesson(case)
        family = at_work.trainer.student.family
        if family.pipeline_class in WITHOUT_WORDS and any("embeds" in file.name for file in result.files):
            continue
        with family.looking():
            scheduler = type(family.pipeline).from_pretrained(at_work.recipe.base.source).scheduler
            family.pipeline.scheduler = scheduler
            images = render(
                family.pipeline, CAPTIONS, range(len(CAPTIONS)), steps=2, guidance=2.0, size=tiny.SIZE, batch_size=2
            )
        expected.append(np.stack([np.asarray(image) for image in images]) / 255)
        names.append(lessons.name(case))
        several = len(family.text_encoders) > 1
        pairs = {family.word_keys[encoder]: pair for pair in family.text_encoders.items() for encoder in pair[:1]}
        cases.append(
            {
                "base": at_work.recipe.base.source,
                "files": [str(file) for file in result.files],
                "encoders": pairs if several else None,
                "captions": CAPTIONS,
                "size": tiny.SIZE,
                "output": str(tmp_path / f"{number}.safetensors"),
            }
        )
    subprocess.run([sys.executable, "-c", FRESH], input=json.dumps(cases), text=True, check=True, timeout=300)
    for case, drawn, name in zip(cases, expected, names, strict=True):
        made = load_file(case["output"])["made"].numpy()
        assert np.abs(made - drawn).max() < 1.5 / 255, name


@pytest.mark.parametrize("case", lessons.FAMILY_X_METHOD, ids=lessons.name)
def test_the_file_says_what_it_is(case: tuple[str, ...], lesson: Any):
    at_work, result, _ = lesson(case)
    for file in result.files:
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        assert header["trigger"] == "<it>"
        assert header["architecture"] in ARCHITECTURES
        assert header["method"] == case[2]
        assert header["steps"] == "4"
        assert header["base_fingerprint"] == at_work.trainer.student.family.fingerprint
        assert len(json.dumps(header)) < 1000


@pytest.mark.parametrize("case", lessons.CASES, ids=lessons.name)
def test_every_lora_key_is_one_that_diffusers_reads(case: tuple[str, ...], lesson: Any):
    _, result, _ = lesson(case)
    for file in result.files:
        names = load_file(file).keys()
        if "lora" in file.name:
            assert all("lora" in name for name in names)
            parts = ("unet.", "transformer.", *(f"text_encoder{i}.text_model.encoder.layers." for i in ("", "_2")))
            assert all(name.startswith(parts) or case[3].startswith("whole") for name in names)


def test_a_lora_is_exported_with_its_alpha_in_the_weights(lesson: Any):
    at_work, result, trained = lesson(("stable_diffusion", "epsilon", "lora", "alpha-and-text"))
    weights = load_file(result.files[0])
    name = next(name for name in trained if "lora_B" in name and name.startswith("trained.unet"))
    layer = name.removeprefix("trained.unet.").replace("/", ".").replace(".default.", ".")
    torch.testing.assert_close(weights[f"unet.{layer}"], trained[name] * at_work.recipe.method.alpha / 4)


def test_a_whole_denoiser_at_full_rank_keeps_almost_all_of_the_change_and_says_so(lesson: Any):
    _, result, _ = lesson(("stable_diffusion", "epsilon", "dreambooth", "whole"))
    with safe_open(result.files[0], "pt") as opened:
        kept = float(opened.metadata()["energy_kept.unet"])
    assert 0.5 < kept < 1.0


def test_a_smaller_rank_keeps_less_and_an_energy_share_is_reached(base_folder: Any, tmp_path: Path):
    kept: dict[str, float] = {}
    for title, settings in {
        "rank 1": {"rank": 1},
        "90%": {"export_energy": 0.9},
        "99%": {"export_energy": 0.99},
    }.items():
        way = {"denoiser": "whole", "prior": "none", **settings}
        result = run.train(lessons.recipe(base_folder("stable_diffusion"), tmp_path / title, "dreambooth", way))
        with safe_open(result.files[0], "pt") as opened:
            kept[title] = float(opened.metadata()["energy_kept.unet"])
    assert kept["rank 1"] < kept["90%"] < kept["99%"]


def test_the_full_checkpoint_is_an_option_and_loads(base_folder: Any, tmp_path: Path):
    way = {"denoiser": "whole", "prior": "none", "export_checkpoint": True}
    at_work = run.prepare(lessons.recipe(base_folder("stable_diffusion"), tmp_path, "dreambooth", way))
    at_work.loop()
    weight = at_work.trainer.student.family.denoiser.conv_in.weight.detach().clone()
    at_work.finish()
    loaded = tiny.StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "checkpoint")
    assert torch.equal(loaded.unet.conv_in.weight, weight)


def test_a_damaged_export_is_noticed(lesson: Any):
    at_work, _, _ = lesson(("stable_diffusion", "epsilon", "lora", "plain"))
    before, after = at_work.probe(run.load_family(at_work.recipe)), at_work.probe(at_work.family)
    assert compare(before, after, after).passed
    assert not compare(before, after, before).passed
    assert not compare(after, after, after).passed  # nothing was learnt


def test_pivotal_tuning_freezes_its_word_after_its_share_of_the_steps(base_folder: Any, tmp_path: Path):
    at_work = run.prepare(
        lessons.recipe(
            base_folder("stable_diffusion"), tmp_path, "pivotal_tuning", {"init": "thing", "word_share": 0.5}
        )
    )
    words, loras = [], []
    for _ in at_work.trainer.steps():
        state = at_work.trainer.student.state_dict()
        words.append(next(value.clone() for name, value in state.items() if "words" in name))
        loras.append(next(value.clone() for name, value in state.items() if "lora_B" in name))
    assert not torch.equal(words[0], words[1])
    assert torch.equal(words[1], words[2]) and torch.equal(words[2], words[3])
    assert not torch.equal(loras[2], loras[3])


def test_weight_decay_moves_no_other_word(base_folder: Any, tmp_path: Path):
    train = {"optimizer_options": {"weight_decay": 0.5}}
    case = base_folder("stable_diffusion"), tmp_path, "textual_inversion", "one-vector"
    at_work = run.prepare(lessons.recipe(*case, train=train))
    table = at_work.trainer.student.family.pipeline.text_encoder.get_input_embeddings().table.weight
    before = table.clone()
    at_work.loop()
    assert torch.equal(table, before)


def test_preserved_norms_are_those_of_a_typical_word(lesson: Any):
    at_work, _, trained = lesson(("stable_diffusion", "epsilon", "textual_inversion", "three-vectors"))
    (vectors,) = trained.values()
    typical = at_work.family.pipeline.text_encoder.get_input_embeddings().median_norm()
    torch.testing.assert_close(vectors.norm(dim=1), typical.expand(3))


def test_a_word_can_start_from_another_embedding(base_folder: Any, lesson: Any, tmp_path: Path):
    _, result, _ = lesson(("stable_diffusion", "epsilon", "textual_inversion", "three-vectors"))
    way = {"init": str(result.files[0]), "num_vectors": 3}
    at_work = run.prepare(lessons.recipe(base_folder("stable_diffusion"), tmp_path, "textual_inversion", way))
    (start,) = at_work.trainer.student.state_dict().values()
    torch.testing.assert_close(start, load_file(result.files[0])["<it>"])
