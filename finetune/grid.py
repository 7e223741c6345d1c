"""Rows of pictures with a heading each and a caption under each column."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

GAP = 8
INK, PAPER = "#222222", "#ffffff"


def make_grid(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str], size: int) -> Image.Image:
    """Every picture fits a square of `size` pixels; rows may be of different lengths."""
    heading_size, small_size = max(14, size // 12), max(11, size // 16)
    heading, small = ImageFont.load_default(heading_size), ImageFont.load_default(small_size)
    columns = max(len(row) for row in rows.values())
    line = round(small_size * 1.25)
    wrapped = [textwrap.wrap(caption, width=max(10, round(size / small_size * 2))) for caption in captions]
    head = round(heading_size * 1.8)
    foot = line * max((len(lines) for lines in wrapped), default=0) + GAP
    canvas = Image.new("RGB", (columns * (size + GAP) + GAP, len(rows) * (head + size) + foot + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, (title, row) in enumerate(rows.items()):
        top = number * (head + size)
        draw.text((GAP, top + head // 4), title, fill=INK, font=heading)
        for column, picture in enumerate(row):
            fitted = ImageOps.pad(picture.convert("RGB"), (size, size), color=PAPER)
            canvas.paste(fitted, (GAP + column * (size + GAP), top + head))
    for column, lines in enumerate(wrapped):
        place = (GAP + column * (size + GAP), len(rows) * (head + size) + GAP)
        draw.multiline_text(place, "\n".join(lines), fill=INK, font=small, spacing=line - small_size)
    return canvas
