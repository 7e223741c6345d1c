"""Which picture, caption, crop and noise a step sees: a function of (seed, position) and nothing else.

Position counts samples from the start of training, over all processes, so a
resumed run continues exactly, and two processes see what one would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.dataset.pixels import Crop, cut, decode, scaled_size
from finetune.dataset.scan import Picture
from finetune.dataset.settings import DatasetConfig

if TYPE_CHECKING:
    from datasets import Dataset

# Streams keep the draws of different things independent of each other.
CONCEPT, PRIOR = 0, 1
_ORDER, _SAMPLE = 0, 1


@dataclass(frozen=True)
class Draw:
    """One sample of one step, before any pixel is read."""

    path: str
    sha256: str
    caption: str
    width: int  # of the picture
    height: int
    crop: Crop
    background: str
    seed: int  # of the sample's latents, noise and time

    @property
    def key(self) -> tuple[str, Crop, str]:
        """What its latents depend on, beside the encoder."""
        return self.sha256, self.crop, self.background

    @property
    def geometry(self) -> tuple[int, int, int, int, int, int]:
        """The picture's own h, w; the crop's top, left after scaling; h, w of what is trained: pixels."""
        size, left = self.crop.size, self.crop.left
        if self.crop.flip:
            left = scaled_size(self.width, self.height, size)[0] - size - left
        return self.height, self.width, self.crop.top, left, size, size

    def pixels(self) -> np.ndarray:
        """(3, R, R) float32 in [-1, 1], R the resolution."""
        return cut(decode(Path(self.path).read_bytes(), self.background), self.crop)


class Pictures:
    """Checked pictures as a Hugging Face dataset, drawn in a new random order each time round."""

    def __init__(self, rows: Dataset, config: DatasetConfig, placeholder: str, stream: int = CONCEPT):
        self.rows = rows
        self.config = config
        self.placeholder = placeholder
        self.stream = stream

    @classmethod
    def from_pictures(cls, pictures: Sequence[Picture], config: DatasetConfig, placeholder: str) -> Pictures:
        from datasets import Dataset

        return cls(Dataset.from_list([asdict(picture) for picture in pictures]), config, placeholder)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _members(self) -> np.ndarray:
        """What one time round shows: each picture as often as its weight says."""
        return np.repeat(np.arange(len(self)), np.array(self.rows["weight"]))

    def as_prior(self, caption: str) -> Pictures:
        """The same pictures under one caption, drawn independently of the concept's."""
        rows = self.rows.map(lambda row: {"captions": [caption]}, keep_in_memory=True)
        return Pictures(rows, self.config, "", PRIOR)

    def draw(self, seed: int, position: int) -> Draw:
        epoch, offset = divmod(position, len(self._members))
        row = self.rows[int(self._members[_order(len(self._members), seed, self.stream, epoch)[offset]])]
        random = np.random.default_rng([seed, self.stream, _SAMPLE, position])
        template = row["captions"][random.integers(len(row["captions"]))]
        return Draw(
            path=row["path"],
            sha256=row["sha256"],
            caption=template.replace("{}", self.placeholder),
            width=row["width"],
            height=row["height"],
            crop=self._crop(row["width"], row["height"], random),
            background=self.config.background,
            seed=int(random.integers(2**63)),
        )

    def _crop(self, width: int, height: int, random: np.random.Generator) -> Crop:
        size = self.config.resolution
        slack = np.subtract(scaled_size(width, height, size), size)
        left, top = random.integers(slack + 1) if self.config.crop == "random" else slack // 2
        return Crop(size, int(left), int(top), flip=self.config.flip and bool(random.integers(2)))


@lru_cache(maxsize=8)
def _order(size: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, _ORDER, epoch]).permutation(size)
