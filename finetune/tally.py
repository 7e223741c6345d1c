"""How many weights a recipe trains and writes, counted on the headers of the base's files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.methods.lora import LoRA, names
from finetune.outline import Outline, Shape
from finetune.recipe import Recipe

EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight", "embed_tokens.weight", "shared.weight")
BUFFERS = ("pos_embed.pos_embed", "position_ids")  # in the files, and never trained


@dataclass(frozen=True)
class Tally:
    """Numbers, each of several bytes."""

    trained: int
    exported: int  # in the small files


def tally(recipe: Recipe[Any], base: Outline) -> Tally | None:
    """None where headers do not tell: the weights are elsewhere or in a single file, or it is LoKr."""
    method, encoders = recipe.method, base.text_encoders
    if not isinstance(method, LoRA):
        words = _words(recipe, base)
        return Tally(words, words) if words else None
    parts = [base.stated["denoiser_name"]]
    parts += [name for name in encoders if name in base.stated["text_lora"] and method.text_encoder]
    shapes = {part: base.shapes(part) for part in parts}
    if not all(shapes.values()) or method.variant == "lokr":
        return None
    if getattr(method, "denoiser", "lora") == "whole":
        whole = [found for part in shapes.values() for found in part.items()]
        trained = sum(math.prod(shape) for name, shape in whole if not name.endswith(BUFFERS))
        layers = [shape for part in shapes.values() for shape in layers_of(part).values()]
        return Tally(trained, sum(_factors(method.rank, shape) for shape in layers))
    found = [_adapter(method, name, shape) for part in parts for name, shape in _targets(method, base, part, shapes)]
    words = _words(recipe, base)
    return Tally(sum(trained for trained, _ in found) + words, sum(exported for _, exported in found) + words)


def layers_of(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The linear and convolution layers, by the shapes of their weights."""
    ending = ".weight"
    return {
        name.removesuffix(ending): shape
        for name, shape in shapes.items()
        if name.endswith(ending) and len(shape) in (2, 4) and not name.endswith(EMBEDDINGS)
    }


def _targets(
    method: LoRA, base: Outline, part: str, shapes: Mapping[str, Mapping[str, Shape]]
) -> Iterator[tuple[str, Shape]]:
    layers, stated = layers_of(shapes[part]), base.stated
    if part == stated["denoiser_name"]:
        presets = {name: stated[name] for name in ("attention", "feed_forward")}
        wanted = [suffix for target in method.targets for suffix in presets.get(target, (target,))]
    else:
        wanted = list(stated["text_attention"])
    for name, shape in layers.items():
        whole = "convolution" in wanted or ("linear" in wanted and len(shape) == 2)
        if whole or any(name == suffix or name.endswith(f".{suffix}") for suffix in wanted):
            yield name, shape


def _adapter(method: LoRA, name: str, shape: Shape) -> tuple[int, int]:
    """Numbers of one layer that are trained, and that are written."""
    ranks = (rank for pattern, rank in method.rank_pattern.items() if names(pattern, name))
    rank = next(ranks, method.rank)
    both = shape[0] + math.prod(shape[1:])
    if method.variant == "loha":
        return 2 * rank * both, _factors(rank**2, shape)
    lengths = shape[0] * (method.variant == "dora")
    return rank * both + lengths, rank * both * (2 if method.variant == "pissa" else 1) + lengths


def _factors(rank: int, shape: Shape) -> int:
    """Of a low-rank update, which never has a higher rank than its layer."""
    inputs = math.prod(shape[1:])
    return min(rank, shape[0], inputs) * (shape[0] + inputs)


def _words(recipe: Recipe[Any], base: Outline) -> int:
    """A word has its vectors in each text encoder."""
    if not recipe.method.trains_word:
        return 0
    configs = [base.config(encoder) for encoder in base.text_encoders]
    widths = [config.get("hidden_size") or config.get("d_model") or 0 for config in configs]
    return getattr(recipe.method, "num_vectors", 1) * sum(width for width in widths if isinstance(width, int))
