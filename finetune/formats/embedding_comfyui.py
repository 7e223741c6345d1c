"""An embedding of several text encoders by their names, as ComfyUI and A1111 have it; the file's name is the word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapter import WordVectors
from finetune.architectures import from_header, from_vectors
from finetune.errors import UserError
from finetune.files import Header, Tensors
from finetune.formats.base import Format, formats
from finetune.formats.embedding import ENCODERS, as_vectors


@formats.register
class ComfyUIEmbedding(Format):
    """`{"clip_l": (K, D1), "clip_g": (K, D2), "t5": (K, D3)}`, whichever the model has. `t5xxl` is read as `t5`."""

    kind = WordVectors
    ending = ".safetensors"

    @classmethod
    def recognises(cls, names: Mapping[str, Any]) -> bool:
        return bool(names) and names.keys() <= ENCODERS.keys()

    @classmethod
    def decode(cls, tensors: Tensors, header: Header, path: Path) -> WordVectors:
        vectors = {ENCODERS[name]: as_vectors(name, tensor) for name, tensor in tensors.items()}
        if len({len(found) for found in vectors.values()}) > 1:
            counts = ", ".join(f"{name} has {len(found)}" for name, found in vectors.items())
            raise UserError(f"a word must have as many vectors in each text encoder, and {counts}")
        widths = {name: found.shape[1] for name, found in vectors.items()}
        architecture = from_header(header) or from_vectors(widths)
        return WordVectors(header.get("trigger", path.stem), vectors, architecture, header)

    @classmethod
    def encode(cls, content: WordVectors, path: Path) -> tuple[Tensors, Header]:
        return dict(content.vectors), {"trigger": content.word}
