"""Colors as every model knows them: a picture with another profile than sRGB is converted by it."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's space -> the mode of its pixels
NEAR = 2  # of 256 levels: closer profiles are sRGB under another name, whose pixels stay what they are
GRID = 17  # levels of each channel that are compared


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture in sRGB; as it is without a profile, with one that is sRGB's, or one that cannot be used."""
    if not profile:
        return image
    try:
        return _convert(image, profile)
    except Exception:  # a profile is data from anywhere, and the pixels are whole without it
        return image


def profile_damage(image: Image.Image) -> str:
    """Why a picture's profile cannot be used, if it has one that cannot."""
    profile = image.info.get("icc_profile")
    if not profile:
        return ""
    try:
        _convert(image.resize((1, 1), Image.Resampling.NEAREST), profile)
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def _convert(image: Image.Image, profile: bytes) -> Image.Image:
    mode, transform = _transform(profile)
    if (image.mode == "CMYK") != (mode == "CMYK") or (mode == "L" and image.mode not in ("L", "LA", "1")):
        raise ValueError(f"it is for {mode} and the pixels are {image.mode}")
    if transform is None:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    plain = image.convert("RGBA").convert("RGB") if alpha and mode == "RGB" else image
    shown = ImageCms.applyTransform(plain.convert(mode), transform)
    assert shown is not None
    if alpha is not None:
        shown.putalpha(alpha)
    return shown


@lru_cache(maxsize=32)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that it takes, and nothing where it would change nothing that can be seen."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    about: Any = source.profile
    space = about.xcolor_space.strip()
    mode = MODES.get(space)
    if mode is None:
        raise ValueError(f"it is for {space} and not for pictures")
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    if mode == "CMYK":
        return mode, transform
    levels = np.linspace(0, 255, GRID).round().astype(np.uint8)
    colors = np.stack(np.meshgrid(*[levels] * 3), -1).reshape(GRID, -1, 3)
    before = Image.fromarray(colors) if mode == "RGB" else Image.fromarray(levels[None])
    after = ImageCms.applyTransform(before, transform)
    change = np.abs(np.asarray(after, dtype=int) - np.asarray(before.convert("RGB"), dtype=int))
    return mode, None if change.max() <= NEAR else transform
