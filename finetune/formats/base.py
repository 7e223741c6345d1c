"""What a format must do, and the two ways through all of them: `read` and `write`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from finetune.adapter import AdapterWeights, Content, WordVectors, check_finite, in_precision, not_finite
from finetune.errors import UserError, reason
from finetune.files import Header, Tensors, read_pickle, read_shapes, read_tensors, whole, write_tensors
from finetune.registry import Registry

PICKLES = {".pt", ".ckpt", ".bin", ".pth"}
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)  # all of their numbers float16 has, and torch counts with none
# What was true of the tensors as another file had them.
STALE = ("sshs_", "ss_network_", "modelspec.hash_sha256", "modelspec.implementation", "lora_adapter_metadata", "format")


class Format(ABC):
    """A way to keep an adapter in a file: names of tensors, and metadata."""

    kind: ClassVar[type[AdapterWeights] | type[WordVectors]]
    ending: ClassVar[str]  # of the default file name

    @classmethod
    @abstractmethod
    def recognises(cls, names: Mapping[str, Any]) -> bool:
        """Whether these names of tensors are in this format."""

    @classmethod
    @abstractmethod
    def decode(cls, tensors: Tensors, header: Header, path: Path) -> Content:
        """Raises: UserError saying which tensor is wrong, without the file's name."""

    @classmethod
    @abstractmethod
    def encode(cls, content: Any, path: Path) -> tuple[Tensors, Header]:
        """Tensors in the precision that the content has or, where they had to be computed, in float32.

        Raises:
            UserError: the format cannot hold it.
        """

    @classmethod
    def seal(cls, tensors: Tensors) -> Header:
        """What the header says of the finished tensors."""
        return {}

    @classmethod
    def pickled(cls, content: Any, tensors: Tensors) -> Any:
        """What a pickle holds, where other programs expect one; None where they do not."""
        return None


formats: Registry[Format] = Registry("format", "finetune.formats")


def recognise(names: Mapping[str, Any]) -> str | None:
    """The name of the format that these tensors are in."""
    return next((name for name in formats.names() if formats[name].recognises(names)), None)


def read(path: Path, *, allow_pickle: bool = False, architecture: str | None = None) -> Content:
    """An adapter file in any of the formats; `architecture` says which model it is for where the file does not.

    Raises:
        UserError: it is no adapter, is damaged, or is a pickle that was not asked for.
    """
    content = parse(path, allow_pickle=allow_pickle, architecture=architecture)[1]
    try:
        check_finite(content)
    except UserError as error:
        raise UserError(f"{path}: {problem}" for problem in error.problems) from None
    return content


def parse(path: Path, *, allow_pickle: bool = False, architecture: str | None = None) -> tuple[str, Content]:
    """The format's name and the content, which may hold NaN."""
    tensors: Tensors | None = None
    if path.suffix in PICKLES:
        if not allow_pickle:
            raise UserError(f"{path}: a pickle can run code when it is opened. Trust it with --allow-pickle.")
        if not path.is_file():
            raise UserError(f"{path}: does not exist. Name a file.")
        tensors, header = read_pickle(path)
        names: Mapping[str, Any] = tensors
    else:
        names, header = read_shapes(path)
    name = recognise(names)
    if name is None:
        raise UserError(f"{path}: {describe_unknown(names)}")
    header = header if architecture is None else {**header, "architecture": architecture}
    tensors = read_tensors(path) if tensors is None else tensors
    tensors = {key: value.half() if value.dtype in EIGHT_BITS else value for key, value in tensors.items()}
    try:
        return name, formats[name].decode(tensors, header, path)
    except UserError as error:
        raise UserError(f"{path}: {problem}" for problem in error.problems) from None


def describe_unknown(names: Mapping[str, Any]) -> str:
    """What a file that is no adapter is."""
    if not names:
        return "holds no tensors"
    first = min(names)
    return f"neither a LoRA nor an embedding: {len(names)} tensors such as {first!r}. `finetune inspect` tells more."


def write(content: Content, path: Path, to: str, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """The file in a format; in the content's own precision unless `dtype` says another.

    Raises:
        UserError: the format cannot hold it, or the file exists, or may not be written.
    """
    chosen = formats[to]
    if not isinstance(content, chosen.kind):
        fitting = [name for name in formats.names() if isinstance(content, formats[name].kind)]
        raise UserError(f"--to {to}: not a format of {content.kind}s. Known for them: {', '.join(fitting)}.")
    tensors, header = chosen.encode(content, path)
    dtype = dtype or content.dtype
    tensors = in_precision(tensors, dtype)
    infinite = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if infinite and not not_finite(content):
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{path}: not written, as {infinite[0]} has numbers that are too large for {kind}")
    held = chosen.pickled(content, tensors) if path.suffix in PICKLES else None
    if held is None and path.suffix != ".safetensors":
        raise UserError(f"--output {path}: {to} is written as .safetensors")
    known = {"architecture": content.architecture} if content.architecture else {}
    header = {**_kept(content.header), **known, **header, **chosen.seal(tensors)}
    try:
        if held is None:
            return write_tensors(tensors, path, header, overwrite=overwrite)
        with whole(path, overwrite=overwrite) as unfinished:
            torch.save(held, unfinished)
    except PermissionError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)}). Name another place with --output.") from None
    return path


def _kept(header: Mapping[str, str]) -> Header:
    return {key: value for key, value in header.items() if not key.startswith(STALE)}


def to_diffusers(weights: AdapterWeights) -> Tensors:
    """The state dict that `pipeline.load_lora_weights` takes: every scale is 1, whatever diffusers makes of alphas.

    Raises:
        UserError: diffusers cannot load a part of it.
    """
    return formats["diffusers"].encode(weights, Path())[0]
