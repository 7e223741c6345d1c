"""What goes out: the small files, and the proof that they hold what was learnt."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import __version__
from finetune.architectures import from_pipeline
from finetune.base import load_family
from finetune.errors import UserError, reason
from finetune.export import Verdict, compare, probe
from finetune.families.base import Family
from finetune.load import load_adapters
from finetune.recipe import Recipe
from finetune.shortage import OutOfMemory, explained
from finetune.stopping import Stopped
from finetune.trainer import Trainer

SANE = 10.0  # times the base's predictions: an adapter that makes more of them is broken


class Delivery:
    """A trainer's adapter as files."""

    def __init__(self, recipe: Recipe[Any], trainer: Trainer, prompts: Sequence[str]):
        self.recipe = recipe
        self.trainer = trainer
        self.student = trainer.student
        self.family = trainer.student.family
        self.prompts = prompts[:2] or [recipe.placeholder]

    def probe(self, family: Family) -> Tensor:
        """Predictions on fixed inputs, by which models are compared."""
        with family.looking():
            return probe(family, self.prompts, self.recipe.dataset.resolution)

    def is_sane(self) -> bool:
        """Whether the student predicts something at all, as the base does."""
        with self.student.frozen():
            before = self.probe(self.family)
        after = self.probe(self.family)
        return bool(after.isfinite().all()) and float(after.norm()) < SANE * float(before.norm())

    def choose(self) -> list[str]:
        """Go back to the weights that were the best on held-out pictures, if that is asked for; what they say."""
        validation, last, shown = self.trainer.validation, self.trainer.step, self.recipe.validation
        if validation is None or not validation.found:
            return []
        notes = [validation.verdict()]
        if last < self.recipe.train.steps:
            notes.append(f"stopped after step {last}: nothing was better for {shown.patience} times")
        if shown.keep == "best" and validation.best is not None and validation.best.step < last:
            self.trainer.go_back()
            notes.append(
                f"the pictures of step {self.trainer.step} were the best, so it is exported; with validation.keep=last "
                "it is the last one"
            )
        return notes

    def export(self, more: Mapping[str, str] | None = None) -> list[Path]:
        """The method's files, in the run's folder.

        Raises:
            UserError: they could not be written there; it says where they are instead, if there was room anywhere.
        """
        method, folder, dtype = self.recipe.method, self.recipe.output.folder, getattr(torch, self.recipe.output.dtype)
        header = {**self._header(), **(more or {})}
        try:
            return method.export(self.student, folder, dtype, header)
        except OSError as error:
            problems = [f"output.folder: {folder}: what was learnt cannot be written there ({reason(error)})"]
        with contextlib.suppress(OSError):
            files = method.export(self.student, Path(tempfile.mkdtemp(prefix="finetune-")), dtype, header)
            problems.append(f"It was written to {named(files)} instead, and not compared with what was trained.")
        raise UserError(problems)

    def compare(self, files: Sequence[Path], after: Tensor) -> Verdict:
        """The model as it was after training with a fresh pipeline, before and after that loads the files."""
        device, self.trainer.work = self.trainer.accelerator.device, None  # a recorded step keeps memory of its own
        if not _has_room_for_another(self.family):
            self.family.to(torch.device("cpu"))
        with explained(self.recipe, "comparing the export", "else"):
            fresh = load_family(self.recipe)
            fresh.to(device, resting=["vae", *fresh.text_encoders])
            before = self.probe(fresh)
            load_adapters(fresh.pipeline, files)
            fresh.denoiser.to(device)
            return compare(before, after, self.probe(fresh))

    def _header(self) -> dict[str, str]:
        """Small and readable: what a file is, without the run beside it."""
        recipe = self.recipe
        return {
            "finetune_version": __version__,
            "base": recipe.base.source,
            "base_fingerprint": self.family.fingerprint,
            "architecture": from_pipeline(self.family.pipeline) or "unknown",
            "method": recipe.method.name,
            "trigger": recipe.placeholder,
            "steps": str(self.trainer.step),
            "recipe_digest": recipe.digest(),
            "zero_terminal_snr": str(recipe.train.zero_terminal_snr).lower(),
        }


def _has_room_for_another(family: Family) -> bool:
    """Whether a second one fits beside it on its GPU, and what that needs to predict."""
    if family.device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    weights = sum(parameter.nbytes for part in family.parts() for parameter in part.parameters())
    return torch.cuda.mem_get_info(family.device)[0] > 2 * weights


@contextmanager
def not_compared(files: Sequence[Path]) -> Iterator[None]:
    """Say of files that are whole that what should have followed did not."""
    what = f"{named(files)} hold what was learnt, but were not compared with it."
    try:
        yield
    except Stopped:
        raise Stopped(f"stopped after the export: {what}") from None
    except OutOfMemory as error:
        raise OutOfMemory([*error.problems, what]) from None


def complaint(verdict: Verdict, files: Sequence[Path]) -> str:
    """Why a verdict is not passed, and what to try."""
    if not verdict.changed:
        return f"training changed nothing, so {named(files)} hold nothing. Raise train.learning_rate or train.steps."
    return (
        f"{named(files)}, loaded into a fresh pipeline, are {verdict.error:.1%} off what was trained "
        f"(at most {Verdict.TOLERANCE:.0%} is accepted). Try output.dtype=float32."
    )


def named(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))
