"""Where a run's numbers and pictures go. A tracker that fails is dropped with one line; the run goes on."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

TrackerName = Literal["wandb", "tensorboard", "trackio"]
METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    """A backend. Names are stable: `loss`, `grad_norm`, `learning_rate/<group>`, `validation/<prompt>`."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None: ...

    def close(self) -> None: ...


class JSONLines:
    """One line for each step, always written; on resume, lines after the checkpoint go."""

    def __init__(self, path: Path, first_step: int):
        kept = _lines_until(path, first_step) if first_step and path.exists() else []
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_text("".join(kept))
        unfinished.replace(path)
        self.file = path.open("a")

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        # JSON has no infinity; a gradient that overflowed is null.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        """They are files of the run already."""

    def close(self) -> None:
        self.file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Whole lines up to a step; a crash may have cut the last one short."""
    lines = path.read_text().splitlines(keepends=True)
    return [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]


class WandB:
    """Weights & Biases; without an account it writes a local run and never asks for one."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], first_step: int):
        import wandb

        mode = None if "WANDB_MODE" in os.environ or wandb.login(prompt=False) else "offline"
        self.image = wandb.Image
        self.run = wandb.init(
            project="finetune",
            name=name,
            dir=folder,
            config=dict(config),
            mode=mode,
            settings=wandb.Settings(silent=True, init_timeout=20),
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        self.run.log({name: self.image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1 if first_step else None)
        self.writer.add_text("recipe", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        import numpy as np

        for name, picture in pictures.items():
            self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Trackio:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], first_step: int):
        import trackio

        self.trackio = trackio
        with contextlib.redirect_stdout(io.StringIO()):  # it greets at length
            self.run = trackio.init(project="finetune", name=name, config=dict(config), embed=False, auto_log_cpu=False)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        self.trackio.log({name: self.trackio.Image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()


BACKENDS: dict[TrackerName, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "wandb": WandB,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


class Trackers:
    """The JSON lines and the backends that a recipe names."""

    def __init__(
        self, names: Sequence[TrackerName], folder: Path, run: str, config: Mapping[str, Any], first_step: int
    ):
        self.lines = JSONLines(folder / METRICS_FILE, first_step)
        self.backends: dict[str, Tracker] = {}
        for name in names:
            self._try(
                name, lambda name=name: self.backends.update({name: BACKENDS[name](folder, run, config, first_step)})
            )

    def numbers(self, step: int, values: Mapping[str, float], pictures: Sequence[str]) -> None:
        """A step's numbers, and the pictures it saw, which only the JSON lines keep."""
        self.lines.numbers(step, {**values, "pictures": list(pictures)})
        self._each(lambda backend: backend.numbers(step, values))

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        self._each(lambda backend: backend.pictures(step, pictures))

    def close(self) -> None:
        self.lines.close()
        self._each(lambda backend: backend.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, backend in list(self.backends.items()):
            self._try(name, lambda backend=backend: act(backend))

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a tracker's service does, the training is worth more
            self.backends.pop(name, None)
            print(
                f"warning: tracking.{name} is off from here ({' '.join(f'{type(error).__name__}: {error}'.split())})",
                file=sys.stderr,
            )
