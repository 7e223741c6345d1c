"""Find pictures and their captions, and say everything that is wrong with them at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from PIL import UnidentifiedImageError

from finetune.dataset import masks, metadata, table
from finetune.dataset.metadata import Metadata
from finetune.dataset.pixels import JPEGS, LARGE, SUFFIXES, measure, open_picture
from finetune.dataset.settings import DatasetConfig, Folder
from finetune.errors import UserError, is_unicode, reason
from finetune.files import is_file, read_bytes

CAPTION_SUFFIXES = (".txt", ".caption")
LARGEST = 2**30  # bytes of a picture: more than its pixels may be
LONGEST = 2**20  # bytes of a caption
ALONE = Lock()


@dataclass(frozen=True)
class Picture:
    """One file, checked: its size is as shown, with the camera's rotation applied."""

    path: str
    sha256: str  # of the file's bytes, so that caches survive renaming and notice edits
    width: int
    height: int
    captions: tuple[str, ...]  # `{}` is the placeholder
    weight: int = 1  # how many times it is drawn while one of weight 1 is drawn once
    mask: str = ""  # a file; the picture itself where its transparency is meant; none where all of it is learnt
    mask_sha256: str = ""


@dataclass(frozen=True)
class _Entry:
    """One file before it is opened."""

    path: Path
    captions: tuple[str, ...]
    weight: int = 1
    mask: Path | None = None


def split(pictures: Sequence[Picture], held_out: int) -> tuple[list[Picture], list[Picture]]:
    """Those that are trained on, and as many that are not, evenly among them.

    Raises:
        UserError: none would be left.
    """
    count = len(pictures)
    if held_out >= count:
        raise UserError(
            f"dataset.held_out: {held_out} of {count} pictures leave none to train on. Hold out at most {count - 1}."
        )
    away = {(2 * i + 1) * count // (2 * held_out) for i in range(held_out)}
    return (
        [picture for i, picture in enumerate(pictures) if i not in away],
        [picture for i, picture in enumerate(pictures) if i in away],
    )


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
        checked = list(pool.map(lambda entry: _check(entry, config), entries))
    problems += [problem for found in checked if isinstance(found, list) for problem in found]
    pictures = [found for found in checked if isinstance(found, Picture)]
    if config.mask != "none" and not problems and not any(picture.mask for picture in pictures):
        wanted = "a file such as name.mask.png beside it" if config.mask == "file" else "transparency"
        problems.append(f"dataset.mask: no picture has {wanted}. Set it to none.")
    if problems:
        raise UserError(problems)
    return pictures


def _check(entry: _Entry, config: DatasetConfig) -> Picture | list[str]:
    """A picture that decodes to its last row and has a mask that fits, or what is wrong with it."""
    path, mask = entry.path, entry.path if config.mask == "alpha" else entry.mask
    if not is_unicode(str(path)):
        return [f"{path}: its name is no text. Rename it."]
    try:
        content = read_bytes(path, LARGEST)
        with room(content):
            size = measure(content, config.background)
    except UnidentifiedImageError:  # its own words name a buffer in memory
        return [f"{path}: cannot be read as a picture (of no known format). Remove or replace it."]
    except Exception as error:  # Pillow raises almost anything on hostile files
        return [f"{path}: cannot be read as a picture ({reason(error)}). Remove or replace it."]
    picture = Picture(str(path), _checksum(content), *size, captions=entry.captions, weight=entry.weight)
    if mask is None:
        return picture
    try:
        content = read_bytes(mask, LARGEST)
        with room(content):
            masked = masks.check(content, size, alpha=config.mask == "alpha")
    except UnidentifiedImageError:
        return [f"{mask}: is no picture, though its name says that it is a mask. Remove or replace it."]
    except ValueError as error:  # our own, which says what to do
        return [f"{mask}: {reason(error)}"]
    except Exception as error:
        return [f"{mask}: cannot be read as a mask ({reason(error)}). Remove or replace it."]
    return replace(picture, mask=str(mask), mask_sha256=_checksum(content)) if masked else picture


@contextmanager
def room(content: bytes) -> Iterator[None]:
    """Small pictures side by side, but one large one at a time: the largest takes more than a GiB to unpack."""
    with open_picture(content) as file:
        large = file.width * file.height > LARGE and file.format not in JPEGS
    with ALONE if large else nullcontext():
        yield


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entries(given: Folder, config: DatasetConfig, problems: list[str]) -> list[_Entry]:
    """A folder's pictures: its own, and those of the folders that its metadata points into."""
    folder, key = given.folder, "folder" if config.folder is not None else "folders"
    if not folder.is_dir():
        problems.append(f"dataset.{key}: {folder} is not a folder")
        return []
    named = metadata.read(folder, config.caption_column, problems)
    folders = {folder, *(path.parent for path in (named.captions if named else ()))}
    try:
        files = sorted(path for each in folders for path in each.iterdir() if _is_picture(path))
    except OSError as error:
        problems.append(
            f"dataset.{key}: {error.filename or folder} cannot be read ({reason(error)}). Allow it, or name another."
        )
        return []
    paths = [path for path in files if not masks.is_mask(path)]
    if not paths:
        problems.append(f"dataset.{key}: no pictures in {folder}; looked for {', '.join(sorted(SUFFIXES))}")
    masked = masks.pair(paths, [path for path in files if masks.is_mask(path)], config.mask == "file", problems)
    return [
        _Entry(path, _captions_of(path, named, config.captions, problems), given.weight, masked.get(path))
        for path in paths
    ]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _captions_of(
    path: Path, named: Metadata | None, templates: tuple[str, ...], problems: list[str]
) -> tuple[str, ...]:
    sources = [path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES if is_file(path.with_suffix(suffix))]
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
        text = read_bytes(file, LONGEST).decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        problems.append(f"{file}: is not UTF-8 text. Save it as such.")
        return ""
    except (OSError, ValueError) as error:
        problems.append(f"{file}: cannot be read as a caption ({reason(error)}). Mend or replace it.")
        return ""
    if not text:
        problems.append(f"{file}: is empty")
    return text
