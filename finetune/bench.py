"""How fast a recipe trains and draws on this machine."""

from __future__ import annotations

import platform
import resource
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from finetune import run
from finetune.recipe import Recipe

WARM_UP = 3  # steps that fill caches and choose kernels, not counted
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Timing:
    """One recipe's figures; medians over the counted steps."""

    recipe: str
    method: str
    batch: int  # samples in a step, the prior's included
    first_step_s: float  # from the start of the work, imports not counted, to the first update
    step_ms: float
    images_per_s: float
    picture_s: float  # one validation picture, drawn in a batch
    peak_gib: float  # of the process, or of the GPU


def measure(recipe: Recipe[Any], steps: int) -> Timing:
    """Train `steps` counted updates in a folder that is thrown away, and draw the validation prompts once."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train = recipe.train.model_copy(update={"steps": WARM_UP + steps, "warmup": 0})
        output = recipe.output.model_copy(update={"folder": Path(folder) / "run"})
        at_work = run.prepare(recipe.model_copy(update={"train": train, "output": output}))
        marks, batch = [time.perf_counter()], 0
        for report in at_work.trainer.steps():
            marks.append(time.perf_counter())
            batch = len(report.draws)
        prompts = len(at_work.prompts)
        before = time.perf_counter()
        at_work.draw(range(prompts))
        drawing = time.perf_counter() - before
    step = statistics.median(
        later - earlier for earlier, later in zip(marks[WARM_UP:], marks[WARM_UP + 1 :], strict=False)
    )
    return Timing(
        recipe=recipe.name,
        method=recipe.method.name,
        batch=batch,
        first_step_s=round(marks[1] - start, 2),
        step_ms=round(step * 1000, 1),
        images_per_s=round(batch / step, 2),
        picture_s=round(drawing / prompts, 2) if prompts else 0.0,
        peak_gib=round(_peak_memory() / 2**30, 2),
    )


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict[str, str]:
    """What the figures are of."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"device": device, "python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def table(timings: list[Timing]) -> str:
    """Markdown, as the README shows it."""
    rows = [asdict(timing) for timing in timings]
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(str(value) for value in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
