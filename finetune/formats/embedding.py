"""An embedding of one text encoder under its word: what diffusers' `load_textual_inversion` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapter import WordVectors, is_adapter
from finetune.architectures import from_header, from_vectors
from finetune.errors import UserError
from finetune.files import Header, Tensors
from finetune.formats.base import Format, formats

ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5", "t5xxl": "t5", "qwen3": "qwen3"}


def as_vectors(name: str, tensor: Any) -> Any:
    """(K, D), from that or from one vector (D,).

    Raises:
        UserError: it is neither.
    """
    vectors = tensor[None] if tensor.ndim == 1 else tensor
    if vectors.ndim != 2 or 0 in vectors.shape or not vectors.is_floating_point():
        raise UserError(f"{name}: the vectors of a word are of shape (K, D), these are {tuple(tensor.shape)}")
    return vectors


@formats.register
class Embedding(Format):
    """`{word: (K, D)}`."""

    kind = WordVectors
    ending = ".embedding.safetensors"

    @classmethod
    def recognises(cls, names: Mapping[str, Any]) -> bool:
        layer = any(name.endswith((".weight", ".bias")) for name in names)
        return len(names) == 1 and not layer and not is_adapter(names) and not names.keys() & {*ENCODERS, "emb_params"}

    @classmethod
    def decode(cls, tensors: Tensors, header: Header, path: Path) -> WordVectors:
        ((word, tensor),) = tensors.items()
        return of_one_encoder(word, as_vectors(word, tensor), header)

    @classmethod
    def encode(cls, content: WordVectors, path: Path) -> tuple[Tensors, Header]:
        return {content.word: only_vectors(content, "embedding")}, {"trigger": content.word}


def of_one_encoder(word: str, vectors: Any, header: Header) -> WordVectors:
    """The word of an encoder that the file does not name: CLIP's, but in Z-Image."""
    architecture = from_header(header) or from_vectors({"clip_l": vectors.shape[1]})
    return WordVectors(word, {"qwen3" if architecture == "z_image" else "clip_l": vectors}, architecture, header)


def only_vectors(content: WordVectors, to: str) -> Any:
    """The vectors of the one encoder.

    Raises:
        UserError: there are several.
    """
    if len(content.vectors) > 1:
        raise UserError(
            f"--to {to}: holds the vectors of one text encoder, and this embedding has {', '.join(content.vectors)}. "
            "Use embedding_comfyui, which every program reads for such models."
        )
    return next(iter(content.vectors.values()))
