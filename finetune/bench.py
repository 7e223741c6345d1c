"""How fast a recipe trains and draws on this machine."""

from __future__ import annotations

import gc
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune import run
from finetune.base import load_family, make_family
from finetune.errors import UserError
from finetune.families.base import Family
from finetune.recipe import Recipe

WARM_UP = 3  # steps that fill caches and choose kernels, not counted
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
# TFLOP/s of matrix products in 16 bits, without sparsity, by NVIDIA's data sheets.
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}


@dataclass(frozen=True)
class Timing:
    """One recipe's figures, medians over the counted steps; None is what a peer's script does not tell."""

    recipe: str
    setting: str  # what was changed in it
    method: str | None
    batch: int | None  # samples in a step, the prior's included
    first_step_s: float  # from the start of the work to the first update; imports count for a peer's script alone
    step_ms: float
    images_per_s: float | None = None
    tflop: float | None = None  # of one step, forward and back
    share_of_peak: float | None = None  # of what the GPU's data sheet promises
    picture_s: float | None = None  # one validation picture, drawn in a batch
    peak_gib: float | None = None  # of the process, or what torch took of the GPU
    command_s: float | None = None  # of all the recipe's steps, from the command to the adapter


def measure(
    recipe: Recipe[Any], steps: int, setting: str = "", *, random: bool = False, command: bool = False
) -> Timing:
    """Train `steps` counted updates in a folder that is thrown away, and draw the validation prompts once.

    Each process of a launcher does its share.

    Args:
        setting: what was changed in the recipe, in words.
        random: whether the base is made from its configs alone.
        command: whether the whole run is timed as well, in a process of its own.
    """
    _forget()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        at_work = run.prepare(_shortened(recipe, steps, Path(folder)), load=_random if random else load_family)
        if random and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # for they are drawn there, all of them
        reports = at_work.trainer.steps()
        with counter() as counted:
            batch = len(next(reports).draws)
        marks = [time.perf_counter(), *(time.perf_counter() for _ in reports)]
        prompts = len(at_work.prompts)
        before = time.perf_counter()
        at_work.draw(range(prompts))
        drawing = time.perf_counter() - before
    step = statistics.median(later - earlier for earlier, later in pairwise(marks[WARM_UP - 1 :]))
    flops, peak = counted.get_total_flops(), _peak_speed()
    return Timing(
        recipe=recipe.name,
        setting=setting,
        method=recipe.method.name,
        batch=batch,
        first_step_s=round(marks[0] - start, 2),
        step_ms=round(step * 1000, 1),
        images_per_s=round(batch / step, 2),
        tflop=float(f"{flops / 1e12:.3g}"),
        share_of_peak=None if peak is None else round(flops / step / (peak * 1e12), 3),
        picture_s=round(drawing / prompts, 2) if prompts else 0.0,
        peak_gib=round(_peak_memory() / 2**30, 2),
        command_s=_run_command(recipe) if command else None,
    )


def _shortened(recipe: Recipe[Any], steps: int, folder: Path) -> Recipe[Any]:
    train = recipe.train.model_copy(update={"steps": WARM_UP + steps, "warmup": 0})
    output = recipe.output.model_copy(update={"folder": folder / "run"})
    return recipe.model_copy(update={"train": train, "output": output})


def _run_command(recipe: Recipe[Any]) -> float:
    """Seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        words = [sys.executable, "-m", "finetune", "train", str(file), "output.folder={folder}/run"]
        return round(_run(words, recipe.train.steps, "bench"), 1)


def counter() -> FlopCounterMode:
    """Torch's, which does not know of a batched product that it is told the precision of."""

    def product(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * a[2] * b[2]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: product})


def measure_peer(command: str, steps: int) -> Timing:
    """Another program at the same work, by what longer runs of it take longer.

    Args:
        command: `{steps}` in it is the number of updates, `{folder}` one for its output that is thrown away.

    Raises:
        UserError: it fails, with the end of what it said.
    """
    if "{steps}" not in command:
        raise UserError("--peer: the command needs {steps} where its number of steps stands")
    words = shlex.split(command)
    short = _run(words, WARM_UP, "--peer")
    while (long := _run(words, WARM_UP + steps, "--peer")) < 2 * short:  # or how long it takes to start decides
        steps *= 2
    step = (long - short) / steps
    script = next((Path(word).name for word in words if word.endswith((".py", ".sh"))), words[0])
    first = short - (WARM_UP - 1) * step
    return Timing(script, "peer", None, None, first_step_s=round(first, 2), step_ms=round(step * 1000, 1))


def _run(words: list[str], steps: int, title: str) -> float:
    """Seconds that a command takes, with its number of steps and a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        command = [word.replace("{steps}", str(steps)).replace("{folder}", folder) for word in words]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - it is the user's own
        taken = time.perf_counter() - start
    if done.returncode:
        said = (done.stderr or done.stdout).splitlines()[-5:]
        raise UserError([f"{title}: {words[0]} ended with status {done.returncode}:", *said])
    return taken


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _random(recipe: Recipe[Any]) -> Family:
    return make_family(recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _forget() -> None:
    """What an earlier measurement has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_speed() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((speed for known, speed in PEAKS.items() if known in name), None)


def machine() -> dict[str, str]:
    """What the figures are of."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"device": device, "python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def table(timings: list[Timing]) -> str:
    """Markdown, as the README shows it."""
    rows = [asdict(timing) for timing in timings]
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join("" if value is None else str(value) for value in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
