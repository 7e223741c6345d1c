"""The model card's picture: fixed prompts, one fixed seed, nothing chosen by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

PROMPTS = (
    "a cat face wearing a crown at night, twemoji style", "a frog holding a balloon under a rainbow, flat style",
    "a cupcake wearing a top hat at a party, noto style", "a ufo on the moon, flat style",
    "a golden turtle on a table, noto style", "a goose on top of a house in the snow, twemoji style",
    "three elephants in a meadow, noto style", "a banana next to a red apple on the beach, flat style",
    "a dog face wearing sunglasses on a yellow background, noto style", "a whale under water, noto style",
    "a blue rabbit face in a garden, flat style", "an astronaut in space, twemoji style",
    "a dolphin at sunset, flat style", "a bear in a forest, noto style", "a bee in a garden, twemoji style",
    "a tiger face on a teal background, pixel art", "a parrot in the mountains, noto style",
    "two ice creams on a pink background, flat style", "a castle under the northern lights, noto style",
    "a smiling face with hearts as a sticker", "a car in the city, twemoji style",
    "a chick wearing a sun hat in autumn, flat style",
    "a violin on a stage, noto style", "a horse in the desert, black and white",
)  # fmt: skip
COLUMNS, SIDE, SEED = 6, 192, 7


def paint_samples(base: Path, batch: int = 8) -> None:
    """Write `samples.webp` beside the pipeline: 25 DDIM steps, guidance 5."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    noise, images = torch.Generator("cpu").manual_seed(SEED), []
    for start in range(0, len(PROMPTS), batch):
        prompts = list(PROMPTS[start : start + batch])
        images += pipeline(prompts, num_inference_steps=25, guidance_scale=5.0, generator=noise).images
    sheet = Image.new("RGB", (COLUMNS * SIDE, len(images) // COLUMNS * SIDE))
    for place, image in enumerate(images):
        small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(small, (place % COLUMNS * SIDE, place // COLUMNS * SIDE))
    sheet.save(base / "samples.webp", quality=90, method=6)
