"""What is drawn: lists of sentences, with the subject or with its class in the place of `{}`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError, brief, did_you_mean, reason
from finetune.files import is_file, read_bytes

FOLDER = Path(__file__).parent / "prompts"
LARGEST = 2**20  # bytes of a list
# "{} style" and "in the style of {}" name how something is drawn, and not what.
STYLE = re.compile(r"\{\} style|style of \{\}")
ARTICLE = re.compile(r"\b(?:an?|the) \{\}")


@dataclass(frozen=True)
class Prompts:
    """A list of prompts.

    In lists for subjects `{}` is the subject with its article. In lists for styles it is the style's word, in a clause
    of its own after the last comma.
    """

    name: str
    lines: tuple[str, ...]

    @classmethod
    def load(cls, name: str) -> Prompts:
        """A list of this package by its name, or a text file with a prompt on each line; `#` begins a comment.

        Raises:
            UserError: there is none of that name, or lines cannot be used.
        """
        path = FOLDER / f"{name}.txt" if name in names() else Path(name)
        if not is_file(path):
            raise UserError(
                f"--prompts {brief(name)}: no such file, and no list of that name. {did_you_mean(name, names())}"
            )
        try:
            text = read_bytes(path, LARGEST).decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise UserError(f"--prompts: {path} cannot be read as text ({reason(error)})") from None
        numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        numbered = [(number, line) for number, line in numbered if line and not line.startswith("#")]
        styled = any(STYLE.search(line) for _, line in numbered)
        problems = [
            f"--prompts: {path}, line {number}: {brief(line)} {wrong}"
            for number, line in numbered
            if (wrong := _misfit(line, styled))
        ]
        if problems or not numbered:
            raise UserError(problems or f"--prompts: {path} has no prompts")
        return cls(name, tuple(ARTICLE.sub("{}", line) for _, line in numbered))

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def is_style(self) -> bool:
        return STYLE.search(self.lines[0]) is not None

    def with_class(self, class_prompt: str | None) -> tuple[str, ...]:
        """Each prompt as the base knows it: with the class in the subject's place, or without the style's clause."""
        if self.is_style:
            return tuple(line.rpartition(",")[0].strip() for line in self.lines)
        return tuple(line.replace("{}", class_prompt or "") for line in self.lines)


def names() -> list[str]:
    """The lists of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def _misfit(line: str, styled: bool) -> str | None:
    """Why a line cannot stand in a list, if so."""
    if "{}" not in line:
        return "has no {}, which is the subject's place"
    before, _, clause = line.rpartition(",")
    if styled and (not before or "{}" in before or not STYLE.search(clause)):
        return "needs its style in a clause of its own at the end, such as 'a dog, {} style'"
    return None
