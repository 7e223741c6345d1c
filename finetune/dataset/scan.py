"""Find pictures and their captions in a folder, and say everything that is wrong with them at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import UnidentifiedImageError
from pydantic import Field

from finetune.config import LocalPath, Section, Strings
from finetune.dataset.pixels import SUFFIXES, decode
from finetune.errors import UserError

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"


class DatasetConfig(Section):
    """The recipe's `dataset` section."""

    folder: LocalPath
    """Pictures, each with `name.txt` or `name.caption` beside it, or one `metadata.jsonl` for all."""
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] = 512
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
    except UnidentifiedImageError:  # its own words name a buffer in memory
        return f"{path}: cannot be read as a picture (of no known format). Remove or replace it."
    except Exception as error:  # Pillow raises almost anything on hostile files
        return f"{path}: cannot be read as a picture ({error}). Remove or replace it."
    return hashlib.sha256(content).hexdigest(), width, height


def _captions_of(
    path: Path, metadata: Mapping[str, str] | None, templates: tuple[str, ...], problems: list[str]
) -> tuple[str, ...]:
    sources = [path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES if path.with_suffix(suffix).is_file()]
    if metadata is not None and path.name in metadata:
        sources.append(path.with_name(METADATA))
    if len(sources) > 1:
        problems.append(f"{path}: is captioned by {' and by '.join(file.name for file in sources)}. Keep one of them.")
    elif metadata is not None and path.name in metadata:
        return (metadata[path.name],)
    elif sources:
        text = _read_text(sources[0], problems)
        if text is not None and not text.strip():
            problems.append(f"{sources[0]}: is empty")
        return ((text or "").strip(),)
    elif metadata is not None:
        problems.append(f"{path}: has no row in {METADATA}. Add one.")
    elif not templates:
        problems.append(f"{path}: has no caption. Add {path.stem}.txt, or set dataset.captions in the recipe.")
    return templates


def _read_text(file: Path, problems: list[str]) -> str | None:
    """None where it is not UTF-8, which is then among the problems."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        problems.append(f"{file}: is not UTF-8 text. Save it as such.")
    return None


def _read_metadata(folder: Path, paths: Iterable[Path], problems: list[str]) -> dict[str, str] | None:
    """Captions by file name from `metadata.jsonl`, or None where there is no such file."""
    file = folder / METADATA
    if not file.is_file():
        return None
    names = {path.name for path in paths}
    text = _read_text(file, problems)
    if text is None:
        return dict.fromkeys(names, "")  # no caption is missing for another reason
    captions: dict[str, str] = {}
    # Only a line feed ends a line of JSON Lines; other separators may stand in a caption.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                name, caption = _parse_row(line, names, captions)
            except ValueError as error:
                problems.append(f"{file}, line {number}: {error}")
            else:
                captions[name] = caption
    return captions


def _parse_row(line: str, names: set[str], earlier: Mapping[str, str]) -> tuple[str, str]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError('expected {"file_name": ..., "caption": ...}')
    name, caption = row["file_name"], row.get("caption", row.get("text"))
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"no caption for {name!r}: add the key 'caption'")
    if name not in names:
        raise ValueError(f"{name!r} is not a picture in this folder")
    if name in earlier:
        raise ValueError(f"{name!r} has a row already. Keep one of them.")
    return name, caption.strip()
