"""Pictures onto the canvas that a base can draw, and what it drew back into them. Sizes are (width, height)."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from finetune.dataset.pixels import decode, open_picture
from finetune.dataset.turning import upright
from finetune.errors import UserError

Given = Image.Image | Path | str  # a picture, or the file that holds it
Size = int | tuple[int, int]  # the short side, or both


@dataclass(frozen=True)
class Picture:
    """A picture as it is to be seen: turned as the camera meant it, its transparency laid on white."""

    image: Image.Image  # RGB
    hidden: Image.Image | None = None  # L, white where it was transparent

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size


def read(given: Given) -> Picture:
    """
    Raises:
        Exception: Pillow raises almost anything on files that are no whole picture, or too large to be meant.
    """
    if isinstance(given, Image.Image):  # through a file, so that all pictures are read alike
        with io.BytesIO() as buffer:
            given.save(buffer, "PNG", exif=given.getexif())
            content = buffer.getvalue()
    else:
        content = Path(given).read_bytes()
    image = decode(content, "#ffffff")
    with open_picture(content) as file:
        turned = upright(file)
        if not turned.has_transparency_data:
            return Picture(image)
        return Picture(image, ImageOps.invert(turned.convert("RGBA").getchannel("A")))


@dataclass(frozen=True)
class Margins:
    """What is added to each side of a picture, in pixels."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    @classmethod
    def parse(cls, text: str) -> Margins:
        """`left=64,right=64`"""
        found = re.findall(r"(left|top|right|bottom)=(\d+)(?:,|$)", text)
        margins = cls(**{side: int(pixels) for side, pixels in found})
        if ",".join(f"{side}={pixels}" for side, pixels in found) != text or len(dict(found)) != len(found):
            raise UserError(f"--extend {text!r}: expected sides and pixels, such as left=64,right=64")
        return margins

    def items(self) -> list[tuple[str, int]]:
        return [(side, getattr(self, side)) for side in ("left", "top", "right", "bottom")]


def parse_size(text: str) -> Size:
    """`512` or `768x512`"""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if match is None or 0 in (width := int(match[1]), height := int(match[2] or match[1])):
        raise UserError(f"--size {text!r}: expected pixels, such as 512 or 768x512")
    return (width, height) if match[2] else width


@dataclass(frozen=True)
class Frame:
    """The canvas that a base draws on."""

    size: Size
    multiple: int  # that each side must be of
    cell: int  # side of the square that one latent stands for

    @classmethod
    def of(cls, pipeline: Any, size: Size | None) -> Frame:
        """
        Args:
            size: asked for; without it, the base's own.

        Raises:
            UserError: the base cannot draw it.
        """
        cell = pipeline.vae_scale_factor
        # A UNet takes single latents, the transformers patches of 2x2; several pipelines insist on whole eights.
        multiple = math.lcm(8, cell if hasattr(pipeline, "unet") else 2 * cell)
        frame = cls(size or _own_size(pipeline), multiple, cell)
        wrong = [side for side in frame.sides if side % frame.multiple]
        if size is not None and wrong:
            nearest = max(frame.multiple, wrong[0] // frame.multiple * frame.multiple)
            raise UserError(
                f"--size: {wrong[0]} is not a multiple of {frame.multiple}, which this base needs. Try {nearest}."
            )
        return frame

    @property
    def sides(self) -> tuple[int, int]:
        """The canvas where no picture is given."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def fit(self, image: Image.Image) -> Image.Image:
        """Scaled without distortion and cut around its middle; by a few pixels, unless both sides were asked for."""
        if isinstance(self.size, int):
            scale = self.size / min(image.size)
            width, height = (max(1, round(side * scale) // self.multiple) * self.multiple for side in image.size)
        else:
            width, height = self.size
        if image.size == (width, height):
            return image
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _own_size(pipeline: Any) -> int:
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    latents = getattr(pipeline, "default_sample_size", None) or denoiser.config.get("sample_size")
    if latents is None:
        return 1024  # Z-Image's pipeline says so itself
    return pipeline.vae_scale_factor * (latents if isinstance(latents, int) else min(latents))


def grow(image: Image.Image, margins: Margins, overlap: int) -> tuple[Image.Image, Image.Image]:
    """A larger canvas whose new part repeats the picture's border, and its mask: white where it is to be painted.

    Args:
        overlap: pixels of the picture beside each new part that are painted over, so that the seam can be blended.
    """
    sides = dict(margins.items())
    widths = ((sides["top"], sides["bottom"]), (sides["left"], sides["right"]))
    canvas = np.pad(np.asarray(image), (*widths, (0, 0)), mode="edge")
    kept = np.zeros((image.height, image.width), dtype=np.uint8)
    seam = {side: overlap if pixels else 0 for side, pixels in sides.items()}
    kept[: seam["top"]] = kept[image.height - seam["bottom"] :] = 255
    kept[:, : seam["left"]] = kept[:, image.width - seam["right"] :] = 255
    return Image.fromarray(canvas), Image.fromarray(np.pad(kept, widths, constant_values=255))


def cover(mask: Image.Image, cell: int) -> Image.Image:
    """The mask grown to whole cells: a latent that is painted in part must be painted."""
    values = np.asarray(mask)
    height, width = values.shape
    cells = values.reshape(height // cell, cell, width // cell, cell).max((1, 3))
    return Image.fromarray(cells.repeat(cell, 0).repeat(cell, 1))


def paste(original: Image.Image, drawn: Image.Image, mask: Image.Image, seam: int) -> Image.Image:
    """What was drawn inside the mask, the original pixel for pixel outside, and a ramp `seam` pixels wide between.

    The ramp lies inside the mask: shrinking by half of it and blurring by the other half never reaches a pixel outside.
    """
    half = seam // 2
    soft = mask.filter(ImageFilter.MinFilter(2 * half + 1)).filter(ImageFilter.BoxBlur(half))
    return Image.composite(drawn, original, soft if soft.getbbox() else mask)
