"""Files that are written whole or not at all, and safetensors files that are read with words for what is wrong."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]
Header = dict[str, str]


@contextmanager
def whole(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary name beside `path` to write a file or a folder to, which takes its place when all went well.

    It is on the disk itself before it gets its name, so that a power cut cannot leave a whole name on half a file.

    Raises:
        UserError: it exists already and may not be replaced.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already. Replace it with --overwrite, or name another file with --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        for part in [*unfinished.rglob("*"), unfinished]:
            to_disk(part)
        if path.is_dir():
            shutil.rmtree(path)
        unfinished.replace(path)
        to_disk(path.parent)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Have the system write a file or the names in a folder out of its memory, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str], *, overwrite: bool) -> Path:
    """A safetensors file; each tensor keeps its precision."""
    with whole(path, overwrite=overwrite) as unfinished:
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_tensors(plain, unfinished, {"format": "pt", **header})
        unfinished.chmod(0o644)  # safetensors writes files that only their owner may read
    return path


def save_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """safetensors' own writer, with the system's error where there is no room, as every other writer has it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=dict(header) if header else None)
    except SafetensorError as error:
        if (found := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(number := int(found[1]), os.strerror(number), str(path)) from None


def read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], Header]:
    """Names and shapes of a safetensors file's tensors, and its metadata; no tensor is read.

    Raises:
        UserError: it does not exist, or is damaged, cut short, or something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'does not exist'}. Name a file.")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return shapes, {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or cut short ({error})") from None


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file that `read_shapes` could open."""
    from safetensors.torch import load_file

    return load_file(path)


def read_pickle(path: Path) -> tuple[Tensors, Header]:
    """Tensors of a pickle, by torch's reader that runs no code from it, and the word it names if it is an embedding.

    Raises:
        UserError: it holds more than tensors, or is no pickle.
    """
    import pickle

    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read without running code from it, so it is refused ({reason})") from None
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if isinstance(held, dict) and isinstance(held.get("string_to_param"), dict) and held["string_to_param"]:
        vectors = next(iter(held["string_to_param"].values()))
        return {"emb_params": vectors.detach()}, {"trigger": str(held.get("name") or path.stem)}
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise UserError(f"{path}: holds no table of tensors. It is neither a LoRA nor an embedding.")
    return {str(name): value.detach() for name, value in held.items()}, {}
