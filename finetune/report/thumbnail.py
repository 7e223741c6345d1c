"""Pictures small enough that a report with a hundred of them can be sent by mail."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from finetune.dataset.pixels import decode
from finetune.files import read_bytes
from finetune.report.markup import Markup, element

SIDE = 192  # pixels of the longer side: twice what is shown on most screens
LARGEST = 2**28  # bytes of a file
QUALITY = 70


def thumbnail(path: Path, alt: str, background: str = "#ffffff", side: int = SIDE) -> Markup:
    """A picture within the page, or a box that says that it is gone."""
    try:
        image = decode(read_bytes(path, LARGEST), background, (side, side))
    except (OSError, ValueError, Image.DecompressionBombError):
        return element("span", "gone", class_="gone", role="img", aria_label=f"gone: {alt}")
    image.thumbnail((side, side))
    with io.BytesIO() as buffer:
        image.save(buffer, "WEBP", quality=QUALITY)
        content = base64.b64encode(buffer.getvalue()).decode()
    width, height = image.size
    return element("img", src=Markup(f"data:image/webp;base64,{content}"), alt=alt, width=width, height=height)
