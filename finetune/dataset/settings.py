"""The recipe's `dataset` section: where the pictures are, and how they are shown."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from finetune.config import Fraction, LocalPath, Place, PositiveInt, Section, Strings
from finetune.errors import UserError

PLACES = ("folder", "folders", "source")
SOURCE_ONLY = ("subset", "split", "revision", "image_column")


def _refuse_streaming(value: Any) -> Any:
    if value is not False:
        raise ValueError(
            "a stream has no places, and which picture a step sees is a function of its place alone, so that a resumed "
            "run sees what an uninterrupted one does. Remove it, and name a part: split: train[:10000]."
        )
    return value


class Folder(Section):
    """One of several folders."""

    folder: LocalPath
    weight: PositiveInt = 1
    """How many times each of its pictures is drawn while one of weight 1 is drawn once."""


class DatasetConfig(Section):
    """The recipe's `dataset` section. Pictures come from a folder, from several, or from a source."""

    folder: LocalPath | None = None
    """Pictures, each with `name.txt` or `name.caption` beside it, or one metadata.jsonl, .csv or .parquet for all."""
    folders: Annotated[
        tuple[Folder, ...],
        Field(strict=False),
        BeforeValidator(lambda value: [_as_section(item) for item in value] if isinstance(value, list) else value),
    ] = ()
    """Several: `[{folder: my-dog, weight: 3}, other-dogs]` draws each picture of the first three times as often."""
    source: Place | None = None
    """A data set of the Hub, or a local one that the datasets library reads: a folder or file of parquet or arrow."""
    subset: str | None = None
    """Of the source: which of its configurations."""
    split: str = "train"
    """Of the source: which part, such as train or train[:1000]."""
    revision: str | None = None
    image_column: str = "image"
    """Of the source: the column with the pictures."""
    caption_column: str | None = None
    """Of the source or of the metadata file. Default: `caption`, or else `text`."""
    streaming: Annotated[bool, BeforeValidator(_refuse_streaming), Field(exclude=True)] = False
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] = 512
    """Side of the square that is trained on, in pixels."""
    buckets: bool = False
    """Train each picture in the shape, among some of as many pixels as the square, that is nearest to its own. A step
    has pictures of one shape."""
    captions: Strings = ()
    """For pictures without one of their own; `{}` is the placeholder. One is drawn at each step."""
    shuffle_tags: bool = False
    """Put the parts of a caption that commas part into a new order at each draw."""
    keep_tags: Annotated[int, Field(ge=0)] = 0
    """How many of the first tags stay in front."""
    caption_dropout: Fraction = 0.0
    """Share of the draws that have the empty caption, so that guidance stays apart from what is taught."""
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    """Mirror half of the draws. Leave off for faces, text and other things with a left and a right."""
    held_out: Annotated[int, Field(ge=0)] = 0
    """Pictures, evenly among the others by name, that are not trained on: what is learnt is measured on them."""
    background: Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$")] = "#ffffff"
    """What shows through transparent pixels."""

    mask: Literal["none", "file", "alpha"] = "none"
    """What is learnt of a picture: all of it, the white of `name.mask.png` beside it, or what is not transparent. A
    picture without a mask is learnt whole."""
    unmasked_weight: Fraction = 0.0
    """How much an error outside the mask counts; one inside counts 1."""

    @property
    def all_folders(self) -> tuple[Folder, ...]:
        """Each with its weight; none where there is a source."""
        return self.folders if self.folder is None else (Folder(folder=self.folder),)

    def misfit(self, multiple: int) -> str | None:
        """Why the resolution is none for a base that takes sides of that multiple, if so."""
        over = self.resolution % multiple
        what = f"{self.resolution} is not a multiple of {multiple}, which this base needs"
        return f"{what}. Try {self.resolution - over or multiple}." if over else None

    @property
    def where(self) -> str:
        """In words: where the pictures come from."""
        if self.source is not None:
            return f"{self.source} ({self.split})"
        weights = {found.folder: f" x {found.weight}" if found.weight > 1 else "" for found in self.all_folders}
        return ", ".join(f"{folder}{weight}" for folder, weight in weights.items())

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        problems = self._check_place()
        if self.keep_tags and not self.shuffle_tags:
            problems.append("keep_tags: has no effect while shuffle_tags is false. Remove one.")
        if self.unmasked_weight and self.mask == "none":
            problems.append("unmasked_weight: has no effect while mask is none. Remove one.")
        if self.mask == "file" and self.source is not None:
            problems.append("mask: file is for folders. For a source, set alpha.")
        if problems:
            raise UserError(problems)
        return self

    def _check_place(self) -> list[str]:
        given = [name for name in PLACES if getattr(self, name) not in (None, ())]
        problems = []
        if not given:
            problems.append("folder: missing. Name the folder with the pictures, or set folders or source.")
        if len(given) > 1:
            problems.append(f"{given[0]}: stands beside {' and '.join(given[1:])}. Keep one of them.")
        if self.source is None:
            problems += [
                f"{name}: is for source. Remove it."
                for name in SOURCE_ONLY
                if getattr(self, name) != type(self).model_fields[name].default
            ]
        known = Counter(found.folder.resolve() for found in self.folders)
        twice = sorted({str(found.folder) for found in self.folders if known[found.folder.resolve()] > 1})
        return problems + [f"folders: {folder} is listed twice. Keep one, and give it a weight." for folder in twice]


def _as_section(item: Any) -> Any:
    """A folder without a weight may be written as its path alone."""
    return {"folder": item} if isinstance(item, str) else item
