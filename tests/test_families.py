"""A family says exactly what its diffusers pipeline would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lessons
import pytest
import tiny
import torch

from finetune import run
from finetune.batch import Encoder
from finetune.dataset import DatasetConfig, Pictures, scan
from finetune.errors import UserError
from finetune.families.base import Source, families
from finetune.vocabulary import extend

BASES = [(family, variant) for family, variants in tiny.BASES.items() for variant in variants]


@pytest.fixture
def family(request: Any, base_folder: Any) -> Any:
    name, variant = request.param
    return families[name].load(Source(str(base_folder(name, variant))), min_snr_gamma=None, zero_terminal_snr=False)


every_family = pytest.mark.parametrize("family", BASES, ids="-".join, indirect=True)


@every_family
def test_prompts_are_encoded_as_the_pipeline_encodes_them(family: Any):
    captions = ["a thing", "another, much longer, caption of a thing " * 9]
    with torch.no_grad():
        expected, _ = family.pipeline.encode_prompt(captions, "cpu", 1, False)
        torch.testing.assert_close(family.encode_prompt(family.tokenize(captions)).embeds, expected)


@every_family
def test_latents_decode_to_the_picture_as_the_pipeline_decodes_them(family: Any):
    pixels = torch.rand(1, 3, tiny.SIZE, tiny.SIZE) * 2 - 1
    vae, posterior = family.pipeline.vae, family.encode_image(pixels)
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist
    torch.testing.assert_close(posterior.mean / vae.config.scaling_factor, expected.mean)
    torch.testing.assert_close(posterior.std / vae.config.scaling_factor, expected.std)


@every_family
def test_everything_is_frozen_until_a_method_is_attached(family: Any):
    assert not any(parameter.requires_grad for part in family.parts() for parameter in part.parameters())


@every_family
def test_a_word_of_several_vectors_is_spelled_out_in_the_prompt(family: Any):
    tables = extend(family, "<it>", 3, "thing")
    size = len(next(iter(tables.values())).table.weight)
    for ids in family.tokenize(["a <it> thing"]).values():
        found = ids[0].tolist()
        place = found.index(size)
        assert found[place : place + 3] == [size, size + 1, size + 2]


@every_family
def test_a_word_that_exists_already_is_refused(family: Any):
    with pytest.raises(UserError, match="already a word"):
        extend(family, "a", 1, "thing")
    extend(family, "<it>", 1, "a")
    with pytest.raises(UserError, match="already a word"):
        extend(family, "<it>", 1, "a")


def test_prediction_type_is_read_from_the_checkpoint(base_folder: Any):
    for variant in tiny.BASES["stable_diffusion"]:
        source = Source(str(base_folder("stable_diffusion", variant)))
        loaded = families["stable_diffusion"].load(source, min_snr_gamma=None, zero_terminal_snr=False)
        assert loaded.objective.prediction == variant


def test_the_fingerprint_follows_the_weights(base_folder: Any, tmp_path: Path):
    pipeline = tiny.stable_diffusion()
    pipeline.save_pretrained(tmp_path / "same")
    pipeline.unet.conv_out.bias.data[0] += 1
    pipeline.save_pretrained(tmp_path / "other")
    prints = [
        families["stable_diffusion"].load(Source(str(path)), min_snr_gamma=None, zero_terminal_snr=False).fingerprint
        for path in (base_folder("stable_diffusion"), tmp_path / "same", tmp_path / "other")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_a_base_of_no_known_family_is_named(tmp_path: Path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(UserError, match="KandinskyPipeline"):
        run.load_family(lessons.recipe(tmp_path, tmp_path / "out", "lora", "plain"))


def test_cached_latents_follow_the_picture_and_not_its_name(base_folder: Any, tmp_path: Path):
    source = Source(str(base_folder("stable_diffusion")))
    loaded = families["stable_diffusion"].load(source, min_snr_gamma=None, zero_terminal_snr=False)
    encoder = Encoder(loaded, trains_text=False, noise_offset=0.0)
    config = DatasetConfig(folder=tiny.save_pictures(tmp_path / "pictures", 2), resolution=tiny.SIZE)

    def means() -> list[torch.Tensor]:
        pictures = Pictures.from_pictures(scan(config), config, "<it>")
        draws = sorted((pictures.draw(0, position) for position in range(2)), key=lambda draw: draw.path)
        return [posterior.mean for posterior in encoder._encode_images(draws, keep=True)]

    before = means()
    first, second = tmp_path / "pictures/0.png", tmp_path / "pictures/1.png"
    swap = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(swap)
    after = means()
    assert torch.equal(before[0], after[1]) and torch.equal(before[1], after[0])
    assert not torch.equal(before[0], before[1])


def test_random_flips_are_drawn_anew_while_latents_are_cached(base_folder: Any, tmp_path: Path):
    source = Source(str(base_folder("stable_diffusion")))
    loaded = families["stable_diffusion"].load(source, min_snr_gamma=None, zero_terminal_snr=False)
    encoder = Encoder(loaded, trains_text=False, noise_offset=0.0)
    folder = tiny.save_pictures(tmp_path / "pictures", 1)
    config = DatasetConfig(folder=folder, resolution=tiny.SIZE, flip=True)
    pictures = Pictures.from_pictures(scan(config), config, "<it>")
    draws = [pictures.draw(0, position) for position in range(12)]
    assert {draw.crop.flip for draw in draws} == {True, False}
    posteriors = encoder._encode_images(draws, keep=True)
    assert len(encoder._posteriors) == 2
    flipped = [posterior for posterior, draw in zip(posteriors, draws, strict=True) if draw.crop.flip]
    assert all(torch.equal(flipped[0].mean, other.mean) for other in flipped)
