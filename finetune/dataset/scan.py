"""Find pictures and their captions, and say everything that is wrong with them at once."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import UnidentifiedImageError

from finetune.dataset import metadata, table
from finetune.dataset.metadata import Metadata
from finetune.dataset.pixels import SUFFIXES, decode
from finetune.dataset.settings import DatasetConfig, Folder
from finetune.errors import UserError

CAPTION_SUFFIXES = (".txt", ".caption")


@dataclass(frozen=True)
class Picture:
    """One file, checked: its size is as shown, with the camera's rotation applied."""

    path: str
    sha256: str  # of the file's bytes, so that caches survive renaming and notice edits
    width: int
    height: int
    captions: tuple[str, ...]  # `{}` is the placeholder
    weight: int = 1  # how many times it is drawn while one of weight 1 is drawn once


@dataclass(frozen=True)
class _Entry:
    """One file before it is opened."""

    path: Path
    captions: tuple[str, ...]
    weight: int = 1


def scan(config: DatasetConfig) -> list[Picture]:
    """Every picture, folder by folder in name order, or row by row.

    Raises:
        UserError: names each file that cannot be used, and why.
    """
    problems: list[str] = []
    if config.source is None:
        entries = [entry for folder in config.all_folders for entry in _entries(folder, config, problems)]
    else:
        found = table.read(config, problems)
        entries = [_Entry(path, (caption,) if caption else config.captions) for path, caption in found]
    with ThreadPoolExecutor() as pool:
        measured = list(pool.map(lambda entry: _measure(entry.path, config.background), entries))
    problems += [result for result in measured if isinstance(result, str)]
    if problems:
        raise UserError(problems)
    return [
        Picture(str(entry.path), *result, captions=entry.captions, weight=entry.weight)
        for entry, result in zip(entries, measured, strict=True)
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


def _entries(given: Folder, config: DatasetConfig, problems: list[str]) -> list[_Entry]:
    """A folder's pictures: its own, and those of the folders that its metadata points into."""
    folder, key = given.folder, "folder" if config.folder is not None else "folders"
    if not folder.is_dir():
        problems.append(f"dataset.{key}: {folder} is not a folder")
        return []
    named = metadata.read(folder, config.caption_column, problems)
    folders = {folder, *(path.parent for path in (named.captions if named else ()))}
    paths = sorted(path for each in folders for path in each.iterdir() if _is_picture(path))
    if not paths:
        problems.append(f"dataset.{key}: no pictures in {folder}; looked for {', '.join(sorted(SUFFIXES))}")
    return [_Entry(path, _captions_of(path, named, config.captions, problems), given.weight) for path in paths]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _captions_of(
    path: Path, named: Metadata | None, templates: tuple[str, ...], problems: list[str]
) -> tuple[str, ...]:
    sources = [path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES if path.with_suffix(suffix).is_file()]
    if named is not None and path in named.captions:
        sources.append(named.file)
    if len(sources) > 1:
        problems.append(f"{path}: is captioned by {' and by '.join(file.name for file in sources)}. Keep one of them.")
    elif named is not None and path in named.captions:
        return (named.captions[path],)
    elif sources:
        return (_read_caption(sources[0], problems),)
    elif named is not None and named.readable:
        problems.append(f"{path}: has no row in {named.file.name}. Add one.")
    elif named is None and not templates:
        problems.append(f"{path}: has no caption. Add {path.stem}.txt, or set dataset.captions in the recipe.")
    return templates


def _read_caption(file: Path, problems: list[str]) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        problems.append(f"{file}: is not UTF-8 text. Save it as such.")
        return ""
    if not text:
        problems.append(f"{file}: is empty")
    return text
