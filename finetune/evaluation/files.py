"""An evaluation's folder: `evaluation.json`, `scores.csv` and the pictures; and what the model card says of it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.errors import UserError, reason
from finetune.evaluation.result import Evaluation, PictureScores
from finetune.evaluation.scoring import FOLDER as PICTURES
from finetune.evaluation.studio import Pictures
from finetune.evaluation.words import called, describe, means
from finetune.files import whole
from finetune.folder import CARD_FILE

RESULT, TABLE, SUMMARY = "evaluation.json", "scores.csv", "summary.json"
BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def check(folder: Path, *, overwrite: bool) -> None:
    """Whether an evaluation may be written there, before time is spent on it.

    Raises:
        UserError: there is one already, or something else, which is never replaced.
    """
    try:
        held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written to ({reason(error)}). Name a folder.") from None
    if held and RESULT not in held:
        raise UserError(f"--output: {folder} holds something else ({held[0]}). Name another folder.")
    if held and not overwrite:
        raise UserError(f"{folder} holds an evaluation already. Replace it with --overwrite, or name another --output.")


def write(found: Evaluation, pictures: Pictures, folder: Path) -> None:
    """The whole folder or nothing; then the card beside it, where there is one."""
    with whole(folder, overwrite=True) as unfinished:
        (unfinished / PICTURES).mkdir(parents=True)
        for shot, picture in pictures.items():
            picture.save(unfinished / PICTURES / shot.name)
        (unfinished / RESULT).write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
        _write_rows(found.pictures, unfinished / TABLE)
    card = Path(found.adapter) / CARD_FILE
    if card.is_file():
        state(found, card)


def write_summary(every: Sequence[Evaluation], folder: Path) -> None:
    """Several evaluations below one folder: which is which, and their means over subjects."""
    summary = {"runs": {found.name: found.adapter for found in every}, "means": means(every)}
    with whole(folder / SUMMARY, overwrite=True) as unfinished:
        unfinished.write_text(json.dumps(summary, indent=2, default=asdict) + "\n", encoding="utf-8")


def state(found: Evaluation, card: Path) -> None:
    """Say in a model card what was measured, in the place of what an earlier evaluation said."""
    text = card.read_text(encoding="utf-8")
    without = re.sub(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", "\n", text, flags=re.DOTALL)
    best = "" if found.sweep is None or found.sweep.best is None else f"The best weight is **{found.sweep.best:g}**. "
    scores = found.scores[0]
    section = (
        f"## Measured\n\n{best}By `{called(scores.encoder)}` on {found.num_prompts} prompts with {found.seeds} "
        "pictures each; in brackets 95 % intervals.\n\n"
        + "\n".join(f"- {title}: {text}" for title, text in describe(found).items())
    )
    with whole(card, overwrite=True) as unfinished:
        unfinished.write_text(f"{without.rstrip()}\n\n{BEGIN}\n{section}\n{END}\n", encoding="utf-8")


def _write_rows(rows: Sequence[PictureScores], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = [_flat(asdict(row)) for row in rows]
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """`identity: {name: score}` as a column `identity name`."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= {f"{key} {name}": score for name, score in value.items()} if isinstance(value, dict) else {key: value}
    return flat
