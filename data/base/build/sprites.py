"""Emoji drawings: fetched by package name, rendered once to a pack of small pictures, read back as one tensor."""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from vocabulary import HELD, HELD_STYLES, STYLES, THINGS
from words import spoken

SIZE = 192  # pixels; a thing that fills the picture is enlarged by a third, most are shrunk


@dataclass(frozen=True)
class Sprite:
    """One drawing of one thing in one style.

    Attributes:
        box: left, top, right, bottom of what is drawn, in the sprite's own coordinates from -1 to 1, y down.
        crown: y of the highest drawn point in the middle fifth of the box, where a hat sits.
        mean: luminance of what is drawn, 0 to 1, the pivot of a recolouring.
    """

    set: str
    label: str
    said: str
    noun: str
    box: tuple[float, float, float, float]
    crown: float
    mean: float


def fetch(folder: Path, packages: tuple[str, ...]) -> None:
    """Unpack the newest release of each npm package into `folder/name`, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        target = folder / package.split("/")[-1]
        if target.exists():
            continue
        name = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()
        with tarfile.open(folder / name) as archive:
            archive.extractall(unpacked := folder / f"{target.name}.unpacked", filter="data")
        (unpacked / "package").rename(target)
        unpacked.rmdir()
        (folder / name).unlink()


def fetch_all(folder: Path) -> None:
    """The four training sets and the held-out ones."""
    fetch(folder, tuple(f"@iconify-json/{name}" for name in (*STYLES, *HELD_STYLES)))


def slug(label: str) -> str:
    """An emojibase label as Iconify spells it: `woman's hat` -> `womans-hat`."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("\u2019", "").replace("ñ", "n")).strip("-")


def drawing(icons: dict, label: str) -> str | None:
    """The SVG of a label in an Iconify set, or None where the set lacks it."""
    key = slug(label)
    keys = key, icons.get("aliases", {}).get(key, {}).get("parent", ""), key.replace("-", "")
    icon = next((icons["icons"][name] for name in keys if name in icons["icons"]), None)
    if icon is None:
        return None
    left, top = (icon.get(k, icons.get(k, 0)) for k in ("left", "top"))
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    )


def rasterize(svg: str) -> Image.Image:
    import resvg_py

    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, skip_system_fonts=True))).convert(
        "RGBA"
    )


def describe(image: Image.Image, name: str, label: str, said: str, noun: str) -> Sprite:
    """Measure the drawing's box, crown and luminance."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    size = pixels.shape[0]
    shape = pixels[..., 3] > 0.5
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    centre, reach = (left + right) // 2, max(1, (right - left) // 10)
    crown = np.flatnonzero(shape[:, centre - reach : centre + reach].any(1))
    mean = float((pixels[..., :3] @ np.float32([0.3, 0.59, 0.11]))[shape].mean())
    edges = (left, top, right, bottom, crown[0] if len(crown) else top)
    left, top, right, bottom, high = (round(float(v) / size * 2 - 1, 3) for v in edges)
    return Sprite(name, label, said, noun, (left, top, right, bottom), high, round(mean, 3))


def wanted() -> list[tuple[str, str, str]]:
    """(label, spoken, class noun) of everything in the vocabulary."""
    return [(*spoken(entry), noun) for noun, (_, entries) in THINGS.items() for entry in entries.split(";")]


def load_icons(source: Path, name: str) -> dict:
    return json.loads((source / name / "icons.json").read_text())


def build_pack(source: Path, target: Path) -> None:
    """Render every wanted label of every training style into `target/sprites.bin` (WebP after WebP) and an index."""
    target.mkdir(parents=True, exist_ok=True)
    index, offset = [], 0
    with (target / "sprites.bin").open("wb") as blob:
        for name in STYLES:
            icons = load_icons(source, name)
            for label, said, noun in wanted():
                assert label.lower() not in HELD, label
                svg = drawing(icons, label)
                if svg is None:
                    continue
                image = rasterize(svg)
                data = io.BytesIO()
                image.save(data, "WEBP", quality=90, method=5)
                index.append(
                    asdict(describe(image, name, label, said, noun)) | {"offset": offset, "bytes": data.tell()}
                )
                offset += blob.write(data.getvalue())
            print(name, len(index), f"{offset / 1e6:.1f} MB", flush=True)
    (target / "index.json").write_text(json.dumps(index))


def make_pack(source: Path, target: Path) -> None:
    """Fetch and render, unless it is done."""
    if not (target / "index.json").exists():
        fetch_all(source)
        build_pack(source, target)


def load_pack(folder: Path) -> tuple[Tensor, list[Sprite]]:
    """uint8 pictures [N, 4, h, w] with straight alpha, and what they show."""
    index, blob = json.loads((folder / "index.json").read_text()), (folder / "sprites.bin").read_bytes()

    def decode(row: dict) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(blob[row["offset"] : row["offset"] + row["bytes"]])).convert("RGBA"))

    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(decode, index))
    sprites = [
        Sprite(**{k: tuple(v) if k == "box" else v for k, v in row.items() if k not in ("offset", "bytes")})
        for row in index
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), sprites


TOYS = [
    "dog face",
    "cat face",
    "bear",
    "pig face",
    "frog",
    "red apple",
    "automobile",
    "house",
    "crown",
    "top hat",
    "sunglasses",
    "balloon",
    "bucket",
    "basket",
    "grinning face",
    "sunflower",
    "turtle",
    "cupcake",
    "bird",
    "star",
    "boy",
    "tulip",
    "ghost",
    "lemon",
]


def toy_pack() -> tuple[Tensor, list[Sprite]]:
    """A handful of plain faces in every training style, for runs without the emoji sets."""
    pictures, sprites, known = [], [], {label: (said, noun) for label, said, noun in wanted()}
    for style, name in enumerate(STYLES):
        for number, label in enumerate(TOYS):
            image = Image.new("RGBA", (SIZE, SIZE))
            draw, hue = ImageDraw.Draw(image), (number * 47) % 200
            draw.ellipse((20, 30, 172, 180 - 10 * style), fill=(255 - hue, 80 + hue // 2, 40 + hue, 255))
            for x in (70, 122):
                draw.ellipse((x - 9, 80, x + 9, 98), fill=(20, 20, 20, 255))
            pictures.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            sprites.append(describe(image, name, label, *known[label]))
    return torch.stack(pictures), sprites
