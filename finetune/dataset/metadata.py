"""Captions of a whole folder in one file, by the pictures' names."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.dataset.pixels import SUFFIXES
from finetune.errors import brief, is_unicode, reason
from finetune.files import is_file, read_bytes

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_KEYS = ("caption", "text")
MOST_BYTES, MOST_ROWS, AT_ONCE = 2**28, 2**20, 64  # of a file; and rows of parquet, which unpacks to any size
Row = tuple[str, Any]  # its place in the file, and a mapping or the ValueError that it is instead


@dataclass
class Metadata:
    """What a folder's metadata file says."""

    file: Path
    captions: dict[Path, str] = field(default_factory=dict)
    readable: bool = True  # false where every picture lacks its caption for one reason, which is told already


def read(folder: Path, column: str | None, problems: list[str]) -> Metadata | None:
    """The folder's metadata, or None where it has none; what is wrong with it is added to the problems.

    Args:
        column: the captions' name, if it is not one of the usual ones.
    """
    files = [folder / name for name in NAMES if is_file(folder / name)]
    if not files:
        return None
    found = Metadata(files[0])
    if len(files) > 1:
        problems.append(f"{folder}: has {' and '.join(file.name for file in files)}. Keep one of them.")
    try:
        for number, (place, row) in enumerate(_rows(found.file, column)):
            if number == MOST_ROWS:
                raise ValueError(f"has more than {MOST_ROWS:,} rows. Split the folder.")
            try:
                _add(row, folder, column, found.captions)
            except ValueError as error:
                problems.append(f"{found.file}, {place}: {error}")
    except UnicodeDecodeError:
        problems.append(f"{found.file}: is not UTF-8 text. Save it as such.")
        found.readable = False
    except (ValueError, OSError) as error:
        problems.append(f"{found.file}: {reason(error)}")
        found.readable = False
    return found


def caption_key(names: Iterable[str], column: str | None) -> str | None:
    """Which of a table's columns or a row's keys holds the caption."""
    wanted = CAPTION_KEYS if column is None else (column,)
    return next((key for key in wanted if key in set(names)), None)


def _add(row: Any, folder: Path, column: str | None, captions: dict[Path, str]) -> None:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError('expected {"file_name": ..., "caption": ...}')
    path = _inside(folder, row["file_name"])
    if path in captions:
        raise ValueError(f"{brief(row['file_name'])} has a row already. Keep one of them.")
    caption = row.get(caption_key(row, column) or "")
    captions[path] = caption.strip() if isinstance(caption, str) else ""
    if not captions[path]:
        raise ValueError(f"no caption for {brief(row['file_name'])}: fill in {column or CAPTION_KEYS[0]!r}")
    if not is_unicode(captions[path]):
        raise ValueError(f"the caption of {brief(row['file_name'])} has half a character. Write it anew.")


def _inside(folder: Path, name: str) -> Path:
    """The picture of that name in the folder or beneath it."""
    relative, path, shown = PurePosixPath(name), folder / name, brief(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{shown} lies outside this folder. Copy the picture into it.")
    try:
        is_picture = path.is_file() and path.suffix.lower() in SUFFIXES
        leads_out = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # no name that a file can have, or a link to itself
        is_picture = leads_out = False
    if not is_picture or any(part.startswith(".") for part in relative.parts):
        raise ValueError(f"{shown} is not a picture in this folder. Correct the name, or remove the row.")
    if leads_out:
        raise ValueError(f"{shown} is a link that leads out of this folder. Copy the picture into it.")
    return path


def _rows(file: Path, column: str | None) -> Iterator[Row]:
    if file.suffix == ".parquet":
        return _parquet_rows(file, column)
    text = read_bytes(file, MOST_BYTES).decode("utf-8-sig")
    return _csv_rows(text) if file.suffix == ".csv" else _json_rows(text)


def _json_rows(text: str) -> Iterator[Row]:
    # Only a line feed ends a line of JSON Lines; other separators may stand in a caption.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                yield f"line {number}", ValueError(f"not valid JSON ({reason(error)})")
            except RecursionError:
                yield f"line {number}", ValueError("nested too deeply for JSON of a row")


def _csv_rows(text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_columns(reader.fieldnames or ())
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row:
                yield place, ValueError("more cells than columns. Put a caption with commas into double quotes.")
            else:
                yield place, row
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is not valid CSV ({error})") from None


def _parquet_rows(file: Path, column: str | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            _check_columns(names)
            wanted = [name for name in dict.fromkeys(("file_name", *CAPTION_KEYS, column)) if name in names]
            rows = (row for batch in table.iter_batches(AT_ONCE, columns=wanted) for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield f"row {number}", row
    except (pa.ArrowException, OSError, OverflowError, TypeError) as error:
        raise ValueError(f"cannot be read as parquet ({reason(error)})") from None


def _check_columns(names: Iterable[str]) -> None:
    if "file_name" not in names:
        raise ValueError(f"has no column 'file_name'; its columns, parted by commas, are: {', '.join(names)}")
