"""What training has learnt that holds for pictures which it never saw: the loss on them, and how alike drawn ones are.

Noise and times are fixed, so that two measurements differ by the weights alone. With few
pictures the loss turns before what is drawn looks its best: it says where overfitting begins,
and the drawn pictures say which step is the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from finetune.batch import Encoder
from finetune.dataset import Draw, Picture, Pictures
from finetune.evaluation.metrics import balance
from finetune.recipe import Recipe
from finetune.student import Student, predict

LEVELS = 9
RISE = 0.02  # of the loss above its lowest point, from which on it has turned and does not only tremble


@dataclass(frozen=True)
class Measured:
    """Mean squared errors after a step."""

    step: int
    levels: tuple[float, ...]  # from the least noise to the most

    @property
    def mean(self) -> float:
        return sum(self.levels) / len(self.levels)

    @property
    def numbers(self) -> dict[str, float]:
        """By the names that trackers know."""
        levels = {f"validation_loss/level_{number}": value for number, value in enumerate(self.levels, start=1)}
        return {"validation_loss/mean": self.mean, **levels}


@dataclass(frozen=True)
class Judged:
    """The validation pictures after a step."""

    step: int
    identity: float  # mean cosine with the held-out pictures
    prompt: float | None  # how much more they show their own prompts than the others
    ceiling: float | None  # identity of real pictures of the subject

    @property
    def numbers(self) -> dict[str, float]:
        """By the names that trackers know."""
        found = {"validation_score/identity": self.identity, "validation_score/prompt": self.prompt}
        return {name: value for name, value in found.items() if value is not None}

    def quality(self, base: Judged) -> float:
        """From 0 to 1: the harmonic mean of how far identity is on the way from the base's to that of real pictures,
        and how much of the base's prompt following is kept. It is low as soon as one of them is."""
        way = 1.0 if self.ceiling is None else self.ceiling - base.identity
        shares = [(self.identity - base.identity) / way if way > 0 else 0.0]
        if self.prompt is not None and base.prompt is not None and base.prompt > 0:
            shares.append(self.prompt / base.prompt)
        return balance(*shares)


class Validation:
    """Pictures that are held out, and all that was measured on them.

    Args:
        pictures: drawn once for each level, without what varies them in training.
    """

    @classmethod
    def find(cls, recipe: Recipe[Any], held_out: Sequence[Picture]) -> Validation | None:
        """That of a recipe; none where no picture is held out."""
        if not held_out:
            return None
        return cls(Pictures.from_pictures(held_out, recipe.dataset, recipe.placeholder), recipe.train.seed)

    def __init__(self, pictures: Pictures, seed: int):
        settings = {"caption_dropout": 0.0, "shuffle_tags": False, "crop": "center", "flip": False, "mask": "none"}
        plain = Pictures(pictures.rows, pictures.config.model_copy(update=settings), pictures.placeholder)
        count = len(plain)
        self.levels = [[plain.draw(seed, level * count + i) for i in range(count)] for level in range(LEVELS)]
        self.found: list[Measured] = []
        self.judged: list[Judged] = []
        self.best_weights: dict[str, Tensor] | None = None  # by the judge

    @property
    def draws(self) -> list[Draw]:
        return [draw for draws in self.levels for draw in draws]

    @property
    def lowest(self) -> Measured:
        """That of the lowest loss, the first of equals."""
        return min(self.found, key=lambda measured: measured.mean)

    @property
    def best(self) -> Judged | None:
        """That of the best pictures, the first of equals; none where no others can be told from it."""
        if len(self.judged) < 3:  # the base, and two to choose from
            return None
        return max(self.judged[1:], key=lambda judged: judged.quality(self.judged[0]))

    @property
    def waiting(self) -> int:
        """How often was looked since there was anything better: at pictures, or without a judge at the loss."""
        if self.best is not None:
            return len(self.judged) - 1 - self.judged.index(self.best)
        return 0 if self.judged else len(self.found) - 1 - self.found.index(self.lowest)

    def measure(self, student: Student, encoder: Encoder, step: int, autocast: AbstractContextManager[Any]) -> Measured:
        """The loss of the student as it is."""
        with student.family.looking(), autocast:
            levels = torch.stack([_error(student, encoder, draws, i) for i, draws in enumerate(self.levels)])
        self.found.append(Measured(step, tuple(levels.tolist())))
        return self.found[-1]

    def judge(self, judged: Judged, student: Student) -> None:
        """Keep what was said of the student's pictures, and its weights if there were no better ones."""
        self.judged.append(judged)
        if judged.step and self.best in (None, judged):
            self.best_weights = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}

    def verdict(self) -> str:
        """In one line: where overfitting began, if it did."""
        best, last = self.lowest, self.found[-1]
        if best.step == 0:
            return f"the loss on held-out pictures never fell below the base's {best.mean:.4f}: it learnt those it saw"
        if last.mean > (1 + RISE) * best.mean:
            return (
                f"overfitting began after step {best.step}: there the loss on held-out pictures was {best.mean:.4f}, "
                f"after step {last.step} it is {last.mean:.4f}"
            )
        return f"no overfitting until step {last.step}: the loss on held-out pictures is {last.mean:.4f}"

    def state(self) -> dict[str, Any]:
        found = [{"step": measured.step, "levels": list(measured.levels)} for measured in self.found]
        return {"found": found, "judged": [vars(judged) for judged in self.judged], "weights": self.best_weights}

    def resume(self, state: dict[str, Any]) -> None:
        self.found = [Measured(entry["step"], tuple(entry["levels"])) for entry in state["found"]]
        self.judged = [Judged(**entry) for entry in state["judged"]]
        self.best_weights = state["weights"]


def _error(student: Student, encoder: Encoder, draws: Sequence[Draw], level: int) -> Tensor:
    """The mean squared error at a level's noise: ()."""
    objective = student.family.objective
    batch = encoder.encode(draws, num_prior=0)
    time = objective.time_at(torch.full((len(draws),), (level + 0.5) / LEVELS)).to(batch.time)
    batch = replace(batch, time=time)
    target = objective.target(batch.latents, batch.noise, batch.time)
    return cast(Tensor, (predict(student.family, batch) - target).square().mean())
