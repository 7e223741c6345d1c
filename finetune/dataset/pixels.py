"""Any picture file to the pixels that are trained on, with Pillow and NumPy.

Shapes: h w pixels of the file, R the resolution trained on.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Crop:
    """A square of side R cut from the picture after its short side was scaled to R."""

    size: int
    left: int
    top: int
    flip: bool


def decode(content: bytes, background: str) -> Image.Image:
    """An RGB image, turned as the camera meant it, transparency laid on `background`.

    Raises:
        OSError, ValueError, Image.DecompressionBombError: it is no whole picture, or one too large to be meant.
    """
    with Image.open(io.BytesIO(content)) as file:
        # Pillow itself only warns up to twice its limit, and filters of warnings are shared by threads.
        if Image.MAX_IMAGE_PIXELS is not None and file.width * file.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels are more than are safe to unpack")
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16 bits scaled to 8: Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image)
    if image.mode == "F" or values.max() > 65535 or values.min() < 0:
        raise ValueError("its pixels have no known white; save it with 8 or 16 bits a channel")
    gray = Image.fromarray((values / 257).round().astype(np.uint8))
    if "transparency" in image.info:
        gray.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray


def scaled_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Width and height with the short side at `resolution`."""
    scale = resolution / min(width, height)
    return max(resolution, round(width * scale)), max(resolution, round(height * scale))


def cut(image: Image.Image, crop: Crop) -> np.ndarray:
    """The crop's pixels: (3, R, R) float32 in [-1, 1]."""
    image = image.resize(scaled_size(*image.size, crop.size), Image.Resampling.LANCZOS)
    image = image.crop((crop.left, crop.top, crop.left + crop.size, crop.top + crop.size))
    if crop.flip:
        image = ImageOps.mirror(image)
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
