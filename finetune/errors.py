"""What the user can mend, as opposed to what is a bug."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

LONGEST, END = 2000, 300  # characters of a line, and of what is kept of its end, where it says what to do
SHOWN = 320  # characters of a value: a path has more than a hundred
# Characters that end a line, command a terminal, are no text, or turn what follows them around.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """One or several problems, each saying what is wrong, where, and what to do.

    The command line prints them without a traceback and leaves with status 2.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [one_line(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))


def one_line(text: str) -> str:
    """Whatever a file says of itself, as it may be printed: one line that is not endless and does nothing."""
    text = UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - END]}… ({len(text):,} characters) …{text[-END:]}"
    return text


def is_unicode(text: str) -> bool:
    """Whether it can be written at all: half a character, from a file's name or an escape, cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def brief(value: Any) -> str:
    """A value as Python writes it, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"


def warn(text: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"warning: {one_line(text)}", file=sys.stderr)


def gone(error: OSError) -> str:
    """Of a picture that was there when the run began."""
    what = f"{error.filename or 'a picture'} cannot be read any more ({reason(error)})"
    return f"{what}. Bring it back, and go on."


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
