"""One run of a study: taught, drawn, judged, and thrown away but for a row of figures."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import UserError, reason
from finetune.study.plan import Task

DIVERGED = "training diverged"


@dataclass(frozen=True)
class Row:
    """What came of a task; a line of the study's table of runs. Shares are of 1."""

    comparison: str
    variant: str
    concept: str
    seed: int
    digest: str  # Task.digest
    identity: float | None = None  # EncoderScores.likeness: the way from floor to ceiling
    prompt: float | None = None  # EncoderScores.kept: prompt following, of the base's
    balance: float | None = None  # of both: metrics.balance
    class_moved: float | None = None  # EncoderScores.class_moved
    class_varied: float | None = None  # DIV, of the base's
    drift: float | None = None  # Drift.unrelated
    copies: float | None = None  # of the pictures of the concept
    seconds: float | None = None  # from the recipe to the adapter
    kilobytes: float | None = None  # of what was exported
    error: str = ""  # why there are no figures

    @property
    def is_final(self) -> bool:
        """Whether it would be the same again: what a machine was short of, another may have."""
        return not self.error or self.error.startswith(DIVERGED)

    def of(self, task: Task) -> Row:
        """The same figures under the task's names."""
        return replace(self, comparison=task.comparison, variant=task.variant, concept=task.concept, seed=task.seed)

    def as_text(self) -> dict[str, str]:
        return {name: "" if value is None else _text(value) for name, value in asdict(self).items()}

    @classmethod
    def from_text(cls, line: Mapping[str, str]) -> Row:
        """Raises: ValueError, KeyError, where it is no such line."""
        kinds: dict[str, Any] = {field.name: _kind(str(field.type)) for field in fields(cls)}
        return cls(**{name: kind(line[name]) for name, kind in kinds.items()})


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _kind(annotation: str) -> Any:
    if "float" in annotation:
        return lambda text: float(text) if text else None
    return int if annotation == "int" else str


def begin(threads: int) -> None:
    """Make a process a worker: no bars, its share of the cores, and no end but that of a run.

    Of an interrupt a run that trains makes an orderly end; at any other time it is the study's to heed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_the_study, daemon=True).start()
    import torch
    from tqdm import tqdm

    from finetune.quiet import quiet

    quiet()
    draw: Any = tqdm.__init__

    def silent(self: Any, *args: Any, **settings: Any) -> None:
        draw(self, *args, **{**settings, "disable": True})

    tqdm.__init__ = silent  # the variable for it is read once, before a worker begins

    torch.set_num_threads(threads)


def _leave_with_the_study() -> None:
    """A worker whose study was killed would wait for ever, with all that it holds of a GPU."""
    if (study := multiprocessing.parent_process()) is not None:
        study.join()
        os._exit(1)


def carry_out(task: Task) -> Row:
    """A run that fails is a row, too: that a learning rate diverges is something to know."""
    from finetune.trainer import NonFiniteLoss

    row = Row(task.comparison, task.variant, task.concept, task.seed, task.digest)
    try:
        with tempfile.TemporaryDirectory(prefix="finetune-study-") as folder:
            return _measured(row, task, Path(folder) / "run")
    except NonFiniteLoss as error:
        return replace(row, error=f"{DIVERGED}: {error.problems[0].partition('. ')[0]}")
    except UserError as error:
        return replace(row, error=error.problems[0].partition(". ")[0])
    except Exception as error:
        return replace(row, error=f"{type(error).__name__}: {reason(error)}")


def _measured(row: Row, task: Task, folder: Path) -> Row:
    from finetune.evaluation.concept import Given
    from finetune.evaluation.evaluate import Settings, prepare
    from finetune.evaluation.metrics import balance
    from finetune.evaluation.studio import Size
    from finetune.run import train

    begun = time.perf_counter()
    files = train(task.load(folder)).files
    seconds = time.perf_counter() - begun
    asked = task.judging
    size = Size(asked.seeds, asked.class_pictures, weights=())
    settings = Settings(prompts=asked.prompts, size=size, steps=asked.steps, guidance=asked.guidance)
    job = prepare(f"{folder}={asked.weight}", Given(class_prompt=task.class_prompt), settings)
    found, _ = job.look([_encoder(job.encoder)], known=_known())
    [scores] = found.scores
    return replace(
        row,
        identity=scores.likeness,
        prompt=scores.kept,
        balance=None if None in (scores.likeness, scores.kept) else balance(scores.likeness, scores.kept),
        class_moved=scores.class_moved,
        class_varied=scores.prior_diversity.value / scores.prior_diversity_base,
        drift=found.drift.unrelated,
        copies=None if found.copying is None else len(found.copying.copies) / found.copying.num_pictures,
        seconds=seconds,
        kilobytes=sum(file.stat().st_size for file in files) / 1000,
    )


@cache
def _encoder(name: str) -> Any:
    from finetune.evaluation.encoders import Encoder

    return Encoder.load(name)


@cache
def _known() -> dict[Any, Any]:
    """What the base alone drew, kept from run to run."""
    return {}
