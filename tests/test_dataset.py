"""Files to draws: every picture as its camera and painter meant it, every caption where it belongs."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import SIZE, save_pictures

from finetune.dataset import DatasetConfig, Draw, Pictures, scan
from finetune.dataset.pixels import decode
from finetune.errors import UserError

RED, WHITE = "#ff0000", "#ffffff"


def config(folder: Path, **settings: Any) -> DatasetConfig:
    return DatasetConfig(**{"folder": folder, "resolution": SIZE, **settings})


def pictures(folder: Path, placeholder: str = "sks", **settings: Any) -> Pictures:
    chosen = config(folder, **settings)
    return Pictures.from_pictures(scan(chosen), chosen, placeholder)


def draws(found: Pictures, positions: Sequence[int] = range(20), seed: int = 0) -> list[Draw]:
    return [found.draw(seed, position) for position in positions]


def complaint(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        scan(config(folder, **settings))
    return str(error.value)


def noise(width: int = 6, height: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: Image.Image | np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gray_png(values: np.ndarray, transparent: int) -> bytes:
    """A 16-bit PNG with one level declared transparent, which Pillow can read but not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": struct.pack(">H", transparent), b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items())


SHOWN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_a_picture_is_turned_as_the_camera_was_held(tmp_path: Path, orientation: int, suffix: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", noise(), exif=exif, **options)
    shown = SHOWN[orientation](noise())
    (picture,) = scan(config(tmp_path, captions=("a {}",)))
    assert (picture.height, picture.width) == shown.shape[:2]
    np.testing.assert_array_equal(np.asarray(decode(path.read_bytes(), WHITE)), shown)


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return image


def two(mode: str, *values: Any) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putdata(values)
    return image


@pytest.mark.parametrize(
    "content",
    [
        encoded(two("RGBA", (0, 0, 0, 0), (0, 0, 255, 255)), "PNG"),
        encoded(two("RGBA", (0, 0, 0, 0), (0, 0, 255, 255)), "WEBP", lossless=True, exact=True),
        encoded(palette(), "PNG", transparency=0),
        encoded(palette(), "PNG", transparency=b"\x00\xff"),
        encoded(two("RGB", (1, 2, 3), (0, 0, 255)), "PNG", transparency=(1, 2, 3)),
    ],
    ids=["alpha", "alpha in webp", "palette index", "palette alpha", "transparent colour"],
)
def test_transparency_shows_the_background(content: bytes):
    assert np.asarray(decode(content, RED)).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_half_transparency_is_mixed_with_the_background():
    (pixel,) = np.asarray(decode(encoded(two("LA", (0, 128), (0, 255)), "PNG"), WHITE))[:, 0]
    np.testing.assert_allclose(pixel, 127, atol=1)


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    shown = np.asarray(decode(encoded(Image.fromarray(values), "PNG"), WHITE)).astype(float)
    assert np.abs(shown - values[..., None] / 257).max() <= 0.5


def test_transparency_of_sixteen_bits_shows_the_background():
    content = gray_png(np.array([[1000, 65535]], np.uint16), transparent=1000)
    assert np.asarray(decode(content, RED)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_a_float_picture_whose_white_nobody_knows_is_refused_and_not_turned_black(tmp_path: Path):
    save(tmp_path / "a.tiff", np.array([[0, 1]], np.float32))
    assert "a.tiff: cannot be read" in complaint(tmp_path, captions=("a {}",))


@pytest.mark.parametrize(
    ("image", "kind", "colour"),
    [
        (Image.new("L", (2, 2), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (2, 2), 1), "PNG", (255, 255, 255)),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("RGB", (2, 2), (9, 8, 7)), "BMP", (9, 8, 7)),
    ],
    ids=["gray", "one bit", "CMYK JPEG", "CMYK TIFF", "BMP"],
)
def test_every_colour_mode_becomes_rgb(image: Image.Image, kind: str, colour: tuple[int, ...]):
    shown = decode(encoded(image, kind), WHITE)
    assert shown.mode == "RGB"
    np.testing.assert_allclose(np.asarray(shown)[0, 0], colour, atol=2)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff"])
def test_every_truncated_or_broken_picture_is_named_at_once(tmp_path: Path, suffix: str):
    save_pictures(tmp_path, 2)
    for number in range(2):
        path = save(tmp_path / f"broken{number}.{suffix}", noise(64, 64))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    message = complaint(tmp_path, captions=("a {}",))
    names = (f"broken0.{suffix}", f"broken1.{suffix}", "text.jpg", "empty.png", "folder.png")
    assert len(message.splitlines()) == len(names)
    assert all(str(tmp_path / name) in message for name in names)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [150, 250])  # more than Pillow warns of, more than it refuses
def test_a_decompression_bomb_is_refused_however_many_are_read_at_once(
    tmp_path: Path, pixels: int, monkeypatch: pytest.MonkeyPatch
):
    for number in range(40):
        save(tmp_path / f"{number}.png", Image.new("RGB", (pixels, 1)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert len(complaint(tmp_path, captions=("a {}",)).splitlines()) == 40


def test_reading_pictures_leaves_the_warnings_of_the_process_alone(tmp_path: Path):
    save_pictures(tmp_path, 60, size=200)
    before = list(warnings.filters)
    for _ in range(3):
        scan(config(tmp_path))
    changed = list(warnings.filters) != before
    warnings.filters[:] = before  # pyright: ignore[reportIndexIssue]
    assert not changed


def test_stray_files_are_not_pictures(tmp_path: Path):
    save_pictures(tmp_path, 3)
    for name in (".DS_Store", "._0.png", ".hidden.png", "notes.md", "Thumbs.db", "0.png.bak"):
        (tmp_path / name).write_text("stray")
    save_pictures(tmp_path / ".ipynb_checkpoints", 2)
    save_pictures(tmp_path / "deeper", 2)
    assert [Path(picture.path).name for picture in scan(config(tmp_path))] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None, Path.touch], ids=["empty", "missing", "a file"])
def test_a_folder_without_pictures_is_named(tmp_path: Path, make: Callable[[Path], None]):
    make(tmp_path / "pictures")
    assert str(tmp_path / "pictures") in complaint(tmp_path / "pictures")


def test_suffixes_of_any_case_are_pictures(tmp_path: Path):
    save(tmp_path / "A.JPG", noise())
    save(tmp_path / "B.PnG", noise())
    assert len(scan(config(tmp_path, captions=("a {}",)))) == 2


def caption_of(folder: Path, **settings: Any) -> tuple[str, ...]:
    (picture,) = scan(config(folder, **settings))
    return picture.captions


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
@pytest.mark.parametrize("content", [b" a red {}\n", b"\xef\xbb\xbfa red {}\r\n"], ids=["plain", "byte order mark"])
def test_a_caption_file_beside_its_picture_is_read(tmp_path: Path, suffix: str, content: bytes):
    save(tmp_path / "a.png", noise())
    (tmp_path / f"a{suffix}").write_bytes(content)
    assert caption_of(tmp_path, captions=("not this",)) == ("a red {}",)


@pytest.mark.parametrize("key", ["caption", "text"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("text", ["a red {}", "rot \u2028 grün\x85blau"], ids=["plain", "odd line ends"])
def test_a_metadata_file_captions_the_folder(tmp_path: Path, key: str, mark: str, text: str):
    save(tmp_path / "a.png", noise())
    row = json.dumps({"file_name": "a.png", key: text}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"{mark}{row}\n\n", encoding="utf-8")
    assert caption_of(tmp_path) == (text,)


def rows(*items: dict[str, Any]) -> bytes:
    return "\n".join(json.dumps(item, ensure_ascii=False) for item in items).encode()


A = {"file_name": "a.png", "caption": "a {}"}


@pytest.mark.parametrize(
    ("files", "mentions"),
    [
        ({}, ["a.png", "no caption", "a.txt", "dataset.captions"]),
        ({"a.txt": b"x", "a.caption": b"y"}, ["a.txt", "a.caption"]),
        ({"a.txt": b" \n"}, ["a.txt", "empty"]),
        ({"a.txt": "schön".encode("latin-1")}, ["a.txt", "UTF-8"]),
        ({"a.txt": "a {}".encode("utf-16")}, ["a.txt", "UTF-8"]),
        ({"metadata.jsonl": rows(A), "a.txt": b"another"}, ["a.txt", "metadata.jsonl"]),
        ({"metadata.jsonl": rows(A, {**A, "caption": "another"})}, ["metadata.jsonl", "line 2", "a.png"]),
        ({"metadata.jsonl": rows(A, {**A, "file_name": "b.png"})}, ["metadata.jsonl", "line 2", "b.png"]),
        ({"metadata.jsonl": rows(A, {**A, "file_name": "../b.png"})}, ["metadata.jsonl", "line 2", "../b.png"]),
        ({"metadata.jsonl": rows(A, {**A, "file_name": "/etc/b.png"})}, ["metadata.jsonl", "line 2", "/etc/b.png"]),
        ({"metadata.jsonl": rows(A, {"caption": "a"})}, ["metadata.jsonl", "line 2", "file_name"]),
        ({"metadata.jsonl": rows({**A, "caption": " "})}, ["metadata.jsonl", "line 1", "a.png", "caption"]),
        ({"metadata.jsonl": rows({**A, "caption": 3})}, ["metadata.jsonl", "line 1", "a.png", "caption"]),
        ({"metadata.jsonl": rows({**A, "caption": "schön"}).decode().encode("latin-1")}, ["metadata.jsonl", "UTF-8"]),
        ({"metadata.jsonl": rows(A) + b"\n[1]\n{"}, ["metadata.jsonl", "line 2", "line 3", "JSON"]),
        ({"metadata.jsonl": b""}, ["a.png", "metadata.jsonl"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_caption_that_is_missing_doubtful_or_out_of_place_is_named(
    tmp_path: Path, files: dict[str, bytes], mentions: list[str]
):
    save(tmp_path / "b.png", noise()).rename(tmp_path.parent / "b.png")
    save(tmp_path / "a.png", noise())
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    message = complaint(tmp_path)
    assert all(mention in message for mention in mentions), message


def test_one_cause_is_told_once(tmp_path: Path):
    save_pictures(tmp_path, 3, caption=None)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "0.png", "caption": "sch\xf6n"}\n')
    (problem,) = complaint(tmp_path).splitlines()
    assert "UTF-8" in problem


def test_every_problem_of_a_folder_is_told_at_once(tmp_path: Path):
    save_pictures(tmp_path, 4)
    (tmp_path / "0.txt").unlink()
    (tmp_path / "1.txt").write_text("")
    (tmp_path / "2.caption").write_text("twice")
    (tmp_path / "3.png").write_bytes(b"broken")
    assert all(name in complaint(tmp_path) for name in ("0.png", "1.txt", "2.png", "3.png"))


def test_a_template_captions_what_has_no_caption_and_names_the_placeholder(tmp_path: Path):
    save_pictures(tmp_path, 4, caption=None)
    (tmp_path / "0.txt").write_text("{} itself, {}")
    found = draws(pictures(tmp_path, "<dog>", captions=("a {}", "my {}")), range(80))
    captions = {name: {draw.caption for draw in found if Path(draw.path).stem == name} for name in ("0", "1", "2", "3")}
    assert captions.pop("0") == {"<dog> itself, <dog>"}
    assert all(seen == {"a <dog>", "my <dog>"} for seen in captions.values())


SHIFTING = {"crop": "random", "flip": True}


def wide(folder: Path) -> Path:
    for number in range(5):
        save(folder / f"{number}.png", Image.new("RGB", (3 * SIZE, SIZE), (number, 0, 0)))
        (folder / f"{number}.txt").write_text("a {}")
    return folder


def test_a_draw_depends_on_seed_and_position_alone(tmp_path: Path):
    settings: dict[str, Any] = {**SHIFTING, "captions": ("a {}", "my {}")}
    save_pictures(tmp_path, 7, size=2 * SIZE, caption=None)
    forward = draws(pictures(tmp_path, **settings))
    backward = draws(pictures(tmp_path, **settings), range(19, -1, -1))
    assert forward == backward[::-1]
    assert forward != draws(pictures(tmp_path, **settings), seed=1)


def test_every_time_round_shows_every_picture_once_in_a_new_order(tmp_path: Path):
    found = pictures(save_pictures(tmp_path, 7))
    rounds = [[draw.path for draw in draws(found, range(7 * epoch, 7 * epoch + 7))] for epoch in range(4)]
    assert all(len(set(paths)) == 7 for paths in rounds)
    assert len(set(map(tuple, rounds))) == 4


def test_no_two_samples_have_the_same_noise(tmp_path: Path):
    found = pictures(save_pictures(tmp_path, 3))
    prior = found.as_prior("a thing")
    seeds = [draw.seed for source in (found, prior) for seed in range(3) for draw in draws(source, seed=seed)]
    assert len(set(seeds)) == len(seeds) == 120


def test_crops_and_flips_are_drawn_anew_each_time_and_stay_inside(tmp_path: Path):
    found = draws(pictures(wide(tmp_path), **SHIFTING), range(300))
    first = [draw for draw in found if draw.path.endswith("0.png")]
    assert {draw.crop.flip for draw in first} == {True, False}
    assert len({draw.crop.left for draw in first}) > 20
    assert {draw.crop.top for draw in found} == {0}
    assert 0 <= min(draw.crop.left for draw in found) < 5
    assert 2 * SIZE - 5 < max(draw.crop.left for draw in found) <= 2 * SIZE


@pytest.mark.parametrize("size", [(3 * SIZE, SIZE), (SIZE, 3 * SIZE), (SIZE + 1, SIZE), (3, 2), (1, 40), (101, 67)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_crop_of_any_picture_fills_the_square(tmp_path: Path, size: tuple[int, int], crop: str):
    save(tmp_path / "a.png", Image.new("RGB", size, "#808080"))
    for draw in draws(pictures(tmp_path, captions=("a {}",), crop=crop, flip=True), range(10)):
        pixels = draw.pixels()
        assert (pixels.shape, pixels.dtype) == ((3, SIZE, SIZE), np.float32)
        np.testing.assert_allclose(pixels, 128 / 127.5 - 1, atol=1e-6)  # black where it leaves the picture


def test_without_random_crops_the_middle_is_shown_and_nothing_is_mirrored(tmp_path: Path):
    found = draws(pictures(wide(tmp_path)))
    assert {(draw.crop.left, draw.crop.top, draw.crop.flip) for draw in found} == {(SIZE, 0, False)}


def test_pixels_span_minus_one_to_one_and_a_flip_mirrors_them_exactly(tmp_path: Path):
    content = np.zeros((SIZE, SIZE, 3), np.uint8)
    content[:, : SIZE // 2] = (255, 128, 0)
    save(tmp_path / "a.png", content)
    draw = pictures(tmp_path, captions=("a {}",)).draw(0, 0)
    pixels = draw.pixels()
    assert (pixels.min(), pixels.max()) == (-1, 1)
    np.testing.assert_array_equal(pixels, content.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    mirrored = replace(draw, crop=replace(draw.crop, flip=True)).pixels()
    np.testing.assert_array_equal(mirrored, pixels[:, :, ::-1])


def test_a_cache_key_changes_with_all_that_latents_depend_on_and_with_nothing_else(tmp_path: Path):
    save(tmp_path / "a" / "a.png", noise(SIZE, SIZE))
    save(tmp_path / "renamed" / "b.png", noise(SIZE, SIZE))
    save(tmp_path / "edited" / "a.png", 255 - noise(SIZE, SIZE))

    def key(name: str, caption: str = "a {}", **settings: Any) -> Any:
        return pictures(tmp_path / name, captions=(caption,), **settings).draw(0, 0).key

    first = pictures(tmp_path / "a", captions=("a {}",)).draw(0, 0)
    assert key("a") == key("renamed") == key("a", "another caption")
    others = [key("edited"), key("a", resolution=SIZE // 2), key("a", background=RED)]
    others += [replace(first, crop=replace(first.crop, **change)).key for change in ({"flip": True}, {"left": 1})]
    assert len({first.key, *others}) == 6


def test_the_prior_shows_the_same_pictures_under_its_own_caption_in_its_own_order(tmp_path: Path):
    found = pictures(save_pictures(tmp_path, 7))
    prior = found.as_prior("a thing")
    assert {draw.caption for draw in draws(prior)} == {"a thing"}
    assert {draw.path for draw in draws(prior)} == {draw.path for draw in draws(found)}
    assert [draw.path for draw in draws(prior)] != [draw.path for draw in draws(found)]
