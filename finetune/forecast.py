"""What a run will make and write: shapes of pictures, class images, checkpoints and files, in numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.dataset.health import MULTIPLE, trained_size
from finetune.dataset.pixels import Size
from finetune.dataset.scan import Picture
from finetune.outline import Outline
from finetune.recipe import Recipe
from finetune.request import cache_folder, foreseen
from finetune.tally import tally

BYTES_A_PIXEL = 2  # of a PNG; a file of noise has 3
# What an optimizer keeps of each weight, in bytes; of others nothing is known.
STATE = {"adamw": 8, "torch.optim.AdamW": 8, "adamw_8bit": 2, "prodigy": 16, "torch.optim.SGD": 0}


@dataclass(frozen=True)
class ClassImages:
    """Those that hold the class, by how they come to be there."""

    wanted: int
    there: int | None  # None where it cannot be known yet

    def __str__(self) -> str:
        if self.there is None:
            return "made by the base unless they are there from an earlier run"
        if self.there >= self.wanted:
            return "all of them there"
        return f"{self.there or 'none'} of them there, {self.wanted - self.there} to be made by the base"


@dataclass(frozen=True)
class Disk:
    """Bytes that are written, at the fullest moment."""

    trained: int | None  # weights; None where it cannot be known without the base
    checkpoint: int  # one
    num_checkpoints: int  # at one time: a new one is whole before an old one goes
    files: int  # what is exported
    samples: int
    class_images: int

    @property
    def output(self) -> int:
        """All in the run's folder."""
        return self.checkpoint * self.num_checkpoints + self.files + self.samples

    def __str__(self) -> str:
        kept = f"{self.num_checkpoints} checkpoints of {size(self.checkpoint)} at a time" if self.checkpoint else ""
        parts = [kept * bool(self.num_checkpoints), f"files of {size(self.files)}" * bool(self.files)]
        parts += [f"validation pictures of {size(self.samples)}" * bool(self.samples)]
        parts += [f"class images of {size(self.class_images)} in the cache" * bool(self.class_images)]
        return ", ".join(filter(None, parts)) or "little"


@dataclass(frozen=True)
class Forecast:
    """All of it."""

    shapes: Mapping[Size, int]  # width, height -> pictures
    masked: int  # pictures of which a part is learnt
    unmasked_weight: float
    class_images: ClassImages | None
    disk: Disk

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        shapes = [{"width": w, "height": h, "pictures": count} for (w, h), count in self.shapes.items()]
        masks = {"pictures": self.masked, "unmasked_weight": self.unmasked_weight} if self.masked else None
        made = self.class_images and vars(self.class_images)
        return {
            "shapes": shapes,
            "masks": masks,
            "class_images": made,
            "disk": {**vars(self.disk), "output": self.disk.output},
        }


def forecast(recipe: Recipe[Any], pictures: Sequence[Picture], base: Outline | None) -> Forecast:
    """What is known before the base is loaded; less where the base is not on this machine."""
    multiple = base.multiple if base else MULTIPLE
    sizes = Counter(trained_size(picture.width, picture.height, recipe.dataset, multiple) for picture in pictures)
    shapes = dict(sorted(sizes.items(), key=lambda entry: entry[0][0] / entry[0][1]))
    made = _class_images(recipe, base)
    masked = sum(bool(picture.mask) for picture in pictures)
    return Forecast(shapes, masked, recipe.dataset.unmasked_weight, made, _disk(recipe, base, made))


def size(count: int) -> str:
    """Bytes for people."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:,.1f} {unit}"
    return f"{count} bytes"


def _class_images(recipe: Recipe[Any], base: Outline | None) -> ClassImages | None:
    prior = recipe.method.prior_half
    if prior is None or prior.source != "images":
        return None
    if base is None or not base.has("scheduler"):
        return ClassImages(prior.count, None)
    missing = foreseen(recipe, prior, base).missing(cache_folder(), prior.count)
    return ClassImages(prior.count, prior.count - len(missing))


def _disk(recipe: Recipe[Any], base: Outline | None, made: ClassImages | None) -> Disk:
    train, every = recipe.train, recipe.train.checkpoint_every
    image = BYTES_A_PIXEL * recipe.dataset.resolution**2
    counted = tally(recipe, base) if base else None
    each = 4 + STATE.get(train.optimizer, 0) + 4 * (train.ema is not None)
    files = 0
    if counted is not None:
        whole = getattr(recipe.method, "export_checkpoint", False)
        files = counted.exported * (4 if recipe.output.dtype == "float32" else 2) + 2 * counted.trained * whole
    return Disk(
        trained=counted and counted.trained,
        checkpoint=each * (counted.trained if counted else 0),
        num_checkpoints=min(math.ceil(train.steps / every), train.keep_checkpoints + 1) if every else 0,
        files=files,
        samples=len(recipe.validation.prompts) * num_rounds(recipe) * image,
        class_images=(made.wanted - (made.there or 0)) * image if made else 0,
    )


def num_rounds(recipe: Recipe[Any]) -> int:
    """How often the validation prompts are drawn: before, at each multiple of `every`, and after."""
    steps, every = recipe.train.steps, recipe.validation.every or recipe.train.steps
    return 1 + math.ceil(steps / every)
