"""Pictures out of a data set of the Hub, or of a local one in parquet or arrow, as files.

A picture is a file everywhere else, so each is written once to where the machine
keeps such things, under its row and the hash of its bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.dataset.metadata import caption_key
from finetune.dataset.pixels import SUFFIXES
from finetune.dataset.settings import DatasetConfig
from finetune.dataset.storage import kept
from finetune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

FILES = {".parquet": "parquet", ".arrow": "arrow"}
NAMED = 5  # rows of one problem that are told by their number


def read(config: DatasetConfig, problems: list[str]) -> list[tuple[Path, str]]:
    """Each row's picture, as a file, and its caption; empty where the recipe's captions are meant.

    Raises:
        UserError: the source cannot be read at all, or not as the recipe says.
    """
    from datasets import Image

    table = _load(config)
    column = _columns(table, config)
    wanted = [config.image_column, *([column] if column else [])]
    table = table.select_columns(wanted).cast_column(config.image_column, Image(decode=False))
    folder = kept("pictures") / (re.sub(r"[^\w.-]+", "-", str(config.source)).strip("-")[-60:] or "source")
    found, lacking, silent = [], [], []
    for number, row in enumerate(cast("Iterable[dict[str, Any]]", table)):
        path = _as_file(row[config.image_column], folder, number)
        caption = row[column] if column else ""
        if path is None:
            lacking.append(number)
        elif column and not (isinstance(caption, str) and caption.strip()):
            silent.append(number)
        else:
            found.append((path, caption.strip()))
    where = f"dataset.source: {config.source}"
    problems += [f"{where}: no picture in {_name(lacking)}"] * bool(lacking)
    problems += [f"{where}: no caption in {_name(silent)}, column {column!r}"] * bool(silent)
    return found


def _load(config: DatasetConfig) -> Dataset:
    """The part of the source that is asked for."""
    import datasets

    path = Path(str(config.source))
    if str(path).startswith((".", "/")) and not path.exists():
        raise UserError(f"dataset.source: {path} does not exist")
    held = {file.suffix.lower() for file in path.rglob("*")} if path.is_dir() else set()
    if held & SUFFIXES and not held & FILES.keys():
        # As a source, those that a metadata file forgets would be dropped without a word.
        raise UserError(f"dataset.source: {path} is a folder of pictures. Name it as dataset.folder.")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return _split(loaded, config.split)
        kind, files = (FILES.get(path.suffix), str(path)) if path.is_file() else (str(path), None)
        if kind is None:
            raise ValueError(f"only files that end in {' or '.join(FILES)} can be read")
        return datasets.load_dataset(
            kind, name=config.subset, data_files=files, split=config.split, revision=config.revision
        )
    except Exception as error:  # a hub fails in as many ways as a file can be broken
        reason = " ".join(str(error).split())
        raise UserError(f"dataset.source: {config.source} cannot be read as a data set ({reason})") from error


def _split(loaded: Any, split: str) -> Dataset:
    """Of what was saved to disk: whole data sets, by name."""
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"no split {split!r}. {did_you_mean(split, loaded)}")
    return loaded[split]


def _columns(table: Dataset, config: DatasetConfig) -> str | None:
    """The captions' column, if there is one; the pictures' holds pictures."""
    from datasets import Image

    names, image, problems = table.column_names, config.image_column, []
    if image not in names:
        problems.append(f"dataset.image_column: no column {image!r}. {did_you_mean(image, names)}")
    elif not isinstance(feature := table.features[image], Image) and "binary" not in str(feature):
        problems.append(f"dataset.image_column: {image!r} holds no pictures but {feature}")
    column = caption_key(names, config.caption_column)
    if column is None and config.caption_column is not None:
        text = config.caption_column
        problems.append(f"dataset.caption_column: no column {text!r}. {did_you_mean(text, names)}")
    elif column is None and not config.captions:
        problems.append(
            f"dataset.caption_column: none is called caption or text. Name one of {', '.join(names)}, or set captions."
        )
    if not len(table):
        problems.append(f"dataset.source: {config.source} has no rows in {config.split}")
    if problems:
        raise UserError(problems)
    return column


def _as_file(content: Any, folder: Path, number: int) -> Path | None:
    """The picture of a row; one that is a file in the library's own store stays there."""
    from datasets import config

    if not content:
        return None
    if content.get("bytes") is None:
        path = Path(content.get("path") or "")
        stores = Path(config.HF_CACHE_HOME), Path(config.HF_DATASETS_CACHE)
        try:
            is_kept = any(path.resolve().is_relative_to(store.resolve()) for store in stores)
            return path if is_kept and path.is_file() else None
        except (OSError, ValueError, RuntimeError):  # no name that a file can have, or a link to itself
            return None
    suffix = Path(content.get("path") or "").suffix.lower()
    digest = hashlib.sha256(content["bytes"]).hexdigest()
    path = folder / f"{number:06d}-{digest[:16]}{suffix if suffix in SUFFIXES else ''}"
    if not path.is_file() or path.stat().st_size != len(content["bytes"]):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(content["bytes"])
        unfinished.replace(path)
    return path


def _name(rows: Sequence[int]) -> str:
    """Numbers as people say them."""
    named = ", ".join(str(row) for row in rows[:NAMED])
    return f"row{'s' * (len(rows) > 1)} {named}" + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")
