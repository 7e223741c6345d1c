"""Class images: made once for one exact request, never mixed up, never half there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.dataset.class_images import ClassImages

REQUEST = ClassImages(prompt="a dog", model="abc", sampler="DDIM", steps=25, guidance=7.5, size=8, seed=3)


class Painter:
    """Renders noise by seed, and remembers what it was asked for; it may tire after some pictures."""

    def __init__(self, strength: int = 1000):
        self.seeds: list[int] = []
        self.strength = strength

    def __call__(self, seeds: Sequence[int]) -> list[Image.Image]:
        if len(self.seeds) + len(seeds) > self.strength:
            raise KeyboardInterrupt
        self.seeds += seeds
        pixels = [np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in seeds]
        return [Image.fromarray(array) for array in pixels]


def make(cache: Path, count: int = 5, request: ClassImages = REQUEST, batch_size: int = 2) -> list[int]:
    """Make what is missing; which pictures that were."""
    painter = Painter()
    request.make(cache, request.missing(cache, count), painter, batch_size)
    return [seed - request.seed for seed in painter.seeds]


def contents(cache: Path, count: int = 5, request: ClassImages = REQUEST) -> list[np.ndarray]:
    return [np.asarray(Image.open(picture.path)) for picture in request.pictures(cache, count)]


def test_only_what_is_missing_is_made(tmp_path: Path):
    assert make(tmp_path, 3) == [0, 1, 2]
    assert make(tmp_path, 5) == [3, 4]
    assert make(tmp_path, 5) == []
    assert make(tmp_path, 2) == []


def test_what_another_run_made_meanwhile_stays(tmp_path: Path):
    def paint(seeds: Sequence[int]) -> list[Image.Image]:
        make(tmp_path)  # by another run, while this one is at it
        return [Image.new("RGB", (8, 8)) for _ in seeds]

    REQUEST.make(tmp_path, range(5), paint, 2)
    before = contents(tmp_path)
    np.testing.assert_array_equal(before, [np.asarray(image) for image in Painter()(range(3, 8))])
    assert not list(REQUEST.folder(tmp_path).glob(".*"))


def test_the_pictures_are_lossless_and_captioned_with_their_prompt(tmp_path: Path):
    make(tmp_path)
    painted = [np.asarray(image) for image in Painter()(range(3, 8))]
    np.testing.assert_array_equal(contents(tmp_path), painted)
    assert {(p.captions, p.width, p.height) for p in REQUEST.pictures(tmp_path, 5)} == {(("a dog",), 8, 8)}


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _swap(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path)


@pytest.mark.parametrize("harm", [Path.unlink, _cut_short, _swap])
def test_a_picture_that_was_harmed_is_made_again(tmp_path: Path, harm: Any):
    make(tmp_path)
    before = contents(tmp_path)
    harm(REQUEST.folder(tmp_path) / "00002.png")
    assert make(tmp_path) == [2]
    np.testing.assert_array_equal(contents(tmp_path), before)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a cat"},
        {"model": "def"},
        {"sampler": "PNDM"},
        {"steps": 24},
        {"guidance": 5.0},
        {"size": 16},
        {"seed": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_request_never_finds_these_pictures(tmp_path: Path, change: dict[str, Any]):
    make(tmp_path)
    other = replace(REQUEST, **change)
    assert other.folder(tmp_path) != REQUEST.folder(tmp_path)
    assert other.missing(tmp_path, 5) == [0, 1, 2, 3, 4]


def test_pictures_that_a_manifest_of_another_request_names_are_not_taken_over(tmp_path: Path):
    make(tmp_path)
    other = replace(REQUEST, prompt="a cat")
    REQUEST.folder(tmp_path).rename(other.folder(tmp_path))
    assert other.missing(tmp_path, 5) == [0, 1, 2, 3, 4]


def test_stray_files_are_not_counted(tmp_path: Path):
    make(tmp_path, 2)
    folder = REQUEST.folder(tmp_path)
    for name in ("00002.png", "00003.jpg", ".DS_Store", ".00004.png.77"):
        Image.new("RGB", (8, 8)).save(folder / name, format="PNG")
    (folder / ".ipynb_checkpoints").mkdir()
    assert make(tmp_path) == [2, 3, 4]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8])
def test_a_picture_depends_on_its_number_alone(tmp_path: Path, batch_size: int):
    make(tmp_path / "a")
    make(tmp_path / "b", batch_size=batch_size)
    np.testing.assert_array_equal(contents(tmp_path / "a"), contents(tmp_path / "b"))


def test_processes_may_share_the_work(tmp_path: Path):
    missing = REQUEST.missing(tmp_path, 5)
    for share in (missing[1::2], missing[::2]):
        REQUEST.make(tmp_path, share, Painter(), 2)
    assert make(tmp_path) == []


def test_an_interrupted_make_keeps_what_was_finished(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        REQUEST.make(tmp_path, range(5), Painter(strength=4), 2)
    assert make(tmp_path) == [4]
    assert not list(REQUEST.folder(tmp_path).glob(".*"))


@pytest.mark.parametrize("line", ['{"file": "0000', "{}", "[1]", "3", "\x00\x00"])
def test_a_manifest_cut_by_a_power_failure_loses_its_last_line_alone(tmp_path: Path, line: str):
    make(tmp_path, 3)
    with (REQUEST.folder(tmp_path) / "manifest.jsonl").open("a") as manifest:
        manifest.write(line)
    assert make(tmp_path) == [3, 4]
    assert make(tmp_path) == []
    assert len(REQUEST.pictures(tmp_path, 5)) == 5


def test_the_manifest_says_for_every_file_what_it_was_made_of(tmp_path: Path):
    make(tmp_path, 2)
    lines = (REQUEST.folder(tmp_path) / "manifest.jsonl").read_text().splitlines()
    made = [json.loads(line) for line in lines]
    assert [row["file"] for row in made] == ["00000.png", "00001.png"]
    assert all(row["request"] == REQUEST.__dict__ for row in made)
