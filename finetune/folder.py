"""The folder that a run writes to: one process at a time, and only as the run that it was."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from finetune import checkpoint
from finetune.config import build
from finetune.dataset import Picture
from finetune.errors import UserError, reason, warn
from finetune.export import LORA_FILE, PIPELINE_FOLDER, WORDS_FILE
from finetune.files import whole
from finetune.recipe import Recipe

RECIPE_FILE, GRID_FILE, CARD_FILE, REPORT_FILE = "recipe.yaml", "grid.png", "README.md", "report.html"
CHECKPOINTS, SAMPLES, EVALUATION, LOCK = "checkpoints", "samples", "evaluation", ".lock"
WRITTEN = (RECIPE_FILE, LORA_FILE, WORDS_FILE, GRID_FILE, CARD_FILE, REPORT_FILE)
# They change when a result is there and what it takes, but not the result.
CHANGEABLE = {"train": ("accumulate", "capture", "gradient_checkpointing", "checkpoint_every", "keep_checkpoints")}


class OutputFolder:
    """Held by a lock of the operating system, which ends with the process, however that ends.

    The lock is the kind that network folders know as well (POSIX records). It never
    has to be cleared away by hand: what counts is that a process holds it, not that
    its file is there.
    """

    def __init__(self, recipe: Recipe[Any], pictures: Sequence[Picture]):
        self.recipe = recipe
        self.path = recipe.output.folder
        self.checkpoints = self.path / CHECKPOINTS
        self.pictures = {picture.path: _identity(picture) for picture in pictures}
        self._lock: IO[str] | None = None
        self._tried = False

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Whether the run may write there, before the time for loading a base is spent; nothing is made yet."""
        if resume and overwrite:
            raise UserError("--resume and --overwrite contradict each other. Give one of them.")
        if not all(path.is_dir() for path in (self.path, *self.path.parents) if path.exists()):
            raise UserError(f"output.folder: {self.path} cannot be a folder: a file is in the way")
        if (self.path / LOCK).exists():
            self._take()
        held = [name for name in (RECIPE_FILE, CHECKPOINTS, SAMPLES) if (self.path / name).exists()]
        if held and not resume and not overwrite:
            raise UserError(
                f"output.folder: {self.path} holds a run already ({', '.join(held)}). "
                "Go on with --resume, replace it with --overwrite, or choose another folder."
            )

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder, or rid it of an earlier run, once everything else is known to work."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            self.check(resume=resume, overwrite=overwrite)  # another may have come and gone meanwhile
            if overwrite:
                self._clear()
            checkpoint.sweep(self.checkpoints)
            self._sweep()
            with whole(self.path / RECIPE_FILE, overwrite=True) as unfinished:
                unfinished.write_text(self.recipe.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"output.folder: {self.path} cannot be written to ({reason(error)})") from None

    def close(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.close()

    def newest(self) -> Path | None:
        """The checkpoint to go on from, if there is one.

        Raises:
            UserError: it is of another recipe or of other pictures, or there are only damaged ones.
        """
        found = checkpoint.newest(self.checkpoints)
        if found is not None:
            self._check_unchanged(found)
        elif any(self.checkpoints.glob("step-*")):
            raise UserError(
                f"--resume: every checkpoint in {self.checkpoints} is damaged. Start anew with --overwrite."
            )
        return found

    def check_base(self, found: Path | None, fingerprint: str) -> None:
        """Raises: UserError, if the base's weights are not those that the checkpoint, if any, was trained on."""
        if found is not None and (before := checkpoint.load(found, tensors=False)["base"]) != fingerprint:
            raise UserError(
                f"--resume: the base {self.recipe.base.source} has other weights than the one of {found} (fingerprint "
                f"{before}, now {fingerprint}). Bring that one back, or start anew with --overwrite."
            )

    def save(self, step: int, trainer: dict[str, Any], fingerprint: str, keep: int) -> Path:
        """A checkpoint: what the next step depends on, and by what it is known again."""
        recipe = json.dumps(self.recipe.dump())
        state = {"trainer": trainer, "recipe": recipe, "base": fingerprint, "pictures": self.pictures}
        return checkpoint.save(self.checkpoints, step, state, keep)

    def _take(self) -> None:
        """Raises: UserError, if another process has the folder."""
        if self._tried:
            return
        self._tried = True
        try:
            file = (self.path / LOCK).open("a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"output.folder: {self.path} is being written by {file.read().strip() or 'another process'}. "
                    "Wait for it, stop it, or choose another folder."
                ) from None
        except OSError as error:
            if error.errno == errno.EROFS:
                raise UserError(f"output.folder: {self.path} cannot be written to ({reason(error)})") from None
            warn(f"output.folder: {self.path} cannot be locked ({reason(error)}). Let no other run write there.")
            return
        self._lock = file
        with contextlib.suppress(OSError):  # who holds it is told if there is room for that
            owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M')}\n"
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), owner.encode())

    def _clear(self) -> None:
        """What an earlier run has left, so that nothing of it can be taken for this one's."""
        for name in (CHECKPOINTS, SAMPLES, EVALUATION, PIPELINE_FOLDER, "tensorboard"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in WRITTEN:
            (self.path / name).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete what killed processes left of what a run writes."""
        for path in (*self.path.glob(".*"), *self.path.glob(f"{SAMPLES}/*/.*")):
            found = re.fullmatch(r"\.(.+)\.\d+", path.name)
            if found and (found[1] in (*WRITTEN, PIPELINE_FOLDER, EVALUATION) or path.parent != self.path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _check_unchanged(self, found: Path) -> None:
        """A run may only go on as what it was."""
        state = checkpoint.load(found, tensors=False)
        then, now = self._with_defaults(json.loads(state["recipe"])), self.recipe.dump()
        changed = [
            f"{section}.{key}: was {then[section].get(key)!r}, is now {now[section].get(key)!r}"
            for section in ("base", "method", "dataset", "train")
            for key in sorted(then[section].keys() | now[section].keys())
            if then[section].get(key) != now[section].get(key) and key not in CHANGEABLE.get(section, ())
        ]
        if then["placeholder"] != self.recipe.placeholder:
            changed.append(f"placeholder: was {then['placeholder']!r}, is now {self.recipe.placeholder!r}")
        if changed:
            raise UserError([f"--resume: the recipe differs from that of {found}:", *changed])
        self._check_pictures(state["pictures"], found)

    def _with_defaults(self, tree: dict[str, Any]) -> dict[str, Any]:
        """A recipe of an earlier version, which lacks the settings that have come since."""
        try:
            return build(type(self.recipe), tree).dump()
        except UserError:  # of another method, or with settings that have gone
            return tree

    def _check_pictures(self, before: dict[str, str], found: Path) -> None:
        changes = {
            "gone": before.keys() - self.pictures.keys(),
            "new": self.pictures.keys() - before.keys(),
            "changed": {path for path in before.keys() & self.pictures.keys() if before[path] != self.pictures[path]},
        }
        if any(changes.values()):
            lines = [f"{what}: {', '.join(sorted(paths)[:5])}" for what, paths in changes.items() if paths]
            lines.append("Bring them back as they were, with their captions, or start anew with --overwrite.")
            raise UserError([f"--resume: the pictures differ from those of {found}:", *lines])


def _identity(picture: Picture) -> str:
    """All of a picture that shows in training."""
    told = json.dumps([picture.sha256, picture.captions, picture.weight])
    return hashlib.sha256(told.encode()).hexdigest()[:16]
