"""What the user can mend, as opposed to what is a bug."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """One or several problems, each saying what is wrong, where, and what to do.

    The command line prints them without a traceback and leaves with status 2.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def warn(text: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"warning: {text}", file=sys.stderr)


def reason(error: BaseException) -> str:
    """What went wrong in one line, without an error's number and the file that it is about."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The closest known word as a question, or all of them as a list."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
