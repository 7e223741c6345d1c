"""The committed base model and the sample concepts."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

DATA = Path(__file__).resolve().parents[2] / "data"
LIMIT = 15e6


@pytest.fixture(scope="module")
def base():
    pipeline = StableDiffusionPipeline.from_pretrained(DATA / "base")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_file_is_small_enough_and_every_weight_is_safetensors():
    files = [p for p in DATA.rglob("*") if p.is_file()]
    assert max(p.stat().st_size for p in files) <= LIMIT
    assert not [p for p in files if p.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl")]


def test_the_base_loads_in_float32_whatever_it_is_stored_in(base):
    for part in (base.unet, base.vae, base.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_the_base_paints_the_colour_that_the_prompt_asks_for(base):
    noise = torch.Generator().manual_seed(0)
    picture = base(
        "a dog face on a red background, noto style", num_inference_steps=10, guidance_scale=5.0, generator=noise
    ).images[0]
    assert picture.size == (256, 256)
    red, green, blue = picture.crop((4, 4, 40, 40)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert red > 150 and green < 110 and blue < 110


def test_the_autoencoder_keeps_a_sample_picture(base):
    pixels = torch.frombuffer(
        bytearray(Image.open(DATA / "concepts/fox/01.png").convert("RGB").tobytes()), dtype=torch.uint8
    )
    picture = pixels.view(1, 256, 256, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        made = base.vae.decode(base.vae.encode(picture).latent_dist.mode()).sample
    assert -10 * torch.log10((made - picture).square().mean() / 4) > 30


@pytest.mark.parametrize("concept", sorted(p.name for p in (DATA / "concepts").iterdir() if p.is_dir()))
def test_every_concept_picture_has_a_caption_with_one_placeholder(concept):
    pictures = sorted((DATA / "concepts" / concept).glob("*.png"))
    assert len(pictures) >= 5
    for picture in pictures:
        assert Image.open(picture).size == (256, 256)
        assert picture.with_suffix(".txt").read_text().count("{}") == 1
