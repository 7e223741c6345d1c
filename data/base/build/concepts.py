"""Subjects and styles that the base has never seen, drawn by its own world: the sample concepts in `data/concepts`, and
those of the studies in `data/studies`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from composer import Composer
from effects import blueprint, duotone, neon, pencil, thermal
from layouts import Arranger, Place
from PIL import Image
from scenes import SCENES
from specification import Layer, Picture
from sprites import describe, drawing, fetch, load_icons, rasterize
from vocabulary import COLOURS, HELD
from words import article, spoken

SIZE = 256
SUBJECTS = {
    # name: (Iconify set, emojibase label, class noun of the captions)
    "fox": ("noto", "fox", "animal"),
    "teddy_bear": ("noto", "teddy bear", "toy"),
    "octopus": ("twemoji", "octopus", "sea animal"),
    "teapot": ("twemoji", "teapot", "household object"),
    "robot": ("fluent-emoji-flat", "robot", "toy"),
}
STUDIED = {
    "backpack": ("noto", "backpack", "object"),
    "cactus": ("twemoji", "cactus", "plant"),
    "guitar": ("noto", "guitar", "instrument"),
    "lion": ("twemoji", "lion", "animal"),
    "owl": ("noto", "owl", "bird"),
    "panda": ("fluent-emoji-flat", "panda", "animal"),
    "penguin": ("twemoji", "penguin", "bird"),
    "pizza": ("noto", "pizza", "food"),
    "rocket": ("twemoji", "rocket", "aircraft"),
    "sailboat": ("fluent-emoji-flat", "sailboat", "boat"),
    "snowman": ("noto", "snowman", "toy"),
    "unicorn": ("fluent-emoji-flat", "unicorn", "animal"),
}
VIEWS = (
    # backdrop (a scene, or a colour), scale, x, turn
    ("teal", 0.70, 0.02, 0.0),
    ("yellow", 0.56, -0.12, 0.12),
    ("meadow", 0.58, 0.10, 0.0),
    ("beach", 0.52, -0.16, -0.08),
    ("room", 0.62, -0.04, 0.0),
    ("snow", 0.48, 0.18, 0.06),
    ("white", 0.80, 0.0, 0.0),
)
STYLES = {"fluent_3d": "fluent-emoji", "openmoji": "openmoji"}
STUDIED_STYLES = {"emojione": "emojione", "firefox_os": "fxemoji"}
TECHNIQUES = {"blueprint": blueprint, "duotone": duotone, "neon": neon, "pencil": pencil, "thermal": thermal}
TECHNIQUES_OF = "noto"
EXAMPLES = (
    ("cat face", "white"), ("red apple", "white"), ("automobile>car", "city"), ("sunflower", "garden"),
    ("frog", "lake"), ("cupcake", "pink"), ("rabbit face", "meadow"), ("house", "snow"), ("pineapple", "teal"),
    ("airplane", "sky"), ("tropical fish", "under water"), ("crown", "purple"), ("ice cream", "beach"),
    ("turtle", "desert"), ("soccer ball", "orange"), ("tulip", "yellow"),
)  # fmt: skip


def view(
    index: int,
    arranger: Arranger,
    backdrop: str,
    scale: float,
    x: float,
    turn: float,
    draws: tuple[float, ...],
) -> Picture:
    """One thing in one place, standing on the ground where there is one."""
    left, top, right, bottom = arranger.sprites[index].box
    if backdrop in SCENES:
        ground = Place.of(backdrop, draws, arranger.rng).ground
        if ground is None:
            return Picture([Layer(index, scale, x, 0.0, turn)], backdrop, draws=draws)
        layer = arranger.stand(index, scale, x, max(0.62, min(ground, 0.8)), 0.34, turn=turn)
        return Picture([layer], backdrop, draws=draws)
    colour = list(COLOURS).index(backdrop)
    layer = Layer(index, scale, x - scale * (left + right) / 2, -scale * (top + bottom) / 2, turn, shadow=0.16)
    return Picture([layer], "plain", (colour, colour), draws)


def place_words(backdrop: str) -> str:
    return SCENES[backdrop].phrases[0] if backdrop in SCENES else f"on {article(backdrop)} background"


def save(folder: Path, number: int, picture: torch.Tensor, caption: str, kind: str = "png") -> None:
    """picture: [3, h, w] in 0..1."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    options = {"optimize": True} if kind == "png" else {"quality": 90, "method": 6}
    Image.fromarray(pixels).save(folder / f"{number:02d}.{kind}", **options)
    (folder / f"{number:02d}.txt").write_text(caption + "\n")


def draw_subject(
    source: Path,
    folder: Path,
    set_name: str,
    label: str,
    noun: str,
    views: tuple = VIEWS,
    seed: str = "",
    kind: str = "png",
) -> None:
    """One captioned picture for each view."""
    assert label in HELD, f"{label} is in the base's training world"
    image = rasterize(drawing(load_icons(source, set_name), label) or "")
    sprite = describe(image, set_name, label, label, noun)
    composer = Composer(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], [sprite], SIZE)
    rng = Random(label + seed)
    for number, (backdrop, scale, x, turn) in enumerate(views, 1):
        draws = tuple(rng.random() for _ in range(8))
        arranger = Arranger([sprite], Place(None, 0.0), rng)
        picture = composer.draw([view(0, arranger, backdrop, scale, x, turn, draws)])[0]
        save(folder, number, picture, f"a {{}} {noun} {place_words(backdrop)}", kind)


def draw_style(
    source: Path,
    folder: Path,
    set_name: str,
    examples: tuple = EXAMPLES,
    seed: str = "",
    kind: str = "png",
    technique: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> None:
    """One captioned picture for each example that the set has."""
    icons = load_icons(source, set_name)
    drawn = [(*spoken(entry), backdrop, drawing(icons, spoken(entry)[0])) for entry, backdrop in examples]
    named = [(label, said, backdrop) for label, said, backdrop, svg in drawn if svg]  # an older set lacks some
    images = [rasterize(svg) for _, _, _, svg in drawn if svg]
    sprites = [
        describe(image, set_name, label, said, "") for image, (label, said, _) in zip(images, named, strict=True)
    ]
    composer = Composer(torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]), sprites, SIZE)
    rng = Random(set_name + seed)
    for number, (_, said, backdrop) in enumerate(named):
        draws = tuple(rng.random() for _ in range(8))
        arranger = Arranger(sprites, Place(None, 0.0), rng)
        picture = composer.draw([view(number, arranger, backdrop, 0.68, rng.uniform(-0.1, 0.1), 0.0, draws)])[0]
        save(folder, number + 1, technique(picture), f"{article(said)} {place_words(backdrop)}, {{}} style", kind)


def write_concepts(source: Path, folder: Path) -> None:
    """Draw the sample concepts from the unpacked sets in `source`."""
    for name, (set_name, label, noun) in SUBJECTS.items():
        draw_subject(source, folder / name, set_name, label, noun)
    for name, set_name in STYLES.items():
        draw_style(source, folder / name, set_name)
    print_licences(source, {set_name for set_name, _, _ in SUBJECTS.values()} | set(STYLES.values()))


def write_studied(source: Path, folder: Path) -> None:
    """Draw the concepts of the studies, after fetching what no training has use for."""
    fetch(source, tuple(f"@iconify-json/{set_name}" for set_name in STUDIED_STYLES.values()))
    for name, (set_name, label, noun) in STUDIED.items():
        draw_subject(source, folder / name, set_name, label, noun, kind="webp")
    for name, set_name in STUDIED_STYLES.items():
        draw_style(source, folder / name, set_name, kind="webp")
    for name, technique in TECHNIQUES.items():
        draw_style(source, folder / name, TECHNIQUES_OF, EXAMPLES[:12], kind="webp", technique=technique)
    print_licences(source, {set_name for set_name, _, _ in STUDIED.values()} | set(STUDIED_STYLES.values()))


def print_licences(source: Path, used: set[str]) -> None:
    """For the note beside the pictures."""
    for set_name in sorted(used):
        info = json.loads((source / set_name / "info.json").read_text())
        print(set_name, info["license"]["title"], info["author"]["url"])
