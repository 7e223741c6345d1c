"""The model card's pictures: fixed prompts and instructions, one fixed seed, nothing chosen by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from paint import GUIDANCE, IMAGE_GUIDANCE, STEPS, load
from PIL import Image, ImageDraw, ImageFont

from finetune.companions import companion
from finetune.edges import edge_map

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
CONTROLLED = (
    # what the edge map is taken from, and what is painted over it
    ("a cat face wearing a crown at night, twemoji style", "a cat face wearing a crown in a meadow, noto style"),
    ("a castle under the northern lights, noto style", "a castle in the desert, flat style"),
    ("a bear in a forest, noto style", "a golden bear at sunset, noto style"),
    ("a car in the city, twemoji style", "a red car on the beach, twemoji style"),
    ("a turtle on a table, noto style", "a blue turtle under water, noto style"),
    ("a house in the snow, flat style", "a house made of chocolate in autumn, flat style"),
)
EDITED = (
    ("a dog face in a meadow, noto style", "make it night"),
    ("a frog on the beach, noto style", "put a top hat on it"),
    ("a house in a garden, flat style", "change the background to snow"),
    ("a horse in the desert, noto style", "make it blue"),
    ("a cupcake on a table, twemoji style", "turn it into pixel art"),
    ("a turtle in a forest, noto style", "turn it into gold"),
    ("a cat face wearing sunglasses on a yellow background, noto style", "remove the sunglasses"),
    ("a tulip at sunset, flat style", "turn the tulip into a sunflower"),
    ("a bear in the mountains, noto style", "make it a pencil sketch"),
)


def paint_samples(base: Path) -> None:
    """Write `samples.webp` and `companions.webp` beside the pipeline: 25 DDIM steps, guidance 5."""
    paint_prompts(base)
    if (base / "companions").exists():
        paint_companions(base)


def paint_companions(base: Path) -> None:
    """Rows of edge map and picture, then rows of source and result, each over its words."""
    plain = load(StableDiffusionPipeline, base)
    control = load(StableDiffusionControlNetPipeline, base, controlnet=companion("controlnet", base))
    editor = load(StableDiffusionInstructPix2PixPipeline, base, unet=companion("instruct_pix2pix", base))
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    noise = torch.Generator("cpu").manual_seed(SEED)
    first = plain([caption for caption, _ in CONTROLLED], generator=noise, **settings).images
    maps = [edge_map(image) for image in first]
    drawn = control([prompt for _, prompt in CONTROLLED], maps, generator=noise, **settings).images
    sources = plain([caption for caption, _ in EDITED], generator=noise, **settings).images
    settings["image_guidance_scale"] = IMAGE_GUIDANCE
    edited = editor([said for _, said in EDITED], sources, generator=noise, **settings).images
    words = [said for _, said in (*CONTROLLED, *EDITED)]
    pairs = zip([*maps, *sources], [*drawn, *edited], words, strict=True)
    cells = [cell for before, after, said in pairs for cell in ((before, ""), (after, said))]
    lettered(cells).save(base / "companions.webp", quality=82, method=6)


def lettered(cells: list[tuple[Image.Image, str]], strip: int = 18) -> Image.Image:
    """Pictures in rows of six, pair by pair, each pair over its words."""
    sheet = Image.new("RGB", (COLUMNS * SIDE, len(cells) // COLUMNS * (SIDE + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, said) in enumerate(cells):
        x, y = place % COLUMNS * SIDE, place // COLUMNS * (SIDE + strip)
        sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        if said:
            draw.text((x - SIDE + 4, y + SIDE + 2), said, "black", ImageFont.load_default(13))
    return sheet


def paint_prompts(base: Path, batch: int = 8) -> None:
    pipeline = load(StableDiffusionPipeline, base)
    noise, images = torch.Generator("cpu").manual_seed(SEED), []
    for start in range(0, len(PROMPTS), batch):
        prompts = list(PROMPTS[start : start + batch])
        images += pipeline(prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise).images
    sheet = Image.new("RGB", (COLUMNS * SIDE, len(images) // COLUMNS * SIDE))
    for place, image in enumerate(images):
        small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(small, (place % COLUMNS * SIDE, place // COLUMNS * SIDE))
    sheet.save(base / "samples.webp", quality=90, method=6)
