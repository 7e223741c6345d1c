"""Files of every kind, of any size, and what becomes of those that are too large or not what they were."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import SIZE

from finetune.dataset import DatasetConfig, Pictures, pixels, scan
from finetune.dataset.health import examine
from finetune.dataset.pixels import decode, measure, open_picture, read_mask
from finetune.dataset.turning import ORIENTATION, exif_damage
from finetune.errors import UserError

WHITE = "#ffffff"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def plain(colour: str, mode: str = "RGB", size: tuple[int, int] = (16, 8)) -> Image.Image:
    return Image.new("RGB", size, colour).convert(mode)


def smooth(width: int, height: int) -> Image.Image:
    cells = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


FRAMES: dict[str, Any] = {"save_all": True, "append_images": [plain("red"), plain("lime")]}


@pytest.mark.parametrize(
    "content",
    [
        encoded(plain("blue"), "GIF", **FRAMES),
        encoded(plain("blue"), "WEBP", lossless=True, **FRAMES),
        encoded(plain("blue"), "PNG", **FRAMES),
        encoded(plain("blue"), "TIFF", **FRAMES),
        encoded(plain("blue"), "MPO", **FRAMES),
        encoded(plain("blue"), "AVIF", **FRAMES),
    ],
    ids=["gif", "webp", "apng", "pages of a tiff", "pictures of an mpo", "avif"],
)
def test_of_several_frames_the_first_is_taken(content: bytes):
    np.testing.assert_allclose(np.asarray(decode(content, WHITE))[0, 0], (0, 0, 255), atol=4)


def test_a_palette_of_a_gif_may_be_transparent():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    shown = np.asarray(decode(encoded(image, "GIF", transparency=0), "#ff0000"))
    assert shown.tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("suffix", ["gif", "avif", "jfif", "heic", "heif"])
def test_no_kind_of_picture_is_passed_over(tmp_path: Path, suffix: str):
    import pillow_heif

    pillow_heif.register_heif_opener()
    kind = {"jfif": "JPEG", "heic": "HEIF"}.get(suffix, suffix.upper())
    (tmp_path / f"a.{suffix}").write_bytes(encoded(plain("blue"), kind))
    (picture,) = scan(DatasetConfig(folder=tmp_path, captions=("a {}",)))
    assert (picture.width, picture.height) == (16, 8)


def heic(image: Image.Image, **options: Any) -> bytes:
    import pillow_heif

    pillow_heif.register_heif_opener()
    return encoded(image, "HEIF", quality=-1, **options)


def test_heic_is_read_with_its_transparency():
    image = Image.new("RGBA", (64, 64), (0, 0, 255, 0))
    np.testing.assert_allclose(np.asarray(decode(heic(image), "#ff0000"))[0, 0], (255, 0, 0), atol=4)


def test_without_its_package_heic_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.heic").write_bytes(heic(plain("red")))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    pixels._register_heif.cache_clear()
    with pytest.raises(UserError, match=r"a\.heic: cannot be read.*pip install 'finetune\[heic\]'"):
        scan(DatasetConfig(folder=tmp_path, captions=("a {}",)))


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "TIFF"])
@pytest.mark.parametrize("turned", [1, 3, 6, 8])
def test_a_picture_is_measured_as_it_is_shown(kind: str, turned: int):
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    content = encoded(smooth(101, 67), kind, exif=exif)
    assert measure(content, WHITE) == decode(content, WHITE).size == ((67, 101) if turned in (6, 8) else (101, 67))


def draw(folder: Path, content: bytes, suffix: str = "jpg", **settings: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / f"a.{suffix}").write_bytes(content)
    chosen = DatasetConfig(folder=folder, captions=("a {}",), resolution=SIZE, **settings)
    return Pictures.from_pictures(scan(chosen), chosen, "sks").draw(0, 0)


@pytest.mark.parametrize("turned", [1, 6])
def test_a_large_jpeg_is_unpacked_small_and_looks_the_same(
    tmp_path: Path, turned: int, monkeypatch: pytest.MonkeyPatch
):
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    content = encoded(smooth(1600, 960), "JPEG", exif=exif, quality=95)
    whole = draw(tmp_path, content, crop="random")
    expected = whole.pixels()
    monkeypatch.setattr(pixels, "LARGE", 1000)
    assert min(decode(content, WHITE, (54, 32) if turned == 1 else (32, 54)).size) in range(64, 160)
    small = draw(tmp_path, content, crop="random")
    assert small == whole and small.geometry == whole.geometry
    error = np.abs(small.pixels() - expected) * 127.5
    assert error.mean() < 1 and error.max() < 8


@pytest.mark.parametrize(("kind", "large"), [("JPEG", 2**24), ("PNG", 1000)])
def test_pixels_of_a_picture_that_is_not_a_large_jpeg_are_what_they_are(
    tmp_path: Path, kind: str, large: int, monkeypatch: pytest.MonkeyPatch
):
    content = encoded(smooth(1003, 601), kind)
    monkeypatch.setattr(pixels, "LARGE", large)
    np.testing.assert_array_equal(np.asarray(decode(content, WHITE, (54, 32))), np.asarray(decode(content, WHITE)))


def test_a_photo_of_24_million_pixels_is_unpacked_at_a_half():
    content = encoded(Image.new("RGB", (6000, 4000)), "JPEG")
    assert decode(content, WHITE, (768, 512)).size == (3000, 2000)


def test_a_picture_that_changes_while_it_is_trained_on_is_named(tmp_path: Path):
    drawn = draw(tmp_path, encoded(smooth(40, 40), "PNG"), "png")
    (tmp_path / "a.png").write_bytes(encoded(smooth(41, 40), "PNG"))
    with pytest.raises(UserError, match=r"a\.png: has changed since the run began"):
        drawn.pixels()


def test_a_bomb_is_refused_with_words_and_without_a_warning(tmp_path: Path):
    Image.new("RGB", (15, 10)).save(tmp_path / "a.png")
    program = (
        "from finetune.quiet import quiet; quiet()\n"
        "from PIL import Image; Image.MAX_IMAGE_PIXELS = 100\n"
        "from finetune.dataset import DatasetConfig, scan\n"
        "from pathlib import Path\n"
        f"try: scan(DatasetConfig(folder=Path({str(tmp_path)!r}), captions=('a',)))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert "a.png: cannot be read as a picture (15 x 10 pixels are more than" in done.stdout
    assert not done.stderr


# Colors

D50 = 0.9642, 1.0, 0.8249
SRGB = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
ADOBE = [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
P3 = [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
CURVE = 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045  # sRGB's, which Display P3 has as well


def linear(levels: np.ndarray, curve: Any) -> np.ndarray:
    values = levels / 255
    if isinstance(curve, float):
        return values**curve
    gamma, a, b, c, d = curve
    return np.where(values >= d, (a * values + b) ** gamma, c * values)


def profile(space: str, columns: Any = (), curve: Any = 2.2) -> bytes:
    """A small ICC profile (version 4) of three primaries, or of gray."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    def text(value: str) -> bytes:
        start = struct.pack(">4s4xII2s2sII", b"mluc", 1, 12, b"en", b"US", 2 * len(value), 28)
        return start + value.encode("utf-16-be")

    shape = curve if isinstance(curve, tuple) else (curve,)
    tone = struct.pack(">4s4xHxx", b"para", 3 if len(shape) == 5 else 0) + fixed(*shape)
    tags = {b"desc": text("test"), b"cprt": text("none"), b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50)}
    for name, xyz in zip("rgb", np.transpose(columns) if len(columns) else (), strict=False):
        tags |= {f"{name}XYZ".encode(): b"XYZ \0\0\0\0" + fixed(*xyz), f"{name}TRC".encode(): tone}
    if space == "GRAY":
        tags[b"kTRC"] = tone
    place, table, body = 132 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, place + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(
        ">I4xI4s4s4s12x4s", place + len(body), 0x04200000, b"mntr", space.ljust(4).encode(), b"XYZ ", b"acsp"
    )
    head += bytes(28) + fixed(*D50)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def expected(levels: np.ndarray, columns: Any, curve: Any) -> np.ndarray:
    """The same colors in sRGB, by the primaries' own arithmetic."""
    light = np.clip(linear(levels, curve) @ np.transpose(columns) @ np.linalg.inv(np.transpose(SRGB)), 0, 1)
    return 255 * np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 12.92 * light)


WIDE = {"adobe-rgb": (ADOBE, 2.19921875), "display-p3": (P3, CURVE)}


def few_colors() -> np.ndarray:
    return np.random.default_rng(0).integers(60, 200, (12, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("name", WIDE)
def test_a_picture_of_a_wider_gamut_is_shown_in_srgb(name: str, kind: str):
    pixels, options = few_colors(), {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    content = encoded(Image.fromarray(pixels), kind, icc_profile=profile("RGB", *WIDE[name]), **options.get(kind, {}))
    stored = np.asarray(Image.open(io.BytesIO(content)))
    found = np.asarray(decode(content, WHITE), dtype=float)
    assert np.abs(found - expected(stored.astype(float), *WIDE[name])).max() <= 1.5
    assert np.abs(found - stored).max() > 8


@pytest.mark.parametrize("icc", [None, "littlecms", "own"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pixels_of_a_picture_that_is_in_srgb_stay_what_they_are(kind: str, icc: str | None):
    from PIL import ImageCms

    known = {"littlecms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    known["own"] = profile("RGB", SRGB, CURVE)
    image = smooth(97, 61)
    plain, tagged = encoded(image, kind), encoded(image, kind, icc_profile=known.get(icc or ""))
    np.testing.assert_array_equal(np.asarray(decode(tagged, WHITE)), np.asarray(decode(plain, WHITE)))


@pytest.mark.parametrize("mode", ["RGBA", "P", "PA"])
def test_transparency_and_palettes_are_kept_through_a_profile(mode: str):
    icc = profile("RGB", *WIDE["adobe-rgb"])
    image = Image.new("RGBA", (8, 8), (180, 90, 60, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    stored = image if mode == "RGBA" else image.quantize() if mode == "PA" else image.convert("RGB").quantize()
    shown = np.asarray(decode(encoded(stored, "PNG", icc_profile=icc), "#00ff00"))
    color = expected(np.array([180.0, 90.0, 60.0]), *WIDE["adobe-rgb"])
    np.testing.assert_allclose(shown[0, 0], color, atol=2)
    if mode != "P":
        np.testing.assert_array_equal(shown[0, 7], (0, 255, 0))


def test_gray_of_another_gamma_is_shown_in_srgb():
    levels = np.arange(256, dtype=np.uint8)[None]
    content = encoded(Image.fromarray(levels), "PNG", icc_profile=profile("GRAY", curve=1.8))
    light = (levels[0] / 255) ** 1.8
    wanted = 255 * np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 12.92 * light)
    shown = np.asarray(decode(content, WHITE))[0]
    assert np.abs(shown - wanted[:, None]).max() <= 2


def test_a_mask_is_numbers_and_no_color():
    levels = np.arange(256, dtype=np.uint8)[None]
    mask = read_mask(encoded(Image.fromarray(levels), "PNG", icc_profile=profile("GRAY", curve=1.0)))
    np.testing.assert_array_equal(np.asarray(mask), levels)


BROKEN = {
    "junk": b"no profile at all",
    "cut": profile("RGB", *WIDE["display-p3"])[:200],
    "of gray": profile("GRAY", curve=1.0),
    "without colors": profile("RGB"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_profile_that_is_broken_is_passed_over_and_named(name: str, tmp_path: Path):
    content = encoded(Image.fromarray(few_colors()), "PNG", icc_profile=BROKEN[name])
    np.testing.assert_array_equal(np.asarray(decode(content, WHITE)), few_colors())
    found = told(tmp_path, content)
    assert found.keys() == {"profile-damaged"} and "taken as sRGB" in found["profile-damaged"]


def told(folder: Path, content: bytes, suffix: str = "png") -> dict[str, str]:
    """What a check says of what a file says of itself."""
    (folder / f"a.{suffix}").write_bytes(content)
    config = DatasetConfig(folder=folder, captions=("a {}",), resolution=8)
    codes = ("exif-damaged", "profile-damaged", "turned-twice")
    return {found.code: found.message for found in examine(scan(config), config) if found.code in codes}


def test_a_good_profile_is_not_worth_a_word(tmp_path: Path):
    icc = profile("RGB", *WIDE["display-p3"])
    assert told(tmp_path, encoded(Image.fromarray(few_colors()), "PNG", icc_profile=icc)) == {}


# Exif


def exif(turned: Any) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = turned
    return tags.tobytes()


DAMAGED = {
    "junk": b"Exif\0\0\x01\x02\x03 this is nothing",
    "cut": exif(6)[:14],
    "cut in a tag": exif(6)[:20],
    "pointing nowhere": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "of too many tags": b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0",
    "turned by 9": exif(9),
    "turned by a word": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", DAMAGED)
def test_pixels_are_read_though_the_exif_is_damaged_and_it_is_named(name: str, kind: str, tmp_path: Path):
    image = smooth(60, 40)
    plain, damaged = encoded(image, kind), encoded(image, kind, exif=DAMAGED[name])
    assert measure(damaged, WHITE) == (60, 40)
    np.testing.assert_array_equal(np.asarray(decode(damaged, WHITE)), np.asarray(decode(plain, WHITE)))
    found = told(tmp_path, damaged, kind.lower())
    assert found.keys() == {"exif-damaged"} and "taken as upright" in found["exif-damaged"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("tags", [None, 1, 3, 6, 8])
def test_exif_that_is_whole_is_not_worth_a_word(kind: str, tags: int | None):
    content = encoded(smooth(60, 40), kind, **({} if tags is None else {"exif": exif(tags)}))
    with open_picture(content) as file:
        assert exif_damage(file) == ""
