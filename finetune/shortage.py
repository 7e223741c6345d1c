"""Out of memory: which settings need less of it, the cheapest first."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import UserError, reason

if TYPE_CHECKING:
    from finetune.recipe import Recipe

# What torch and the libraries beneath it say that have no error of their own for it.
SIGNS = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|ALLOC_FAILED|could not create a primitive$",
    re.IGNORECASE,
)
STEPS_OF_RESOLUTION = 64
Kind = Literal["training", "drawing", "else"]  # of work; only the first keeps what gradients need


class OutOfMemory(UserError):
    """What was being done, and what would need less."""


@contextmanager
def explained(recipe: Recipe[Any], doing: str, kind: Kind) -> Iterator[None]:
    """Say what would help where memory runs out.

    Args:
        doing: what is at work, as in "step 3".

    Raises:
        OutOfMemory: nothing that was at work is held any more.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is the former
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        device = "GPU" if type(error).__name__ == "OutOfMemoryError" or "CUDA" in str(error) else "computer"
        what = f"{doing}: the {device} is out of memory ({_short(error)})."
    else:
        return
    raise OutOfMemory([what, *ways_out(recipe, kind)])


def is_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or bool(SIGNS.search(str(error)))
    )


def ways_out(recipe: Recipe[Any], kind: Kind) -> list[str]:
    """Settings that are not in use yet: those that leave what is learnt alone, then those that do not."""
    same, other = {"training": _while_training, "drawing": _while_drawing}.get(kind, lambda _: ([], []))(recipe)
    other += _smaller(recipe)
    lines = []
    if same:
        lines.append(f"Cheapest first, these learn the same, also after --resume: {'; '.join(same)}.")
    if other:
        lines.append(f"{'Then these' if same else 'These'}, for a new run: {'; '.join(other)}.")
    return lines or ["A smaller base is what is left."]


def savings(recipe: Recipe[Any]) -> Iterator[tuple[str, Any]]:
    """Settings that need less memory than the recipe's, by what they cost: first those that learn the same."""
    train = recipe.train
    for parts in range(train.accumulate + 1, train.batch_size + 1):
        if train.batch_size % parts == 0:
            yield "train.accumulate", parts
    if train.gradient_checkpointing is not True:
        yield "train.gradient_checkpointing", True
    if recipe.validation.batch_size > 1:
        yield "validation.batch_size", 1
    if train.precision == "no":
        yield "train.precision", "bf16"
    if train.optimizer == "adamw":
        yield "train.optimizer", "adamw_8bit"
    if recipe.base.quantize is None and recipe.method.takes_quantized:
        yield "base.quantize", "fp8"
    if recipe.base.quantize in (None, "fp8") and recipe.method.takes_quantized:
        yield "base.quantize", "nf4"


def _while_drawing(recipe: Recipe[Any]) -> tuple[list[str], list[str]]:
    return _told(recipe, {"validation.batch_size": f"not {recipe.validation.batch_size} pictures at once"}, ", "), []


def _while_training(recipe: Recipe[Any]) -> tuple[list[str], list[str]]:
    same = {
        "train.accumulate": "(a step in more parts, hardly slower)",
        "train.gradient_checkpointing": "(about a third slower)",
    }
    other = {
        "train.precision": "(half of the activations, on a GPU)",
        "train.optimizer": "(2 bytes for each trained weight, not 8)",
    }
    return _told(recipe, same), _told(recipe, other)


def _smaller(recipe: Recipe[Any]) -> list[str]:
    found = _told(recipe, {"base.quantize": "(the frozen weights in fewer bits)"})
    lower = recipe.dataset.resolution * 3 // 4 // STEPS_OF_RESOLUTION * STEPS_OF_RESOLUTION
    if lower:
        found.append(f"dataset.resolution={lower} (about half of the activations)")
    return found


def _told(recipe: Recipe[Any], costs: Mapping[str, str], between: str = " ") -> list[str]:
    """Those of the savings whose costs are told; of one setting the first value, and the last it may go to."""
    values: dict[str, list[str]] = {}
    for name, value in savings(recipe):
        values.setdefault(name, []).append(str(value).lower() if value is True else str(value))
    shown = {name: f"{found[0]}, up to {found[-1]}" if found[1:] else found[0] for name, found in values.items()}
    return [f"{name}={shown[name]}{between}{cost}" for name, cost in costs.items() if name in shown]


def _short(error: BaseException) -> str:
    """The first sentence, which says how much was asked for."""
    found = re.search(r"[Tt]ried to allocate [\d,.]+ ?\w+", str(error))
    return found[0] if found else reason(error).split(". ")[0]
