"""Shapes of one number of pixels, and which of them each step has.

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from finetune.dataset.pixels import Size

if TYPE_CHECKING:
    from datasets import Dataset

LONGEST = 2  # times the short side; what is longer still is cropped to that
PARTS = 16  # of the square's side: the sides of all shapes are so many of them, more or less
_STEPS = 2  # a stream of random numbers beside those of dataset.draws


def sizes(resolution: int, multiple: int) -> list[Size]:
    """The square, then ever longer shapes that are no larger, lying and standing.

    At 1024 all of them are among those that SDXL was trained at (2307.01952, appendix I).

    Args:
        multiple: what the base needs its sides to be a multiple of.
    """
    unit = multiple * max(1, round(resolution / PARTS / multiple))
    found, long = [(resolution, resolution)], resolution // unit * unit + unit
    while (short := resolution**2 // long // unit * unit) * LONGEST >= long:
        found += [(long, short), (short, long)]
        long += unit
    return found


class Shapes:
    """A step's samples are of one shape, so that they make one tensor however they are shared out.

    A round has as many steps as there are pictures, each shape as many as it has pictures,
    in random order; a shape's pictures take turns in its steps. So all pictures are seen
    equally often, and those of a shape that has fewer than a step needs are seen several
    times in it: none is dropped and none is distorted.

    Args:
        rows: the concept's pictures.
        group: samples of a step.
    """

    def __init__(self, rows: Dataset, resolution: int, multiple: int, group: int):
        self.rows = rows
        self.sizes = sizes(resolution, multiple)
        self.group = group

    def assign(self, rows: Dataset) -> np.ndarray:
        """The shape whose ratio is nearest to each picture's own: (N,), places in `sizes`."""
        ratios = np.log(np.array(rows["width"]) / np.array(rows["height"]))
        known = np.array([math.log(width / height) for width, height in self.sizes])
        return np.abs(ratios[:, None] - known).argmin(1)

    def at(self, seed: int, position: int) -> tuple[int, int]:
        """The shape of a sample, as a place in `sizes`, and the sample's place among all of that shape."""
        step, place = divmod(position, self.group)
        number, offset = divmod(step, sum(self._counts))
        shapes, ranks = _round(self._counts, seed, number)
        shape = int(shapes[offset])
        return shape, (number * self._counts[shape] + int(ranks[offset])) * self.group + place

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        """How many pictures each shape has, by their weights."""
        counts = np.bincount(self.assign(self.rows), np.array(self.rows["weight"]), len(self.sizes))
        return tuple(int(count) for count in counts)


@lru_cache(maxsize=8)
def _round(counts: tuple[int, ...], seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Each step's shape, and how many steps of the round had it before: two of (sum of counts,)."""
    every = np.repeat(np.arange(len(counts)), counts)
    shapes = np.random.default_rng([seed, _STEPS, number]).permutation(every)
    ranks = np.empty_like(shapes)
    for shape, count in enumerate(counts):
        ranks[shapes == shape] = np.arange(count)
    return shapes, ranks
