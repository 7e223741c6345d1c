"""What a run will do, worked out before any model loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.dataset.scan import Picture, scan
from finetune.errors import UserError
from finetune.methods.base import Prior
from finetune.recipe import Recipe


def check(recipe: Recipe[Any]) -> list[Picture]:
    """The recipe's pictures; UserError with everything that is wrong with them or their captions."""
    pictures = scan(recipe.dataset)
    if recipe.method.trains_word:
        lacking = [
            f"{picture.path}: its caption {caption!r} has neither {{}} nor {recipe.placeholder!r} in it"
            for picture in pictures
            for caption in picture.captions
            if not recipe.has_placeholder(caption)
        ]
        if lacking:
            raise UserError(lacking)
    return pictures


def plan(recipe: Recipe[Any], pictures: Sequence[Picture]) -> dict[str, str]:
    """A line for each thing that a user wants to know first."""
    train, method = recipe.train, recipe.method
    smallest = min(min(picture.width, picture.height) for picture in pictures)
    enlarged = f", the smallest enlarged from {smallest}" if smallest < recipe.dataset.resolution else ""
    seen = train.steps * train.batch_size / len(pictures)
    return {
        "method": f"{method.name}: {method.summary}",
        "base": recipe.base.source,
        "pictures": f"{len(pictures)} in {recipe.dataset.where}, trained at {recipe.dataset.resolution} px{enlarged}",
        "captions": recipe.fill(pictures[0].captions[0]),
        "steps": f"{train.steps} updates of {train.batch_size} pictures: each is seen {seen:.3g} times",
        "prior": _describe(method.prior_half),
        "output": str(recipe.output.folder),
    }


def _describe(prior: Prior | None) -> str:
    if prior is None:
        return "none"
    if prior.source == "prediction":
        return f"the base's own prediction on {prior.prompt!r}"
    return f"{prior.count} pictures of {prior.prompt!r}, made by the base"
