"""An embedding as A1111 has it: `emb_params`, and the file's name is the word. `.pt` when the output is named so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapter import WordVectors
from finetune.files import Header, Tensors
from finetune.formats.base import Format, formats
from finetune.formats.embedding import as_vectors, of_one_encoder, only_vectors

STAR = 265  # what A1111 writes as the id of "*"; nothing reads it


@formats.register
class A1111Embedding(Format):
    """`{"emb_params": (K, D)}`, or a pickle with `string_to_param` and the word as `name`."""

    kind = WordVectors
    ending = ".safetensors"

    @classmethod
    def recognises(cls, names: Mapping[str, Any]) -> bool:
        return names.keys() == {"emb_params"}

    @classmethod
    def decode(cls, tensors: Tensors, header: Header, path: Path) -> WordVectors:
        vectors = as_vectors("emb_params", tensors["emb_params"])
        return of_one_encoder(header.get("trigger", path.stem), vectors, header)

    @classmethod
    def encode(cls, content: WordVectors, path: Path) -> tuple[Tensors, Header]:
        return {"emb_params": only_vectors(content, "embedding_a1111")}, {"trigger": content.word}

    @classmethod
    def pickled(cls, content: WordVectors, tensors: Tensors) -> Any:
        steps = content.header.get("steps", "")
        return {
            "string_to_token": {"*": STAR},
            "string_to_param": {"*": tensors["emb_params"]},
            "name": content.word,
            "step": int(steps) if re.fullmatch(r"[0-9]{1,9}", steps) else 0,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
        }
