"""How long a recipe takes on this machine: the work that its rehearsal counts, at the speed of one product of matrices.

A GPU either waits for Python, which starts each operation, or computes; a CPU does one after the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finetune.batch import pictures_at_once
from finetune.forecast import Forecast, num_rounds
from finetune.recipe import Recipe
from finetune.rehearsal import Work

# Fitted: of an H200 to seven plain steps of the real Stable Diffusion 1.5 and XL, -24 to +34 % off, and to nine that
# were CUDA graphs, of FLUX.1 too, -42 to +29 % off; of two cores of a Xeon to five recipes of `make bench`, 3 %.
SHARE = {"cuda": 0.3, "cpu": 0.61}  # of the product's speed, in models
STARTING = {"cuda": 13e-6, "cpu": 20e-6}  # seconds of an operation that computes nothing
CAPTURED = 0.5, 2.2e-6  # both, of a step that is one CUDA graph
SIDES = {"cuda": 8192, "cpu": 768}  # of the matrices
TRIES = {"cuda": 10, "cpu": 60}  # the fastest counts: others may be at work on the machine meanwhile


@dataclass(frozen=True)
class Machine:
    """What the time is for."""

    name: str
    kind: str  # cuda or cpu
    speed: float  # flops in a second, of a product of matrices


@dataclass(frozen=True)
class Duration:
    """Seconds; loading the base and comparing the export with it come on top."""

    machine: Machine
    phases: Mapping[str, float]  # in the order in which they come

    @property
    def total(self) -> float:
        return sum(self.phases.values())

    def lines(self) -> list[str]:
        """What `check` prints."""
        machine = f"{self.machine.name}, {self.machine.speed / 1e12:.3g} TFLOP/s in a product of matrices"
        lines = [f"time      h:min:s on {machine}; loading the base comes on top"]
        lines += [f"  {name:16}{clock(seconds):>9}" for name, seconds in self.phases.items() if seconds]
        return [*lines, f"  {'in all':16}{clock(self.total):>9}"]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"machine": vars(self.machine), "seconds": {**self.phases, "all": self.total}}


def duration(
    recipe: Recipe[Any], work: Mapping[str, Work], expected: Forecast, captions: int, machine: Machine | None = None
) -> Duration:
    """The time of a recipe's run, from its first picture to its last.

    Args:
        work: of a step and its like, as the rehearsal counts them.
        captions: how many there are.
        machine: default: this one.
    """
    machine = machine or here(getattr(torch, recipe.train.computes))
    shown, made, steps = recipe.validation, expected.class_images, recipe.train.steps
    missing = 0 if made is None else made.wanted - (made.there or 0)
    rounds = num_rounds(recipe) + recipe.method.export_is_lossy
    seconds = {name: _seconds(needed, machine) for name, needed in work.items()}

    def drawn(count: int) -> float:
        """Pictures of one call: its operations are started once, whatever their number."""
        each = {name: work[name].times(count, 1) for name in ("caption", "pass", "decoded")}
        return sum(_seconds(each[name], machine) * (shown.steps if name == "pass" else 1) for name in each)

    def drawn_in_batches(count: int) -> float:
        whole, rest = divmod(count, shown.batch_size)
        return whole * drawn(shown.batch_size) + (drawn(rest) if rest else 0)

    pictures, texts = _encoded(recipe, expected, captions)
    captured = machine.kind == "cuda" and recipe.train.capture
    phases = {
        "class images": drawn_in_batches(missing),
        "encoding": pictures * seconds["picture"] + texts * seconds["caption"],
        "steps": steps * (_captured(work["step"], machine) if captured else seconds["step"]),
        "validation": rounds * drawn_in_batches(len(shown.prompts)),
    }
    return Duration(machine, phases)


def here(dtype: torch.dtype) -> Machine:
    """This machine, timed for a fraction of a second."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"
    side = SIDES[kind]
    one, other = (torch.ones(side, side, dtype=dtype, device=kind) for _ in range(2))
    best = math.inf
    for _ in range(TRIES[kind]):
        begin = time.perf_counter()
        torch.mm(one, other)
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return Machine(name, kind, 2 * side**3 / best)


def clock(seconds: float) -> str:
    """1:02:03; a tenth of a second is no less than one."""
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _seconds(work: Work, machine: Machine) -> float:
    computing = work.flops / (SHARE[machine.kind] * machine.speed)
    starting = work.operations * STARTING[machine.kind]
    return max(computing, starting) if machine.kind == "cuda" else computing + starting


def _captured(work: Work, machine: Machine) -> float:
    share, starting = CAPTURED
    return work.flops / (share * machine.speed) + work.operations * starting


def _encoded(recipe: Recipe[Any], expected: Forecast, captions: int) -> tuple[int, int]:
    """Pictures and captions that go through the encoders before the first step; a group is filled up to its size."""
    config, train, prior = recipe.dataset, recipe.train, recipe.method.prior_half
    draws = train.steps * train.batch_size
    random = config.crop == "random"
    pictures = sum(expected.shapes.values()) * (1 + config.flip)
    concept = draws if random else min(draws, pictures)
    others = 0
    if prior is not None:
        others = min(draws, prior.count) if prior.source == "images" else draws * random
    group = pictures_at_once(config.resolution)
    texts = 0 if recipe.method.trains_text else (draws if config.shuffle_tags else captions) + (prior is not None)
    return math.ceil((concept + others) / group) * group, texts
