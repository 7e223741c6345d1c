"""Words of one or several trained vectors, beside a text encoder's frozen vocabulary.

Shapes: V words of the vocabulary, K trained vectors, D their width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.adapter import WordVectors
from finetune.errors import UserError
from finetune.families.base import Family
from finetune.formats import read
from finetune.placeholder import register


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table followed by a few trained rows.

    Only `new` is trained, so there are no other rows to restore after a step,
    no weight decay on them, and no optimizer state for the vocabulary.
    """

    start: Tensor  # (K, D), what the rows are before training

    def __init__(self, table: nn.Embedding, new: Tensor, word: str, first: int):
        super().__init__()
        self.word = word
        self.first = first  # the id of the first new row: V, or less where the table is padded
        self.table = table  # (V, D), frozen
        self.new = nn.Parameter(new)  # (K, D)
        self.register_buffer("start", new.clone(), persistent=False)
        self.untaught = False  # whether they are read

    @property
    def weight(self) -> Tensor:
        """(first + K, D)."""
        return torch.cat([self.table.weight[: self.first], self.new.to(self.table.weight)])

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L), the new ones being first..first+K-1, to embeddings (B, L, D)."""
        old = self.table(ids.clamp(max=self.first - 1))
        rows = self.start if self.untaught else self.new
        new = F.embedding((ids - self.first).clamp(min=0), rows).to(old)
        return torch.where((ids >= self.first).unsqueeze(-1), new, old)

    def median_norm(self) -> Tensor:
        """Length of a typical word's vector."""
        return self.table.weight[: self.first].float().norm(dim=1).median()


def extend(family: Family, placeholder: str, num_vectors: int, init: str) -> dict[str, ExtendedEmbedding]:
    """Add the placeholder to every text encoder and its tokenizer; the tables by encoder."""
    return {encoder: _extend(family, encoder, placeholder, num_vectors, init) for encoder in family.text_encoders}


def _extend(family: Family, name: str, placeholder: str, num_vectors: int, init: str) -> ExtendedEmbedding:
    encoder, tokenizer = (getattr(family.pipeline, part) for part in (name, family.text_encoders[name]))
    table = encoder.get_input_embeddings()
    start = (
        _read_vectors(table, Path(init), family.word_keys[name])
        if init.endswith(".safetensors")
        else _vectors_of_words(table, tokenizer, init)
    )
    first = register(tokenizer, placeholder, num_vectors)
    extended = ExtendedEmbedding(table, _spread(start, num_vectors), placeholder, first)
    encoder.set_input_embeddings(extended.to(table.weight.device))
    return extended


def _read_vectors(table: nn.Embedding, file: Path, key: str) -> Tensor:
    """An embedding file's vectors for one encoder, in whichever format: (n, D), float32."""
    try:
        content = read(file)
    except UserError as error:
        raise UserError(f"method.init: {problem}" for problem in error.problems) from None
    found = content.vectors if isinstance(content, WordVectors) else {}
    vectors = found.get(key, next(iter(found.values())) if len(found) == 1 else None)
    if vectors is None or vectors.shape[1] != table.weight.shape[1]:
        raise UserError(f"method.init: {file} holds no embedding of width {table.weight.shape[1]} for {key}")
    return vectors.float()


def _vectors_of_words(table: nn.Embedding, tokenizer: Any, init: str) -> Tensor:
    """The words' own vectors: (n, D), float32."""
    ids = tokenizer(init, add_special_tokens=False).input_ids
    if not ids:
        raise UserError("method.init: name at least one word, such as the concept's class")
    return table.weight[ids].detach().float()


def _spread(start: Tensor, num_vectors: int) -> Tensor:
    """One vector is the mean of all words; several take the words in turn: (K, D)."""
    if num_vectors == 1:
        return start.mean(0, keepdim=True)
    return start[torch.arange(num_vectors) % len(start)].clone()


@contextmanager
def untaught(tables: Iterable[ExtendedEmbedding]) -> Iterator[None]:
    """The words as they were before training."""
    tables = list(tables)
    for table in tables:
        table.untaught = True
    try:
        yield
    finally:
        for table in tables:
            table.untaught = False


def words(family: Family) -> dict[str, ExtendedEmbedding]:
    """The extended tables by text encoder."""
    tables = {name: getattr(family.pipeline, name).get_input_embeddings() for name in family.text_encoders}
    return {name: table for name, table in tables.items() if isinstance(table, ExtendedEmbedding)}


def rescale(tables: Sequence[ExtendedEmbedding]) -> None:
    """Give every new vector the length of a typical word, which keeps prompts editable."""
    with torch.no_grad():
        for table in tables:
            table.new.mul_(table.median_norm() / table.new.norm(dim=1, keepdim=True))
