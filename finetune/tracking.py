"""Where a run's numbers and pictures go. A tracker that fails or hangs is dropped with one line; the run goes on."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from finetune.errors import reason, warn

if TYPE_CHECKING:
    from PIL.Image import Image

TrackerName = Literal["wandb", "tensorboard", "trackio"]
METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    """A backend. Names are stable: `loss`, `grad_norm`, `learning_rate/<group>`, `validation/<prompt>`,
    `validation_loss/mean`, `validation_loss/level_<1 to 9>`."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None: ...

    def close(self) -> None: ...


class JSONLines:
    """One line for each step, always written; on resume, lines after the checkpoint go.

    Where there is no room for a line it is left out whole, and the next is tried again.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        self.first_step = first_step
        self.lost = ""
        self.file: FileIO | None = None
        self._attempt(self._open)

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        # JSON has no infinity; a gradient that overflowed is null.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._attempt(lambda: self._append((json.dumps({"step": step, **finite}) + "\n").encode()))

    def _attempt(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            if not self.lost:
                warn(f"{self.path} cannot be written ({reason(error)}); the run goes on, and leaves out those lines")
            self.lost = reason(error)

    def _open(self) -> FileIO:
        kept = _lines_until(self.path, self.first_step) if self.first_step and self.path.exists() else []
        unfinished = self.path.with_name(f".{self.path.name}")
        unfinished.write_text("".join(kept))
        unfinished.replace(self.path)
        self.file = self.path.open("ab", buffering=0)  # a buffer would try a line again that was given up
        return self.file

    def _append(self, line: bytes) -> None:
        file = self.file or self._open()
        end = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)
            raise

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        """They are files of the run already."""

    def close(self) -> None:
        if self.file is not None:
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
        with silent():  # it greets at length
            self.run = trackio.init(project="finetune", name=name, config=dict(config), embed=False, auto_log_cpu=False)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        self.trackio.log({name: self.trackio.Image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        with silent():
            self.trackio.finish()


BACKENDS: dict[TrackerName, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "wandb": WandB,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


PATIENCE = 60.0  # seconds for one call of a tracker, and for all of them to come to an end
_register = atexit.register


class Relay(threading.Thread):
    """A backend in a thread of its own, so that a service that does not answer holds up no step, and no end."""

    def __init__(self, name: TrackerName, start: Callable[[], Tracker]):
        super().__init__(name=f"tracking.{name}", daemon=True)
        self.off = False
        self.hooks: list[Callable[..., Any]] = []  # what its service wants done when the interpreter ends
        self._start_backend = start
        self._acts: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._busy_since: float | None = time.monotonic()
        atexit.register = _collect
        self.start()

    def send(self, act: Callable[[Tracker], None]) -> None:
        """Have something done after all that was sent before."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > PATIENCE:
            self._drop(f"it has not answered for {PATIENCE:.0f} seconds")
        if not self.off:
            self._acts.put(act)

    def close(self, deadline: float) -> None:
        """Wait until all is done, but no longer than to the deadline."""
        self.send(lambda backend: backend.close())
        self._acts.put(None)
        self.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive():
            self._drop("it does not come to an end; what it has not sent stays where it keeps it")

    def run(self) -> None:
        try:
            backend = self._start_backend()
            while True:
                self._busy_since = None
                act = self._acts.get()
                self._busy_since = time.monotonic()
                if act is None or self.off:
                    return
                act(backend)
        except Exception as error:  # whatever a tracker's service does, the training is worth more
            self._drop(f"{type(error).__name__}: {reason(error)}")

    def _drop(self, why: str) -> None:
        if not self.off:
            self.off = True
            for hook in self.hooks:
                atexit.unregister(hook)
            warn(f"{self.name} is off from here ({why})")


def _collect(hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`atexit.register`, but what is registered for a tracker goes with it: the interpreter would wait for it."""
    thread = threading.current_thread()
    if isinstance(thread, Relay):
        if thread.off:
            return hook
        thread.hooks.append(hook)
    return _register(hook, *args, **kwargs)


class Trackers:
    """The JSON lines and the backends that a recipe names."""

    def __init__(
        self, names: Sequence[TrackerName], folder: Path, run: str, config: Mapping[str, Any], first_step: int
    ):
        self.lines = JSONLines(folder / METRICS_FILE, first_step)
        self.relays = [Relay(name, lambda name=name: BACKENDS[name](folder, run, config, first_step)) for name in names]

    def numbers(self, step: int, values: Mapping[str, float], pictures: Sequence[str] = ()) -> None:
        """A step's numbers, and the pictures it saw, if it did, which only the JSON lines keep."""
        self.lines.numbers(step, {**values, "pictures": list(pictures)} if pictures else values)
        for relay in self.relays:
            relay.send(lambda backend: backend.numbers(step, values))

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        for relay in self.relays:
            relay.send(lambda backend: backend.pictures(step, pictures))

    def close(self, patience: float = PATIENCE) -> dict[str, str]:
        """What could not be written, and why."""
        self.lines.close()
        deadline = time.monotonic() + patience
        for relay in self.relays:
            relay.close(deadline)
        return {METRICS_FILE: self.lines.lost} if self.lines.lost else {}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing of what this thread prints; `redirect_stdout` would silence all of them."""
    printing = sys.stdout
    sys.stdout = _AllBut(threading.get_ident(), printing)
    try:
        yield
    finally:
        sys.stdout = printing


class _AllBut:
    """A stream for all threads but one."""

    def __init__(self, silenced: int, stream: Any):
        self.silenced = silenced
        self.stream = stream

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.silenced else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
