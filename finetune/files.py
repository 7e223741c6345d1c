"""Files that are written whole or not at all, and safetensors files that are read with words for what is wrong."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, reason

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]
Header = dict[str, str]
MOST_TENSORS = 2**17


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


def is_file(path: Path) -> bool:
    """Whether it is one, which a name that no file can have is not."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content, of at most so many bytes.

    Raises:
        OSError, ValueError: it is larger, or no file: a pipe would have its reader wait forever.
    """
    if not path.is_file() and path.exists():
        raise ValueError(f"it is {'a folder' if path.is_dir() else 'a device or a pipe'} and no file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"it has {size:,} bytes, and {most:,} are the most")
    return path.read_bytes()


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

    if not is_file(path):
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'does not exist'}. Name a file.")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if len(names) > MOST_TENSORS:
                raise UserError(f"{path}: has {len(names):,} tensors, more than any model or adapter")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            return shapes, {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or cut short ({error})") from None


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file that `read_shapes` could open."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, LookupError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: holds numbers of a kind that torch does not know ({reason(error)})") from None


def read_pickle(path: Path) -> tuple[Tensors, Header]:
    """Tensors of a pickle, by torch's reader that runs no code from it, and the word it names if it is an embedding.

    Raises:
        UserError: it holds more than tensors, or is no pickle.
    """
    import torch

    _check_unpacked(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a pickle's commands bring about
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read without running code from it, so it is refused ({why})") from None
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    header: Header = {}
    if isinstance(held, dict) and isinstance(held.get("string_to_param"), dict) and held["string_to_param"]:
        header = {"trigger": str(held.get("name") or path.stem)}
        held = {"emb_params": next(iter(held["string_to_param"].values()))}
    if not isinstance(held, dict) or not all(_is_plain(value) for value in held.values()):
        raise UserError(f"{path}: holds no table of tensors. It is neither a LoRA nor an embedding.")
    return {str(name): value.detach() for name, value in held.items()}, header


def _check_unpacked(path: Path) -> None:
    """Raises: UserError when a zip says that it holds more bytes than it has; torch packs nothing."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # older pickles are no zips
        return
    if size > path.stat().st_size:
        raise UserError(f"{path}: unpacks to {size:,} bytes, more than it has, as no file of torch does")


def _is_plain(value: Any) -> bool:
    """A tensor with numbers of its own: a few can be stretched to any shape."""
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()
