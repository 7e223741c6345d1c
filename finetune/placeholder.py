"""Placeholder words in a pipeline: added to its text encoders, spelt for its tokenizers, and never taken for an end.

Shapes: K vectors of a word, D their width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError


def names_of(word: str, num_vectors: int) -> list[str]:
    """What the vectors of a word are called: `it`, `it_1`, `it_2`, the way every pipeline of diffusers has it."""
    return [word, *(f"{word}_{i}" for i in range(1, num_vectors))]


def spell(caption: str, tokenizer: Any) -> str:
    """The caption with each word of several vectors written out: `it` becomes `it it_1 it_2`."""
    known = tokenizer.get_added_vocab()
    for word in known:
        names = [name for name in names_of(word, len(known)) if name in known]
        if len(names) > 1:
            caption = re.sub(rf"{re.escape(word)}(?!_\d)", " ".join(names).replace("\\", r"\\"), caption)
    return caption


def register(tokenizer: Any, word: str, num_vectors: int) -> int:
    """Teach the tokenizer a word; the id of its first vector, which the others follow.

    Raises:
        UserError: it is a word already.
    """
    names = names_of(word, num_vectors)
    taken = [name for name in names if len(tokenizer(name, add_special_tokens=False).input_ids) == 1]
    if taken or tokenizer.add_tokens(names) != num_vectors:
        raise UserError(
            f"placeholder: {(taken or names)[0]!r} is already a word of {type(tokenizer).__name__}. "
            "Choose one that nobody writes, such as '<my-concept>'."
        )
    return tokenizer.convert_tokens_to_ids(word)


def add_word(encoder: Any, tokenizer: Any, word: str, vectors: Tensor) -> None:
    """Give a text encoder a word with its vectors (K, D)."""
    first = register(tokenizer, word, len(vectors))
    # Vocabularies are often padded: T5's and Qwen's tables have rows that no token uses.
    if first + len(vectors) > encoder.get_input_embeddings().num_embeddings:
        encoder.resize_token_embeddings(first + len(vectors), mean_resizing=False)
    with torch.no_grad():
        table = encoder.get_input_embeddings().weight
        table[first : first + len(vectors)] = vectors.to(table)


def pool_at_the_end(pipeline: Any) -> None:
    """Make CLIP pool at the end of the caption, as it was trained to.

    Configs of old checkpoints say that the end token is 2, and CLIP then takes the
    highest id for the end: a new word's, as soon as there is one.
    """
    for name in ("", "_2"):
        encoder, tokenizer = (getattr(pipeline, part + name, None) for part in ("text_encoder", "tokenizer"))
        for part in encoder.modules() if isinstance(encoder, torch.nn.Module) else ():
            if getattr(part, "eos_token_id", None) == 2 and tokenizer is not None:
                part.eos_token_id = tokenizer.eos_token_id
