"""Words of one or several trained vectors, beside a text encoder's frozen vocabulary.

Shapes: V words of the vocabulary, K trained vectors, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.errors import UserError
from finetune.families.base import Family


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table followed by a few trained rows.

    Only `new` is trained, so there are no other rows to restore after a step,
    no weight decay on them, and no optimizer state for the vocabulary.
    """

    def __init__(self, table: nn.Embedding, new: Tensor, word: str):
        super().__init__()
        self.word = word
        self.table = table  # (V, D), frozen
        self.new = nn.Parameter(new)  # (K, D)

    @property
    def weight(self) -> Tensor:
        """(V + K, D)."""
        return torch.cat([self.table.weight, self.new.to(self.table.weight)])

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L), the new ones being V..V+K-1, to embeddings (B, L, D)."""
        size = len(self.table.weight)
        old = self.table(ids.clamp(max=size - 1))
        new = F.embedding((ids - size).clamp(min=0), self.new).to(old)
        return torch.where((ids >= size).unsqueeze(-1), new, old)

    def median_norm(self) -> Tensor:
        """Length of a typical word's vector."""
        return self.table.weight.float().norm(dim=1).median()


def extend(family: Family, placeholder: str, num_vectors: int, init: str) -> dict[str, ExtendedEmbedding]:
    """Add the placeholder to every text encoder and its tokenizer; the tables by encoder."""
    return {
        encoder: _extend(
            getattr(family.pipeline, encoder), getattr(family.pipeline, name), placeholder, num_vectors, init
        )
        for encoder, name in family.text_encoders.items()
    }


def _extend(encoder: Any, tokenizer: Any, placeholder: str, num_vectors: int, init: str) -> ExtendedEmbedding:
    table = encoder.get_input_embeddings()
    start = _starting_vectors(table, tokenizer, init)
    words = [placeholder, *(f"{placeholder}_{i}" for i in range(1, num_vectors))]
    taken = [word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) == 1]
    if taken or tokenizer.add_tokens(words) != num_vectors or len(tokenizer) != len(table.weight) + num_vectors:
        raise UserError(
            f"placeholder: {(taken or words)[0]!r} is already a word of {type(tokenizer).__name__}. "
            "Choose one that nobody writes, such as '<my-concept>'."
        )
    extended = ExtendedEmbedding(table, _spread(start, num_vectors), placeholder)
    encoder.set_input_embeddings(extended.to(table.weight.device))
    return extended


def _starting_vectors(table: nn.Embedding, tokenizer: Any, init: str) -> Tensor:
    """The words of `init`, or the vectors of an embedding file: (n, D), float32."""
    if init.endswith(".safetensors"):
        from safetensors.torch import load_file

        if not Path(init).is_file():
            raise UserError(f"method.init: {init} does not exist")
        vectors = list(load_file(init).values())
        if len(vectors) != 1 or vectors[0].shape[-1:] != table.weight.shape[-1:]:
            raise UserError(f"method.init: {init} holds no embedding of width {table.weight.shape[-1]}")
        return vectors[0].float().reshape(-1, table.weight.shape[-1])
    ids = tokenizer(init, add_special_tokens=False).input_ids
    if not ids:
        raise UserError("method.init: name at least one word, such as the concept's class")
    return table.weight[ids].detach().float()


def _spread(start: Tensor, num_vectors: int) -> Tensor:
    """One vector is the mean of all words; several take the words in turn: (K, D)."""
    if num_vectors == 1:
        return start.mean(0, keepdim=True)
    return start[torch.arange(num_vectors) % len(start)].clone()


def words(family: Family) -> dict[str, ExtendedEmbedding]:
    """The extended tables by text encoder."""
    tables = {name: getattr(family.pipeline, name).get_input_embeddings() for name in family.text_encoders}
    return {name: table for name, table in tables.items() if isinstance(table, ExtendedEmbedding)}


def rescale(tables: Sequence[ExtendedEmbedding]) -> None:
    """Give every new vector the length of a typical word, which keeps prompts editable."""
    with torch.no_grad():
        for table in tables:
            table.new.mul_(table.median_norm() / table.new.norm(dim=1, keepdim=True))
