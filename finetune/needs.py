"""What `check --memory` says: the memory and the time of a run, and with which settings it fits a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from finetune.duration import duration
from finetune.forecast import Forecast
from finetune.memory import Memory, estimate, table
from finetune.recipe import Recipe
from finetune.shortage import savings

GIB = 2**30
CONTEXT = 0.5  # GiB of CUDA's own
ROOM = 0.94  # of a card that is not lost to its display and to fragmentation
Settings = Mapping[str, Any]  # section.key -> value


def needs(
    recipe: Recipe[Any], captions: Sequence[str], forecast: Forecast, card: float | None
) -> tuple[list[str], dict[str, Any]]:
    """For people, a line each, and for programs.

    Args:
        captions: of the recipe's pictures.
        card: GiB of a GPU; default: that of this machine, if there is one.
    """
    needed = estimate(recipe, captions)
    time = duration(recipe, needed.work, forecast, len(set(captions)))
    totals = {"step": needed.step, "run": needed.run, "checkpoint": needed.checkpoint}
    lines, found = [*table(needed), *time.lines()], {"memory": {**asdict(needed), **totals}, "time": time.as_dict()}
    if card is None and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0).total_memory / GIB
    if card is not None:
        changes = fit(recipe, captions, needed, card)
        lines.append(_in_words(changes, needed, card))
        found["fit"] = {"card": card, "settings": changes}
    return lines, found


def fit(recipe: Recipe[Any], captions: Sequence[str], needed: Memory, card: float) -> Settings | None:
    """The cheapest changes to a recipe with which its run fits a card; none where no changes are enough.

    Args:
        needed: by the recipe as it is.
        card: GiB.
    """

    def fits(settings: Settings) -> bool:
        memory = estimate(_changed(recipe, settings), captions) if settings else needed
        return memory.run / GIB + CONTEXT <= ROOM * card

    settings: dict[str, Any] = {}
    if fits(settings):
        return settings
    for name, value in savings(recipe):
        settings[name] = value
        if fits(settings):
            break
    else:
        return None
    for name in list(settings)[:-1]:  # the last one is what made it fit
        rest = {other: value for other, value in settings.items() if other != name}
        if fits(rest):
            settings = rest
    return settings


def _changed(recipe: Recipe[Any], settings: Settings) -> Recipe[Any]:
    for name, value in settings.items():
        section, _, key = name.partition(".")
        part = getattr(recipe, section).model_copy(update={key: value})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def _in_words(changes: Settings | None, needed: Memory, card: float) -> str:
    if changes is None:
        return (
            f"fit       no setting brings it into {card:.3g} GiB; a smaller base or dataset.resolution is what is left"
        )
    if not changes:
        return f"fit       {needed.run / GIB:.1f} GiB fit into {card:.3g} GiB"
    told = " ".join(f"{name}={str(value).lower()}" for name, value in changes.items())
    return f"fit       into {card:.3g} GiB it fits with {told}"
