"""Files of every kind, of any size, and what becomes of those that are too large or not what they were."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import SIZE

from finetune.dataset import DatasetConfig, Pictures, pixels, scan
from finetune.dataset.pixels import ORIENTATION, decode, measure
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
    assert min(decode(content, WHITE, (54, 32)[:: 1 if turned == 1 else -1]).size) in range(64, 160)
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
