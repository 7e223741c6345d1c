"""Pictures as their cameras meant them: turned by their Exif, where it can be read."""

from __future__ import annotations

import struct

from PIL import Image

from finetune.errors import reason

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # Exif's tag, and its values that swap width and height
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ENTRY = 12  # bytes of a tag


def orientation(file: Image.Image) -> int:
    """1 to 8; 1, which is upright, where the Exif cannot be read."""
    if file.format == "PNG":  # whose Exif may follow its pixels: Pillow unpacks them, and tells of damage only once
        file.load()
    try:
        found = file.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises almost anything, and the pixels are whole without it
        return 1
    return found if found in TURNS else 1


def upright(file: Image.Image) -> Image.Image:
    """The picture as it is shown."""
    file.load()
    turn = TURNS.get(orientation(file))
    return file if turn is None else file.transpose(turn)


def exif_damage(file: Image.Image) -> str:
    """Why the Exif cannot be read, if there is one that cannot; asked before anything else is."""
    try:
        found = file.getexif().get(ORIENTATION, 1)
    except Exception as error:
        return reason(error)
    raw = file.info.get("exif")
    damage = _damage(raw) if isinstance(raw, bytes) else ""
    if not damage and found not in (1, *TURNS):
        return f"its orientation is {found!r}, and there are 1 to 8"
    return damage


def _damage(data: bytes) -> str:
    """Pillow says nothing of most damage: it takes what it gets."""
    while data.startswith(b"Exif\0\0"):
        data = data[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return "it does not begin as Exif does" if data.strip(b"\0") else ""
    if len(data) < 8:
        return "it is cut short"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return "it is cut short"
    (count,) = struct.unpack_from(f"{order}H", data, start)
    return "it is cut short" if start + 2 + count * ENTRY > len(data) else ""
