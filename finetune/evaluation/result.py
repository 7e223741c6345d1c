"""What an evaluation finds: the schema of `evaluation.json`, whose keys are these fields."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.evaluation.copying import CopyLine
from finetune.evaluation.drift import Drift
from finetune.evaluation.encoders import EncoderInfo
from finetune.evaluation.intervals import Score

LEAST = 0.05  # from floor to ceiling: of twenty pictures the floor itself is known to 0.02 to 0.04


@dataclass(frozen=True)
class PictureScores:
    """One picture; a row of `scores.csv`. Dictionaries are by the encoder's name."""

    file: str  # below the evaluation's folder
    kind: str  # see studio.Shot
    prompt: str
    seed: int
    weight: float | None  # of the adapter; none is the base alone
    identity: dict[str, float]  # metrics.identity
    following: dict[str, float]  # metrics.following, of encoders that read
    nearest: str  # the training photo with the highest cosine
    nearest_cosine: float
    copied: bool  # whether that is over the line


@dataclass(frozen=True)
class EncoderScores:
    """What one encoder says. Intervals of `identity`, `following` and `diversity` are over prompts, those of the class
    over its pictures."""

    encoder: str
    identity: Score  # the subject's pictures with the photos: higher is better, up to the ceiling
    floor: float  # metrics.floor: the base's pictures of the class that are nearest to the photos
    ceiling: float | None  # the photos with each other
    following: Score | None  # CLIP-T of the subject's pictures: higher is better, up to the base's
    following_base: float | None  # of the base's pictures of the class in the same prompts
    contrast: Score | None  # metrics.contrast of the subject's pictures: higher is better, up to the base's
    contrast_base: float | None
    diversity: Score | None  # metrics.spread within a prompt; none where each was drawn once
    prior_resemblance: Score  # PRES: the adapter's pictures of the class with the photos; lower is better
    prior_resemblance_base: float
    prior_diversity: Score  # DIV: metrics.spread of the adapter's pictures of the class; higher is better
    prior_diversity_base: float

    @property
    def likeness(self) -> float | None:
        """Identity on the way from floor (0) to ceiling (1)."""
        return likeness(self.identity.value, self.floor, self.ceiling)

    @property
    def kept(self) -> float | None:
        """How much of the base's prompt following is left: the share of its contrast."""
        if self.contrast is None or self.contrast_base is None or self.contrast_base <= 0:
            return None
        return self.contrast.value / self.contrast_base

    @property
    def class_moved(self) -> float | None:
        """The share of the way that pictures of the class went from the base's to the photos of the subject; none where
        there is no such way."""
        end = self.identity.value if self.ceiling is None else self.ceiling
        return likeness(self.prior_resemblance.value, self.prior_resemblance_base, end)


def likeness(identity: float, floor: float, ceiling: float | None) -> float | None:
    """Identity on the way from floor (0) to ceiling (1); none where that is less than `LEAST`."""
    return None if ceiling is None or ceiling - floor < LEAST else (identity - floor) / (ceiling - floor)


@dataclass(frozen=True)
class WeightScore:
    """One weight of the adapter, on some of the prompts."""

    weight: float
    identity: float
    following: float
    contrast: float
    balance: float  # see Sweep


@dataclass(frozen=True)
class Sweep:
    """How strong the adapter should be. `balance` is the harmonic mean of identity on its way from floor to ceiling and
    of contrast as a share of the base's, both within 0 and 1. Of the weights within 0.02 of the highest balance the one
    nearest to 1 is best; where none has any balance, none is."""

    num_prompts: int
    scores: tuple[WeightScore, ...]
    best: float | None


@dataclass(frozen=True)
class Copying:
    """Pictures of the subject that repeat a training photo."""

    line: CopyLine
    num_pictures: int
    copies: tuple[str, ...]  # their files


@dataclass(frozen=True)
class Worst:
    """The prompt whose contrast falls short of the base's by most; without an encoder that reads, of least identity."""

    prompt: str
    file: str  # the worst of its pictures
    contrast: float | None
    contrast_base: float | None
    identity: float


@dataclass(frozen=True)
class Evaluation:
    """One adapter, evaluated."""

    name: str
    adapter: str
    weight: float
    folder: str  # where this was written
    base: str
    subject: str
    class_prompt: str | None
    prompts: str  # the list's name or file
    num_prompts: int
    seeds: int
    steps: int
    guidance: float
    photos: tuple[str, ...]
    photos_held_out: bool  # or else they were trained on
    versions: dict[str, str]
    encoders: tuple[EncoderInfo, ...]
    scores: tuple[EncoderScores, ...]  # of each encoder
    drift: Drift
    copying: Copying | None  # none where no training photos are known
    sweep: Sweep | None  # none without an encoder that reads, a ceiling above the floor, or weights
    worst: Worst
    notes: tuple[str, ...]
    pictures: tuple[PictureScores, ...]
