"""Out of memory: which settings need less of it, the cheapest first."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
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


def _while_drawing(recipe: Recipe[Any]) -> tuple[list[str], list[str]]:
    shown = recipe.validation.batch_size
    return [f"validation.batch_size=1, not {shown} pictures at once"] * (shown > 1), []


def _while_training(recipe: Recipe[Any]) -> tuple[list[str], list[str]]:
    train = recipe.train
    same, other = [], []
    finer = [parts for parts in range(train.accumulate + 1, train.batch_size + 1) if train.batch_size % parts == 0]
    if finer:
        parts = f"{finer[0]}, up to {finer[-1]}" if finer[1:] else f"{finer[0]}"
        same.append(f"train.accumulate={parts} (a step in more parts, hardly slower)")
    if not train.gradient_checkpointing:
        same.append("train.gradient_checkpointing=true (about a third slower)")
    if train.precision == "no":
        other.append("train.precision=bf16 (half of the activations, on a GPU)")
    if train.optimizer == "adamw":
        other.append("train.optimizer=adamw_8bit (2 bytes for each trained weight, not 8)")
    return same, other


def _smaller(recipe: Recipe[Any]) -> list[str]:
    found = []
    if recipe.base.quantize is None and recipe.method.takes_quantized:
        found.append("base.quantize=nf4 (the frozen weights in 4 bits)")
    lower = recipe.dataset.resolution * 3 // 4 // STEPS_OF_RESOLUTION * STEPS_OF_RESOLUTION
    if lower:
        found.append(f"dataset.resolution={lower} (about half of the activations)")
    return found


def _short(error: BaseException) -> str:
    """The first sentence, which says how much was asked for."""
    found = re.search(r"[Tt]ried to allocate [\d,.]+ ?\w+", str(error))
    return found[0] if found else reason(error).split(". ")[0]
