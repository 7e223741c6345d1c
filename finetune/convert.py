"""The `convert` command: an adapter file in another format."""

from __future__ import annotations

from pathlib import Path

from finetune.adapter import WordVectors
from finetune.architectures import check_known
from finetune.errors import UserError
from finetune.formats import formats, read, write


def convert(
    file: Path,
    to: str,
    *,
    output: Path | None = None,
    architecture: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write `file` in the format `to`; what was done, in lines.

    Raises:
        UserError: the file is no adapter, or the format cannot hold it.
    """
    chosen = formats[to]
    if architecture is not None:
        check_known(architecture)
    content = read(file, allow_pickle=allow_pickle, architecture=architecture)
    word = content.word if isinstance(content, WordVectors) else None
    # Where the word is the file's name, the file is called after it.
    name = _as_file_name(word) if word and to != "embedding" else file.name.split(".")[0]
    output = output or file.with_name(name + chosen.ending)
    if output.exists() and output.samefile(file):
        raise UserError(f"{output}: the file itself. Name another one with --output.")
    write(content, output, to, overwrite=overwrite)
    lines = [str(output)]
    if word is not None and to != "embedding":
        lines.append(f"the word in A1111 and ComfyUI is the file's name: {output.stem}; here it stays {word}")
    return lines


def _as_file_name(word: str) -> str:
    """At most 200 bytes of UTF-8, of the 255 that a file's name may have."""
    return "".join(letter for letter in word if letter.isalnum() or letter in "-_")[:50] or "embedding"
