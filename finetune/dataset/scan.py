"""Find pictures and their captions in a folder, and say everything that is wrong with them at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune.config import LocalPath, PositiveInt, Section, Strings
from finetune.dataset.pixels import SUFFIXES, decode
from finetune.errors import UserError

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"


class DatasetConfig(Section):
    """The recipe's `dataset` section."""

    folder: LocalPath
    """Pictures, each with `name.txt` or `name.caption` beside it, or one `metadata.jsonl` for all."""
    resolution: PositiveInt = 512
    """Side of the square that is trained on, in pixels."""
    captions: Strings = ()
    """For pictures without one of their own; `{}` is the placeholder. One is drawn at each step."""
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    """Mirror half of the draws. Leave off for faces, text and other things with a left and a right."""
    background: Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$")] = "#ffffff"
    """What shows through transparent pixels."""


@dataclass(frozen=True)
class Picture:
    """One file, checked: its size is as shown, with the camera's rotation applied."""

    path: str
    sha256: str  # of the file's bytes, so that caches survive renaming and notice edits
    width: int
    height: int
    captions: tuple[str, ...]  # `{}` is the placeholder


def scan(config: DatasetConfig) -> list[Picture]:
    """Every picture of the folder in name order.

    Raises:
        UserError: names each file that cannot be used, and why.
    """
    folder = config.folder
    if not folder.is_dir():
        raise UserError(f"dataset.folder: {folder} is not a folder")
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        raise UserError(f"dataset.folder: no pictures in {folder}; looked for {', '.join(sorted(SUFFIXES))}")
    problems: list[str] = []
    metadata = _read_metadata(folder, paths, problems)
    captions = [_captions_of(path, metadata, config.captions, problems) for path in paths]
    with ThreadPoolExecutor() as pool:
        measured = list(pool.map(lambda path: _measure(path, config.background), paths))
    problems += [result for result in measured if isinstance(result, str)]
    if problems:
        raise UserError(problems)
    return [
        Picture(str(path), *result, captions=texts)
        for path, result, texts in zip(paths, measured, captions, strict=True)
        if not isinstance(result, str)
    ]


def _measure(path: Path, background: str) -> tuple[str, int, int] | str:
    """(sha256, width, height) of a picture that decodes to its last row, or what is wrong with it."""
    try:
        content = path.read_bytes()
        width, height = decode(content, background).size
    except Exception as error:  # Pillow raises almost anything on hostile files
        return f"{path}: cannot be read as a picture ({error}). Remove or replace it."
    return hashlib.sha256(content).hexdigest(), width, height


def _captions_of(
    path: Path, metadata: Mapping[str, str] | None, templates: tuple[str, ...], problems: list[str]
) -> tuple[str, ...]:
    if metadata is not None:
        return (metadata[path.name],) if path.name in metadata else ()
    beside = [path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES if path.with_suffix(suffix).is_file()]
    if len(beside) > 1:
        problems.append(f"{path}: has both {beside[0].name} and {beside[1].name}. Keep one of them.")
    elif beside:
        text = beside[0].read_text(encoding="utf-8-sig", errors="replace").strip()
        if text and "\ufffd" not in text:
            return (text,)
        problems.append(f"{beside[0]}: {'is not UTF-8 text' if text else 'is empty'}")
    elif not templates:
        problems.append(f"{path}: has no caption. Add {path.stem}.txt, or set dataset.captions in the recipe.")
    return templates


def _read_metadata(folder: Path, paths: Iterable[Path], problems: list[str]) -> dict[str, str] | None:
    """Captions by file name from `metadata.jsonl`, or None where there is no such file."""
    file = folder / METADATA
    if not file.is_file():
        return None
    names = {path.name for path in paths}
    captions: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            try:
                name, caption = _parse_row(json.loads(line), names)
            except ValueError as error:
                problems.append(f"{file}, line {number}: {error}")
            else:
                captions[name] = caption
    problems += [f"{folder / name}: has no row in {METADATA}" for name in sorted(names - captions.keys())]
    return captions


def _parse_row(row: Any, names: set[str]) -> tuple[str, str]:
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError('expected {"file_name": ..., "caption": ...}')
    caption = row.get("caption", row.get("text"))
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"no caption for {row['file_name']!r}: add the key 'caption'")
    if row["file_name"] not in names:
        raise ValueError(f"{row['file_name']!r} is not a picture in this folder")
    return row["file_name"], caption.strip()
