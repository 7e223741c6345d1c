"""A run from start to end, in words on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finetune import run
from finetune.dataset import Picture
from finetune.errors import UserError, one_line
from finetune.families.base import Family
from finetune.files import read_shapes
from finetune.plan import plan, warnings
from finetune.report import show


def carry_out(recipe: Any, *, resume: bool, overwrite: bool) -> None:
    """Train, and say what was asked for and what came of it.

    Raises:
        UserError, Stopped: it ended before.
    """
    stop = run.Stop()
    with stop.listening():
        tell = partial(_tell, recipe)
        at_work = run.prepare(recipe, resume=resume, overwrite=overwrite, stop=stop, tell=tell)
        if at_work.is_main:
            print(f"{'machine':10}{at_work.describe_machine()}")
        at_work.loop()
        if not at_work.is_main:
            return
        result = at_work.finish()
    print(*result.notes, f"reloaded into a fresh pipeline: {result.verdict.error:.2%} off what was learnt", sep="\n")
    for file in result.files:
        print(f"{file}  ({_describe(file)})")
    print(*filter(None, [result.grid, result.card, show(at_work.folder)]), sep="\n")
    if at_work.unwritten:
        raise UserError([f"{what} could not be written in full ({why})" for what, why in at_work.unwritten.items()])


def _tell(recipe: Any, pictures: Sequence[Picture], family: Family) -> None:
    """What will be done, and what the user should know before the time is spent."""
    for title, text in plan(recipe, pictures).items():
        print(one_line(f"{title:10}{text}"))
    captions = sorted({recipe.fill(text) for picture in pictures for text in picture.captions})
    cut = family.too_long([*captions, *map(recipe.fill, recipe.validation.prompts)])
    unread = (f"the end of this caption is read by no text encoder: {text}" for text in cut)
    for text in [*warnings(recipe, pictures), *unread]:
        print(f"warning: {text}")
    sys.stdout.flush()  # before the bars of what follows


def _describe(file: Path) -> str:
    """Its size and, where a file holds less than was trained, how much it kept."""
    header = read_shapes(file)[1]
    kept = [
        f"{float(share):.1%} of the change of {name.removeprefix('energy_kept.')}"
        for name, share in header.items()
        if name.startswith("energy_kept.")
    ]
    return ", ".join([f"{file.stat().st_size / 1000:,.1f} kB", *kept])
