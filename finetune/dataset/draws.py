"""Which picture, caption, crop and noise a step sees: a function of (seed, position) and nothing else.

Position counts samples from the start of training, over all processes, so a
resumed run continues exactly, and two processes see what one would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.dataset.buckets import Shapes
from finetune.dataset.pixels import Crop, Size, cut, cut_mask, decode, read_alpha, read_mask, scaled_size
from finetune.dataset.scan import Picture
from finetune.dataset.settings import DatasetConfig
from finetune.errors import UserError

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
    mask: str = ""  # a file; the picture itself where its transparency is meant; none where all of it counts
    mask_sha256: str = ""

    @property
    def key(self) -> tuple[str, Crop, str]:
        """What its latents depend on, beside the encoder."""
        return self.sha256, self.crop, self.background

    @property
    def geometry(self) -> tuple[int, int, int, int, int, int]:
        """The picture's own h, w; the crop's top, left after scaling; h, w of what is trained: pixels."""
        (width, height), left = self.crop.size, self.crop.left
        if self.crop.flip:
            left = self._scaled[0] - width - left
        return self.height, self.width, self.crop.top, left, height, width

    @property
    def mask_key(self) -> tuple[str, Crop]:
        """What its mask depends on."""
        return self.mask_sha256, self.crop

    @property
    def _scaled(self) -> Size:
        return scaled_size(self.width, self.height, self.crop.size)

    def pixels(self) -> np.ndarray:
        """(3, h, w) float32 in [-1, 1], of the crop."""
        content = _read(self.path, self.sha256)
        return cut(decode(content, self.background, self._scaled), self._scaled, self.crop)

    def coverage(self, cell: int) -> np.ndarray:
        """How much of each cell of pixels its mask covers, all without a mask: (1, h / cell, w / cell), 0 to 1."""
        if not self.mask:
            width, height = self.crop.size
            return np.ones((1, height // cell, width // cell), dtype=np.float32)
        content = _read(self.mask, self.mask_sha256)
        mask = read_alpha(content) if self.mask == self.path else read_mask(content)
        assert mask is not None
        return cut_mask(mask, self._scaled, self.crop, cell)


def _read(path: str, sha256: str) -> bytes:
    """A file that is still what it was when it was checked."""
    content = Path(path).read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path}: has changed since the run began. Put it back and use --resume, or start anew.")
    return content


class Pictures:
    """Checked pictures as a Hugging Face dataset, drawn in a new random order each time round."""

    def __init__(
        self,
        rows: Dataset,
        config: DatasetConfig,
        placeholder: str,
        stream: int = CONCEPT,
        shapes: Shapes | None = None,  # without them all is square
    ):
        self.rows = rows
        self.config = config
        self.placeholder = placeholder
        self.stream = stream
        self.shapes = shapes

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
        """The same pictures under one caption and without masks, drawn independently of the concept's."""
        told = {"captions": [caption], "mask": "", "mask_sha256": ""}
        rows = self.rows.map(lambda row: told, keep_in_memory=True)
        config = self.config.model_copy(update={"shuffle_tags": False, "caption_dropout": 0.0})
        return Pictures(rows, config, "", PRIOR)

    def within(self, shapes: Shapes) -> Pictures:
        """The same pictures, each step's in the shape that it has."""
        return Pictures(self.rows, self.config, self.placeholder, self.stream, shapes)

    def draw(self, seed: int, position: int) -> Draw:
        size, members, place, salt = self._find(seed, position)
        epoch, offset = divmod(place, len(members))
        row = self.rows[int(members[_order(len(members), seed, self.stream, epoch, salt)[offset]])]
        random = np.random.default_rng([seed, self.stream, _SAMPLE, position])
        template = row["captions"][random.integers(len(row["captions"]))]
        crop = self._crop(row["width"], row["height"], size, random)
        sample = int(random.integers(2**63))
        return Draw(
            path=row["path"],
            sha256=row["sha256"],
            caption=self._vary(template, random).replace("{}", self.placeholder),
            width=row["width"],
            height=row["height"],
            crop=crop,
            background=self.config.background,
            seed=sample,
            mask=row["mask"],
            mask_sha256=row["mask_sha256"],
        )

    def _vary(self, template: str, random: np.random.Generator) -> str:
        """Drawn last, so that these settings change captions and nothing else."""
        if random.random() < self.config.caption_dropout:
            return ""
        return shuffle(template, self.config.keep_tags, random) if self.config.shuffle_tags else template

    def _find(self, seed: int, position: int) -> tuple[Size, np.ndarray, int, tuple[int, ...]]:
        """A sample's size, the pictures that take turns in it, whose turn it is, and what tells their order apart."""
        if self.shapes is None:
            return (self.config.resolution, self.config.resolution), self._members, position, ()
        shape, place = self.shapes.at(seed, position)
        members = self._by_shape.get(shape, self._members)
        if len(members) == len(self._members):  # class images are square, and are cropped to any shape
            return self.shapes.sizes[shape], members, position, ()
        return self.shapes.sizes[shape], members, place, (shape,)

    @cached_property
    def _by_shape(self) -> dict[int, np.ndarray]:
        assert self.shapes is not None
        shapes = self.shapes.assign(self.rows)[self._members]
        return {int(shape): self._members[shapes == shape] for shape in np.unique(shapes)}

    def _crop(self, width: int, height: int, size: Size, random: np.random.Generator) -> Crop:
        slack = np.subtract(scaled_size(width, height, size), size)
        left, top = random.integers(slack + 1) if self.config.crop == "random" else slack // 2
        return Crop(size, int(left), int(top), flip=self.config.flip and bool(random.integers(2)))


def shuffle(caption: str, keep: int, random: np.random.Generator) -> str:
    """The caption's tags in a random order, but for the first ones."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    return ", ".join([*tags[:keep], *random.permutation(tags[keep:])])


@lru_cache(maxsize=32)
def _order(size: int, seed: int, stream: int, epoch: int, salt: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([seed, stream, _ORDER, epoch, *salt]).permutation(size)
