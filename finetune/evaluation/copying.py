"""Pictures that repeat a training photo, told by a line that is drawn anew for each set of photos."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from finetune.evaluation.encoders import Encoder

CROPPED = 0.9  # of a side
JPEG_QUALITY = 60


@dataclass(frozen=True)
class CopyLine:
    """The cosine with its nearest training photo from which a picture counts as a copy.

    It lies half way between two measurements on the photos themselves: how alike any two of them are at most, which
    is what honest pictures of one subject can reach, and how alike a photo is at least to itself after a mirroring, a
    crop to 0.9 of its sides or a JPEG of quality 60. On the seven sample concepts and their own CLIP the first is
    0.51 to 0.71, the second 0.86 to 0.94.

    Where the photos resemble each other as much as their own copies do, nothing could be told: `line` is above 1.

    A prompt that says what a photo's caption says asks for that photo's like, and may come near the line honestly.
    """

    line: float
    most_alike: float  # cosine of the two most similar photos
    least_copy: float  # lowest cosine of a photo with its changed copies

    @classmethod
    def calibrate(cls, photos: Sequence[Image.Image], encoder: Encoder) -> CopyLine:
        seen = encoder.see(photos)
        alike = (seen @ seen.T).fill_diagonal_(-1.0)
        most = float(alike.max()) if len(photos) > 1 else 0.0
        changed = [(seen * encoder.see([change(photo) for photo in photos])).sum(1) for change in (mirror, crop, jpeg)]
        least = float(torch.stack(changed).min())
        return cls((most + least) / 2 if most < least else 2.0, most, least)

    def crossed(self, nearest: Tensor) -> Tensor:
        """Which of the cosines (N,) with the nearest training photo are those of copies: (N,) booleans."""
        return nearest >= self.line


def mirror(photo: Image.Image) -> Image.Image:
    return ImageOps.mirror(photo)


def crop(photo: Image.Image) -> Image.Image:
    width, height = photo.size
    left, top = (round(side * (1 - CROPPED) / 2) for side in photo.size)
    return photo.crop((left, top, width - left, height - top))


def jpeg(photo: Image.Image) -> Image.Image:
    with io.BytesIO() as buffer:
        photo.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
        return Image.open(buffer).convert("RGB")
