"""DreamBooth: a subject bound to a rare word, held in place by its class (https://arxiv.org/abs/2208.12242)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.config import Fraction
from finetune.methods.base import Preserving, methods
from finetune.methods.lora import LoRA

if TYPE_CHECKING:
    import torch

    from finetune.families.base import Family
    from finetune.student import Student


LORA_ONLY = ("variant", "alpha", "factor", "targets", "rank_pattern", "alpha_pattern", "dropout", "export_weight")
WHOLE_ONLY = ("export_energy", "export_checkpoint")


@methods.register
class DreamBooth(Preserving, LoRA):
    """Trains the whole denoiser or a LoRA of it, with the prior-preservation loss."""

    summary = "a subject from 3 to 5 pictures, without forgetting its class: the whole denoiser or a LoRA of it"
    denoiser: Literal["lora", "whole"] = "lora"
    prior: Literal["none", "images", "prediction"] = "images"
    export_energy: Fraction | None = None
    """Whole denoiser: the share of each layer's difference that the small file keeps. Default: `rank`."""
    export_checkpoint: bool = False
    """Whole denoiser: also write the full pipeline."""

    @property
    def export_is_lossy(self) -> bool:
        return self.denoiser == "whole"

    @property
    def takes_quantized(self) -> bool:
        return self.denoiser == "lora" and super().takes_quantized

    def problems(self) -> list[str]:
        problems = super().problems()
        other = LORA_ONLY if self.denoiser == "whole" else WHOLE_ONLY
        needed = "lora" if self.denoiser == "whole" else "whole"
        problems += [
            f"{name}: is for denoiser: {needed}. Remove it."
            for name in other
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        return problems

    def check(self, family: Family) -> None:
        if self.denoiser == "lora":
            super().check(family)
        else:
            self.trained_text_encoders(family)

    def attach(self, family: Family, placeholder: str, learning_rate: float) -> Student:
        if self.denoiser == "lora":
            return super().attach(family, placeholder, learning_rate)
        return self._attach_whole(family, learning_rate)

    def _attach_whole(self, family: Family, learning_rate: float) -> Student:
        from finetune.student import Group, Student

        rates = {family.denoiser_name: learning_rate}
        for name in self.trained_text_encoders(family):
            rates[name] = self.text_encoder_learning_rate or learning_rate
        parts = {name: getattr(family.pipeline, name) for name in rates}
        rests = not self.predicts_class and self.keep_layout is None  # then only the end needs it
        base = {name: _copy(part, rests) for name, part in parts.items()}
        groups = [Group(name, dict(part.named_parameters()), rates[name]) for name, part in parts.items()]
        return Student(self, family, groups, frozen=lambda: _swapped(family, base, rests))

    def export(self, student: Student, folder: Path, dtype: torch.dtype, header: Mapping[str, str]) -> list[Path]:
        if self.denoiser == "lora":
            return super().export(student, folder, dtype, header)
        return self._export_whole(student, folder, dtype, header)

    def _export_whole(
        self, student: Student, folder: Path, dtype: torch.dtype, header: Mapping[str, str]
    ) -> list[Path]:
        """The difference to the base as a LoRA; the student is left holding what the file holds."""
        from finetune.export import save_lora, save_pipeline
        from finetune.lowrank import factor_difference, restore

        family = student.family
        if self.export_checkpoint:
            save_pipeline(family, folder)
        names = [group.name for group in student.groups]
        trained = {name: getattr(family.pipeline, name) for name in names}
        with student.frozen():
            base = {name: getattr(family.pipeline, name).state_dict() for name in names}
        rank = None if self.export_energy is not None else self.rank
        factored = {
            name: factor_difference(part, base[name], rank=rank, energy=self.export_energy)
            for name, part in trained.items()
        }
        for name, part in trained.items():
            restore(part, base[name], factored[name].weights)
        shares = {f"energy_kept.{name}": f"{found.energy:.4f}" for name, found in factored.items()}
        return [
            save_lora({name: found.weights for name, found in factored.items()}, folder, dtype, {**header, **shares})
        ]


def _copy(part: torch.nn.Module, rests: bool) -> torch.nn.Module:
    """A frozen twin, in the base's own precision; where it rests, off the device."""
    from copy import deepcopy

    if rests and next(part.parameters()).is_meta:  # a rehearsal, which counts what is on the device
        return part
    twin = deepcopy(part).requires_grad_(False).eval()
    return twin.to("cpu") if rests else twin


@contextmanager
def _swapped(family: Family, parts: Mapping[str, torch.nn.Module], rests: bool) -> Iterator[None]:
    """The family with other parts, which wait on the CPU where they rest."""
    trained = {name: getattr(family.pipeline, name) for name in parts}
    for name, part in parts.items():
        setattr(family.pipeline, name, part.to(family.device) if rests else part)
    try:
        yield
    finally:
        for name, part in trained.items():
            setattr(family.pipeline, name, part)
            if rests:
                parts[name].to("cpu")
