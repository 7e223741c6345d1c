"""A run's state on disk: whole or absent, tensors in safetensors, everything else in JSON. No pickle."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, REST = "state.safetensors", "state.json"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-N` and drop all but the newest `keep`; it appears under its name once it is whole."""
    path = folder / f"step-{step:06d}"
    if path.exists():
        return path  # the same step of the same run has the same bits
    unfinished = folder / f".{path.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    rest = _split(state, "", tensors)
    save_file(tensors, unfinished / TENSORS)
    (unfinished / REST).write_text(json.dumps(rest))
    for file in unfinished.iterdir():
        _flush(file)
    unfinished.replace(path)
    _flush(folder)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def newest(folder: Path) -> Path | None:
    return _all(folder)[-1] if _all(folder) else None


def load(path: Path) -> dict[str, Any]:
    """The state as it was given to `save`; tensors on the CPU."""
    return _join(json.loads((path / REST).read_text()), load_file(path / TENSORS))


def _all(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _flush(path: Path) -> None:
    """To the disk itself, so that a power cut cannot leave a whole name on half a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON with each tensor replaced by its name; dictionaries as pairs, since their keys may be numbers."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}:{path}"  # keys may hold a slash, so paths alone can collide
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"pairs": [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_split(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    assert value is None or isinstance(value, bool | int | float | str), f"{path}: {type(value)}"
    return {"value": value}


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "pairs":
        return {key: _join(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_join(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
