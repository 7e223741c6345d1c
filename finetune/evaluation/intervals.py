"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
Unit = Literal["prompts", "pictures", "subjects"]


@dataclass(frozen=True)
class Score:
    """A mean over units, and its 95 % interval by the percentile bootstrap (Efron 1979); none of a single unit."""

    value: float
    low: float | None
    high: float | None
    num_units: int
    over: Unit  # what was drawn anew: the interval says what other units of this kind would have given

    @classmethod
    def of(cls, values: Sequence[float], over: Unit, groups: Sequence[int] | None = None, seed: int = 0) -> Score:
        """
        Args:
            values: of each picture or subject.
            groups: the unit of each value, such as its prompt; without it each is a unit of its own. Pictures of one
                prompt are alike, so to draw single ones anew would claim too much.
        """
        units = range(len(values)) if groups is None else groups
        table: dict[int, list[float]] = {}
        for unit, value in zip(units, values, strict=True):
            table.setdefault(unit, []).append(value)
        means = np.array([np.mean(found) for found in table.values()])
        if len(means) < 2:
            return cls(float(means.mean()), None, None, len(means), over)
        drawn = np.random.default_rng(seed).integers(0, len(means), (RESAMPLES, len(means)))
        low, high = np.quantile(means[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(float(means.mean()), float(low), float(high), len(means), over)

    def __str__(self) -> str:
        spread = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{spread}"
