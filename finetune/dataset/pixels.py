"""Any picture file to the pixels that are trained on, with Pillow and NumPy.

Shapes: h w pixels of a crop, H W its latents. Sizes are (width, height).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

from finetune.dataset.colors import in_srgb
from finetune.dataset.turning import SIDEWAYS, orientation, upright

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"}
Size = tuple[int, int]

# A JPEG of more pixels is unpacked at a half, a quarter or an eighth of its size where that leaves this many times the
# size that is wanted: in a third to a tenth of the time, off by less than one of 256 levels and less than a pixel.
LARGE, ENOUGH = 2**24, 2
JPEGS = ("JPEG", "MPO")
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")  # what such a file calls itself in its first bytes


@dataclass(frozen=True)
class Crop:
    """What is cut from the picture after it was scaled to cover that size."""

    size: Size
    left: int
    top: int
    flip: bool


def decode(content: bytes, background: str, wanted: Size | None = None) -> Image.Image:
    """In sRGB, turned as the camera meant it, transparency laid on `background`; of an animation, the first frame.

    Args:
        wanted: the size that it will be scaled to; a large JPEG may then be unpacked smaller than it is.

    Raises:
        OSError, ValueError, Image.DecompressionBombError: it is no whole picture, or one too large to be meant.
    """
    with open_picture(content) as file:
        if wanted is not None and file.width * file.height > LARGE:
            _shrink(file, wanted)
        return _show(file, background, file.info.get("icc_profile"))


def measure(content: bytes, background: str) -> Size:
    """Width and height of a picture as shown, once it was unpacked to its last row; raises what `decode` does."""
    with open_picture(content) as file:
        size = _turned(file, file.size)
        _shrink(file, (1, 1))
        shown = _show(file, background).size
    return size if file.format in JPEGS else shown


def read_mask(content: bytes) -> Image.Image:
    """A picture as a mask (L): white counts, and so do grays in part; what is transparent is black."""
    with open_picture(content) as file:
        return _show(file, "#000000").convert("L")


def read_alpha(content: bytes) -> Image.Image | None:
    """How opaque a picture is (L), as shown; None where it is so all over."""
    with open_picture(content) as file:
        image = _in_eight_bits(upright(file))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    return None if alpha is None or alpha.getextrema() == (255, 255) else alpha


# What a suffix can mean. Pillow goes by the content and reads more, PostScript for one, which is a program.
KINDS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "HEIF")


def open_picture(content: bytes) -> Image.Image:
    """The file's header; its pixels are unpacked when they are asked for."""
    if content[4:8] == b"ftyp" and any(brand in content[8:64] for brand in HEIC):
        _register_heif()
    Image.init()
    file = Image.open(io.BytesIO(content), formats=[kind for kind in KINDS if kind in Image.OPEN])
    # Pillow itself only warns up to twice its limit, and filters of warnings are shared by threads.
    if Image.MAX_IMAGE_PIXELS is not None and file.width * file.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{file.width} x {file.height} pixels are more than are safe to unpack; make it smaller")
    return file


@lru_cache(maxsize=1)
def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError("HEIC needs another package: pip install 'finetune[heic]', or save it as JPEG") from None
    register_heif_opener()


def _shrink(file: Image.Image, wanted: Size) -> None:
    """Have JPEG's own scaling do most of it; every other format is left alone."""
    width, height = _turned(file, wanted)
    file.draft(None, (ENOUGH * width, ENOUGH * height))  # pyright: ignore[reportArgumentType]


def _turned(file: Image.Image, size: Size) -> Size:
    """A size in the JPEG's own rows and columns as it is shown, and back."""
    width, height = size
    return (height, width) if orientation(file) in SIDEWAYS else size


def _show(file: Image.Image, background: str, profile: bytes | None = None) -> Image.Image:
    image = in_srgb(_in_eight_bits(upright(file)), profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """16 bits scaled to 8: Pillow's own conversion clips everything above 255 to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.max() > 65535 or values.min() < 0:
        raise ValueError("its pixels have no known white; save it with 8 or 16 bits a channel")
    gray = Image.fromarray((values / 257).round().astype(np.uint8))
    if "transparency" in image.info:
        gray.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray


def scaled_size(width: int, height: int, size: Size) -> Size:
    """Width and height of a picture that is just large enough for a crop of that size."""
    scale = max(size[0] / width, size[1] / height)
    return max(size[0], round(width * scale)), max(size[1], round(height * scale))


def cut(image: Image.Image, scaled: Size, crop: Crop) -> np.ndarray:
    """The crop's pixels, of the picture scaled: (3, h, w) float32 in [-1, 1]."""
    shown = _cut(image.resize(scaled, Image.Resampling.LANCZOS), crop)
    return np.asarray(shown, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def cut_mask(mask: Image.Image, scaled: Size, crop: Crop, cell: int) -> np.ndarray:
    """How much of each cell of the crop's pixels a mask (L) covers, by area: (1, H, W) float32 in [0, 1].

    Args:
        cell: side of the square that one latent stands for.
    """
    shown = np.asarray(_cut(mask.resize(scaled, Image.Resampling.BOX), crop), dtype=np.float32)
    height, width = shown.shape
    return shown.reshape(1, height // cell, cell, width // cell, cell).mean((2, 4)) / 255


def _cut(image: Image.Image, crop: Crop) -> Image.Image:
    width, height = crop.size
    image = image.crop((crop.left, crop.top, crop.left + width, crop.top + height))
    return ImageOps.mirror(image) if crop.flip else image
