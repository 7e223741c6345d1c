"""A run's state on disk: whole or absent, tensors in safetensors, everything else in JSON. No pickle.

A checkpoint is written under a hidden name, with the checksums of its files, and
flushed to the disk before it is renamed to `step-N`; it loses that name again
before any of it is deleted. So whatever is called `step-N` was whole once, and
its checksums tell whether it still is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from finetune.errors import reason, warn
from finetune.files import save_tensors, to_disk

TENSORS, REST, CHECKSUMS = "state.safetensors", "state.json", "SHA256SUMS"  # as `sha256sum --check` reads it


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-N`; once it is safe, drop all but the newest `keep` of those up to it.

    Raises:
        OSError: it cannot be written; those that are there stay as they are.
    """
    path = folder / f"step-{step:06d}"
    if damage(path) is None:
        return path  # the same step of the same run has the same bits
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = _hidden(path, "new")
    try:
        _write(unfinished, state)
        _remove(path)
        unfinished.replace(path)
    except OSError:
        if damage(path) is not None:  # else another process has saved the same step meanwhile
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    to_disk(folder)
    found = _all(folder)
    older = [other for other in found if _step(other) < step]
    kept = {path, *older[max(0, len(older) - keep + 1) :]}
    for other in found:
        if other not in kept:  # one that is newer could not be read, or the run would not be here
            with contextlib.suppress(OSError):
                _remove(other)
    return path


def sweep(folder: Path) -> None:
    """Delete what saves that were killed have left. No other process may be saving."""
    for path in folder.glob(".step-*"):
        if re.fullmatch(r"\.step-\d{6,}\.(new|old)\.\d+", path.name):
            shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is still as it was written; newer ones that are not are named."""
    return next(whole(folder), None)


def whole(folder: Path) -> Iterator[Path]:
    """All checkpoints that are still as they were written, the newest first; the others are named."""
    for path in reversed(_all(folder)):
        if (harm := damage(path)) is None:
            yield path
        else:
            warn(f"{path} is damaged ({harm}) and passed over")


def damage(path: Path) -> str | None:
    """How a checkpoint differs from what was written."""
    try:
        expected = (path / CHECKSUMS).read_bytes()
        found = _checksums(path)
    except OSError as error:
        return f"{Path(error.filename or path).name}: {reason(error)}"
    return None if found == expected else "its files do not match its checksums"


def load(path: Path, *, tensors: bool = True) -> dict[str, Any]:
    """The state as it was given to `save`; tensors on the CPU, or None in their places."""
    return _join(json.loads((path / REST).read_text()), load_file(path / TENSORS) if tensors else None)


def _all(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _hidden(path: Path, why: str) -> Path:
    """A name of this process's own: two may save the same step at once."""
    return path.with_name(f".{path.name}.{why}.{os.getpid()}")


def _remove(path: Path) -> None:
    """Out of sight first: what is half deleted must not have a checkpoint's name."""
    if path.exists():
        shutil.rmtree(path.replace(_hidden(path, "old")), ignore_errors=True)


def _write(folder: Path, state: dict[str, Any]) -> None:
    """The files, to the disk itself."""
    tensors: dict[str, Tensor] = {}
    rest = _split(state, "", tensors)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_tensors(_apart(tensors), folder / TENSORS)
    (folder / REST).write_text(json.dumps(rest))
    (folder / CHECKSUMS).write_bytes(_checksums(folder))
    for part in (*folder.iterdir(), folder):
        to_disk(part)


def _checksums(folder: Path) -> bytes:
    lines = []
    for name in (TENSORS, REST):
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines).encode()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own, as safetensors wants it; copied only where it has not, for it may be short."""
    taken: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
        taken.add(storage.data_ptr())
    return tensors


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON with each tensor replaced by its name; dictionaries as pairs, since their keys may be numbers."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}:{path}"  # keys may hold a slash, so paths alone can collide
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"pairs": [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_split(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    assert value is None or isinstance(value, bool | int | float | str), f"{path}: {type(value)}"
    return {"value": value}


def _join(value: Any, tensors: dict[str, Tensor] | None) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return None if tensors is None else tensors[content]
    if kind == "pairs":
        return {key: _join(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_join(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
