"""What keeps a new word from taking over the words around it.

A word that is trained to be seen in every picture learns to say so through its neighbours, too: a text encoder mixes
it into them, and they mean less than they did. Held to what they mean beside the words that training starts from, they
keep saying what else is in the picture.

Shapes: S sentences of at most L tokens, B samples, D a text encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finetune.batch import Batch
from finetune.families.base import Family
from finetune.vocabulary import ExtendedEmbedding, words

SENTENCES = (
    "a {} in the kitchen",
    "a {} on a bridge",
    "a {} next to a banana",
    "a {} with a hat",
    "a {} in the rain",
    "a {} on a chair",
    "a {} in front of a house",
    "a {} with flowers",
    "a {} and a ball",
    "a {} in a garden",
    "a {} on a gray background",
)
DRAWN = 1e6  # by how much a normal number is scaled before its remainder draws a sentence


@dataclass(frozen=True)
class Meaning:
    """What one text encoder says of the sentences while the new word still means what it starts from."""

    ids: Tensor  # (S, L)
    others: Tensor  # (S, L, 1), 1 at the words that are not the new one
    states: Tensor  # (S, L, D), float32


class Context:
    """The error that the new word makes in the sentences' other words.

    Args:
        weight: of the error beside the denoiser's.
    """

    def __init__(self, family: Family, placeholder: str, weight: float):
        self.family = family
        self.placeholder = placeholder
        self.weight = weight
        self.start = {name: table.new.detach().clone() for name, table in words(family).items()}

    def __call__(self, batch: Batch) -> Tensor:
        """For each sample that of one sentence, drawn by the sample's noise: (B,), weighted.

        The squared error of the text encoder's last states, as a share of their square; of several encoders, the mean.
        """
        drawn = (batch.noise.flatten(1)[:, 0].abs() * DRAWN).long() % len(SENTENCES)
        errors = []
        for name, meaning in self.meanings.items():
            others, before = meaning.others[drawn], meaning.states[drawn]
            moved = (self._states(name, meaning.ids[drawn]) - before).square()
            errors.append((others * moved).flatten(1).sum(1) / (others * before.square()).flatten(1).sum(1))
        return self.weight * torch.stack(errors).mean(0)

    @cached_property
    def meanings(self) -> dict[str, Meaning]:
        """By text encoder; found at the first step, which may be in the middle of a run that is continued."""
        texts = [sentence.replace("{}", self.placeholder) for sentence in SENTENCES]
        tokens = self.family.tokenize(texts)
        with self.family.looking():
            return {name: self._meaning(name, table, tokens[name]) for name, table in words(self.family).items()}

    def _meaning(self, name: str, table: ExtendedEmbedding, ids: Tensor) -> Meaning:
        tokenizer: Any = getattr(self.family.pipeline, self.family.text_encoders[name])
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        others = (ids < table.first) & ~special
        length = int((~special).any(0).nonzero().max()) + 1  # a sentence's padding is most of it
        ids = ids[:, :length].to(self.family.device)
        now, table.new.data = table.new.data, self.start[name].to(table.new)
        states = self._states(name, ids)
        table.new.data = now
        return Meaning(ids, others[:, :length, None].to(states), states)

    def _states(self, name: str, ids: Tensor) -> Tensor:
        """(S or B, L, D), float32"""
        return getattr(self.family.pipeline, name)(input_ids=ids).last_hidden_state.float()
