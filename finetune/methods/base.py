"""What is trained, by which loss, and what is written out.

A method is a section of the recipe that can act: its fields are its settings.
So that a recipe is checked without importing torch, a method's file imports it
inside the functions that compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from finetune.config import PositiveInt, Section, Text
from finetune.errors import UserError
from finetune.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finetune.batch import Batch
    from finetune.families.base import Family
    from finetune.student import Student


@dataclass(frozen=True)
class Prior:
    """What the class half of a batch is made of."""

    source: Literal["images", "prediction"]
    prompt: str
    count: int  # of images


class Method(Section, ABC):
    """A way to teach a frozen family a concept. One subclass for each method."""

    summary: ClassVar[str]
    name: str
    keep_layout: Annotated[float, Field(gt=0, le=1)] | None = None
    """Where a picture is noisier than this share, which is where its layout is decided, learn what the base itself
    predicts for the caption."""

    @property
    def trains_text(self) -> bool:
        """Whether prompts must be encoded anew at every step."""
        return False

    @property
    def trains_word(self) -> bool:
        """Whether the placeholder gets vectors of its own, so that every caption must have it."""
        return False

    @property
    def own_rates(self) -> dict[str, float]:
        """Learning rates beside the recipe's, by the name of their setting."""
        return {}

    @property
    def export_is_lossy(self) -> bool:
        """Whether the small file holds less than what was trained; the student then holds what the file holds."""
        return False

    @property
    def takes_quantized(self) -> bool:
        """Whether it learns beside the base's weights alone, whatever they are packed in."""
        return True

    @property
    def prior_half(self) -> Prior | None:
        """What is trained beside the concept so that its class stays what it was."""
        return None

    @property
    def predicts_class(self) -> bool:
        """Whether that is held to the base's own prediction, and there are no class images."""
        return False

    @abstractmethod
    def attach(self, family: Family, placeholder: str, learning_rate: float) -> Student:
        """Make the family trainable; the student's parameters are exactly what is trained, in float32."""

    def losses(self, student: Student, batch: Batch) -> Tensor:
        """The weighted error of each sample: (B,)."""
        import torch

        from finetune.objectives import noisier
        from finetune.student import denoising_errors, frozen_prediction

        held, prior = batch.num_held, batch.num_prior * self.predicts_class
        if not held and not prior:
            return denoising_errors(student.family, batch)
        objective = student.family.objective
        target = objective.target(batch.latents, batch.noise, batch.time).clone()
        base = frozen_prediction(student, batch.ends(held, prior))
        target[len(target) - prior :] = base[held:]
        if self.keep_layout is not None:
            noisy = noisier(objective, batch.time[:held], self.keep_layout).view(-1, 1, 1, 1)
            target[:held] = torch.where(noisy, base[:held], target[:held])
        return denoising_errors(student.family, batch, target)

    def check(self, family: Family) -> None:
        """Raises: UserError, for settings that do not fit the family."""

    def reduce(self, losses: Tensor, num_prior: int) -> Tensor:
        """(B,) losses to the scalar that is minimised."""
        return losses.mean()

    def after_step(self, student: Student) -> None:
        """Called after each optimizer update."""

    @abstractmethod
    def export(self, student: Student, folder: Path, dtype: torch.dtype, header: Mapping[str, str]) -> list[Path]:
        """Write the small files, each with `header` in its metadata."""

    def problems(self) -> list[str]:
        """Settings that cannot go together."""
        return []

    @model_validator(mode="after")
    def _check(self) -> Method:
        if problems := self.problems():
            raise UserError(problems)
        return self


class Preserving(Method):
    """A method that can keep the class what it was, by the prior-preservation loss (2208.12242, section 3.3)."""

    prior: Literal["none", "images", "prediction"] = "none"
    """`images` made by the base, its `prediction` on the class prompt (no images needed), or `none`."""
    class_prompt: Text | None = None
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    num_class_images: PositiveInt = 100

    @property
    def prior_half(self) -> Prior | None:
        if self.prior == "none" or self.class_prompt is None:
            return None
        return Prior(self.prior, self.class_prompt, self.num_class_images)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.prior != "none" and self.class_prompt is None:
            problems.append(f"class_prompt: prior: {self.prior} needs it, such as 'a dog'. Add it, or set prior: none.")
        return problems

    @property
    def predicts_class(self) -> bool:
        return self.prior == "prediction"

    def reduce(self, losses: Tensor, num_prior: int) -> Tensor:
        """mean(subject) + prior_weight * mean(prior); no prior samples, no prior term."""
        subject, prior = losses[: len(losses) - num_prior], losses[len(losses) - num_prior :]
        if num_prior == 0:
            return subject.mean()
        return subject.mean() + self.prior_weight * prior.mean()


methods: Registry[Method] = Registry("method", "finetune.methods")
