"""Where pictures come from: metadata files, several folders, data sets; and none of it is ever changed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lessons
import pillow_heif
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import SIZE, save_pictures

from finetune import run
from finetune.config import build
from finetune.dataset import DatasetConfig, Pictures, scan
from finetune.errors import UserError


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the datasets library keeps of one test is never found by another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


COLOURS = ("red", "green", "blue", "black")


def config(**settings: Any) -> DatasetConfig:
    return build(DatasetConfig, {"resolution": SIZE, **settings})


def found(folder: Path, **settings: Any) -> dict[str, tuple[str, ...]]:
    """Name within the folder -> captions."""
    chosen = config(folder=str(folder), **settings)
    return {str(Path(picture.path).relative_to(folder)): picture.captions for picture in scan(chosen)}


def complaint(**settings: Any) -> str:
    with pytest.raises(UserError) as error:
        scan(config(**settings))
    return str(error.value)


def save(*paths: Path) -> None:
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), COLOURS[number % 4]).save(path)


def png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(stream, "PNG")
    return stream.getvalue()


Rows = list[dict[str, Any]]


def write_jsonl(folder: Path, rows: Rows) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def write_csv(folder: Path, rows: Rows) -> None:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(folder: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture(params=WRITERS.values(), ids=WRITERS)
def write(request: pytest.FixtureRequest) -> Callable[[Path, Rows], None]:
    return request.param


def row(name: str, caption: Any = "a {}", key: str = "caption") -> dict[str, Any]:
    return {"file_name": name, key: caption}


ODD = 'rot, "grün" \u2028 und\nblau {}'


@pytest.mark.parametrize("key", ["caption", "text"])
def test_a_metadata_file_of_any_kind_captions_the_folder(tmp_path: Path, key: str, write: Any):
    save(tmp_path / "a.png", tmp_path / "b.png")
    write(tmp_path, [row("b.png", ODD, key), row("a.png", " a {} ", key)])
    assert found(tmp_path) == {"a.png": ("a {}",), "b.png": (ODD,)}


def test_the_captions_column_may_be_named(tmp_path: Path, write: Any):
    save(tmp_path / "a.png")
    write(tmp_path, [{**row("a.png", "not this"), "prompt": "a {}"}])
    assert found(tmp_path, caption_column="prompt") == {"a.png": ("a {}",)}


def test_metadata_may_point_into_subfolders(tmp_path: Path, write: Any):
    save(tmp_path / "sub/deep/a.png", tmp_path / "a.png", tmp_path / "other/b.png")
    write(tmp_path, [row("sub/deep/a.png", "deep {}"), row("./a.png", "top {}")])
    assert found(tmp_path) == {"a.png": ("top {}",), "sub/deep/a.png": ("deep {}",)}


def test_a_picture_without_a_row_is_named_and_not_dropped(tmp_path: Path, write: Any):
    save(tmp_path / "sub/a.png", tmp_path / "sub/forgotten.png", tmp_path / "lost.png")
    write(tmp_path, [row("sub/a.png")])
    message = complaint(folder=str(tmp_path), captions=["a {}"])
    assert len(message.splitlines()) == 2
    assert all(f"{tmp_path / name}: has no row in metadata." in message for name in ("sub/forgotten.png", "lost.png"))


def test_metadata_never_leads_out_of_its_folder(tmp_path: Path, write: Any):
    folder = tmp_path / "set"
    save(tmp_path / "out.png", tmp_path / "away/b.png", folder / "a.png")
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "linked").symlink_to(tmp_path / "away")
    outside = ["../out.png", "sub/../../out.png", str(tmp_path / "out.png"), "link.png", "linked/b.png"]
    write(folder, [row("a.png"), *map(row, outside)])
    message = complaint(folder=str(folder))
    assert all(name in message for name in outside)
    assert message.count("this folder") == len(outside)


def test_names_that_are_no_pictures_are_told_with_their_place(tmp_path: Path, write: Any):
    save(tmp_path / "a.png", tmp_path / ".hidden/b.png", tmp_path / "folder.png/c.png")
    (tmp_path / "notes.txt").write_text("no picture")
    strange = ["", ".", "notes.txt", "nowhere.png", ".hidden/b.png", "folder.png", "x" * 5000 + ".png"]
    write(tmp_path, [row("a.png"), *map(row, strange)])
    message = complaint(folder=str(tmp_path))
    assert message.count("is not a picture in this folder") == len(strange)
    assert message.count(", row " if write is write_parquet else ", line ") == len(strange)


@pytest.mark.parametrize(
    ("rows", "mentions"),
    [
        ([row("a.png"), row("a.png", "another")], ["'a.png' has a row already"]),
        ([row("a.png", " ")], ["no caption for 'a.png'"]),
        ([row("a.png", None)], ["no caption for 'a.png'"]),
        ([{"file_name": "a.png", "colour": "red"}], ["no caption for 'a.png'", "'caption'"]),
    ],
    ids=["twice", "blank", "null", "no column"],
)
def test_a_faulty_row_is_told_once(tmp_path: Path, rows: Rows, mentions: list[str], write: Any):
    save(tmp_path / "a.png")
    write(tmp_path, rows)
    message = complaint(folder=str(tmp_path))
    assert len(message.splitlines()) == 1 and all(mention in message for mention in mentions)


@pytest.mark.parametrize(
    ("name", "content", "mentions"),
    [
        ("metadata.csv", b"", ["metadata.csv", "file_name"]),
        ("metadata.csv", b"file,caption\na.png,x\n", ["metadata.csv", "file_name", "file, caption"]),
        ("metadata.csv", b"file_name;caption\na.png;x\n", ["metadata.csv", "commas", "file_name;caption"]),
        ("metadata.csv", b"file_name,caption\na.png,red, round\n", ["line 2", "double quotes"]),
        ("metadata.csv", b'file_name,caption\na.png,"red\n', ["metadata.csv", "CSV"]),
        ("metadata.csv", b"file_name,caption\na.png,sch\xf6n\n", ["metadata.csv", "UTF-8"]),
        ("metadata.parquet", b"no parquet", ["metadata.parquet", "parquet"]),
        ("metadata.jsonl", b"[1]\n{", ["line 1", "line 2"]),
    ],
    ids=["empty", "no name", "semicolons", "commas", "open quote", "latin", "broken parquet", "broken json"],
)
def test_a_broken_metadata_file_is_named(tmp_path: Path, name: str, content: bytes, mentions: list[str]):
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    message = complaint(folder=str(tmp_path))
    assert all(mention in message for mention in mentions), message


def test_two_metadata_files_are_one_too_many(tmp_path: Path):
    save(tmp_path / "a.png")
    for writer in WRITERS.values():
        writer(tmp_path, [row("a.png")])
    message = complaint(folder=str(tmp_path))
    assert all(f"metadata.{kind}" in message for kind in WRITERS)


def several(tmp_path: Path, *weights: int) -> list[dict[str, Any]]:
    folders = []
    for number, weight in enumerate(weights):
        save_pictures(tmp_path / str(number), count=number + 2)
        folders.append({"folder": str(tmp_path / str(number)), "weight": weight})
    return folders


def drawn(settings: dict[str, Any], count: int, seed: int = 0) -> Counter[str]:
    chosen = config(**settings)
    pictures = Pictures.from_pictures(scan(chosen), chosen, "sks")
    return Counter(pictures.draw(seed, position).path for position in range(count))


def test_pictures_of_several_folders_are_drawn_by_weight(tmp_path: Path):
    folders = several(tmp_path, 3, 1)
    counts = drawn({"folders": folders}, (2 * 3 + 3 * 1) * 4)
    assert len(counts) == 5
    assert all(count == (12 if f"{tmp_path}/0/" in path else 4) for path, count in counts.items())


def test_a_folder_of_a_list_is_drawn_as_if_it_stood_alone(tmp_path: Path):
    save_pictures(tmp_path / "a", count=5)
    alone, listed = ({"folder": str(tmp_path / "a")}, {"folders": [str(tmp_path / "a")]})
    both = [Pictures.from_pictures(scan(config(**settings)), config(**settings), "sks") for settings in (alone, listed)]
    assert [both[0].draw(3, place) for place in range(20)] == [both[1].draw(3, place) for place in range(20)]


def test_what_is_wrong_in_any_folder_is_told_at_once(tmp_path: Path):
    folders = several(tmp_path, 1, 1)
    (tmp_path / "0/1.txt").unlink()
    (tmp_path / "1/2.png").write_bytes(b"broken")
    (tmp_path / "empty").mkdir()
    folders += [{"folder": str(tmp_path / name)} for name in ("empty", "nowhere")]
    message = complaint(folders=folders)
    names = ("0/1.png", "1/2.png", "empty", "nowhere")
    assert len(message.splitlines()) == 4
    assert all(str(tmp_path / name) in message for name in names)


@pytest.mark.parametrize(
    ("settings", "mentions"),
    [
        ({}, ["folder: missing", "folders", "source"]),
        ({"folder": "a", "source": "b"}, ["folder: stands beside source"]),
        ({"folder": "a", "folders": ["b"]}, ["folder: stands beside folders"]),
        ({"folders": ["a", "./a"]}, ["folders: a is listed twice"]),
        ({"folders": [{"folder": "a", "wieght": 2}]}, ["folders.0.wieght: unknown key. Did you mean 'weight'?"]),
        ({"folders": [{"folder": "a", "weight": 0}]}, ["folders.0.weight"]),
        ({"folders": [{"folder": "a", "weight": 1.5}]}, ["folders.0.weight", "whole number"]),
        ({"folders": "a"}, ["folders: expected a list"]),
        (
            {"folder": "a", "split": "test", "image_column": "x"},
            ["split: is for source", "image_column: is for source"],
        ),
        ({"source": "a/b", "streaming": True}, ["streaming: a stream has no places", "split: train["]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], mentions: list[str]):
    with pytest.raises(UserError) as error:
        config(**settings)
    assert all(mention in str(error.value) for mention in mentions), str(error.value)


TEXTS = ["a {}", "a green {}", "a blue {}"]


def table(**columns: Any) -> datasets.Dataset:
    pictures = [{"bytes": png(colour), "path": f"{colour}.png"} for colour in COLOURS[:3]]
    made = datasets.Dataset.from_dict({"image": pictures, "text": TEXTS, **columns})
    return made.cast_column("image", datasets.Image())


def as_file(folder: Path, made: datasets.Dataset) -> str:
    made.to_parquet(folder / "set.parquet")
    return str(folder / "set.parquet")


def as_folder(folder: Path, made: datasets.Dataset) -> str:
    (folder / "set").mkdir()
    made.to_parquet(folder / "set/train-0.parquet")
    return str(folder / "set")


def as_saved(folder: Path, made: datasets.Dataset) -> str:
    made.save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_splits(folder: Path, made: datasets.Dataset) -> str:
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(folder / "splits")
    return str(folder / "splits")


@pytest.mark.parametrize("store", [as_file, as_folder, as_saved, as_splits])
def test_a_data_set_gives_the_pictures_and_captions_of_its_columns(tmp_path: Path, store: Any):
    source = store(tmp_path, table())
    pictures = scan(config(source=source))
    assert [picture.captions for picture in pictures] == [(text,) for text in TEXTS]
    assert [Path(picture.path).read_bytes() for picture in pictures] == [png(colour) for colour in COLOURS[:3]]
    assert [picture.sha256 for picture in pictures] == [
        hashlib.sha256(png(colour)).hexdigest() for colour in COLOURS[:3]
    ]
    assert scan(config(source=source)) == pictures


def test_columns_may_have_any_name(tmp_path: Path):
    made = table(tags=["x, {}", "y, {}", "z, {}"]).rename_column("image", "photo")
    pictures = scan(config(source=as_file(tmp_path, made), image_column="photo", caption_column="tags"))
    assert [picture.captions for picture in pictures] == [("x, {}",), ("y, {}",), ("z, {}",)]


def test_a_column_of_bytes_is_a_column_of_pictures(tmp_path: Path):
    pq.write_table(pa.table({"image": [png("red"), png("blue")], "text": ["a {}", "b {}"]}), tmp_path / "raw.parquet")
    assert len(scan(config(source=str(tmp_path / "raw.parquet")))) == 2


def test_a_data_set_without_captions_takes_those_of_the_recipe(tmp_path: Path):
    source = as_file(tmp_path, table().remove_columns("text"))
    pictures = scan(config(source=source, captions=["a {}", "my {}"]))
    assert {picture.captions for picture in pictures} == {("a {}", "my {}")}


def test_a_split_is_a_part_of_a_data_set(tmp_path: Path):
    assert len(scan(config(source=as_splits(tmp_path, table()), split="test"))) == 1
    assert len(scan(config(source=as_file(tmp_path, table()), split="train[:2]"))) == 2


@pytest.mark.parametrize(
    ("change", "settings", "mentions"),
    [
        ({}, {"image_column": "imgae"}, ["dataset.image_column", "Did you mean 'image'?"]),
        ({}, {"image_column": "text"}, ["dataset.image_column: 'text' holds no pictures"]),
        ({}, {"caption_column": "txet"}, ["dataset.caption_column", "Did you mean 'text'?"]),
        ({}, {"image_column": "a", "caption_column": "b"}, ["dataset.image_column", "dataset.caption_column"]),
        ({"text": ["a", " ", None]}, {}, ["no caption in rows 1, 2, column 'text'"]),
        ({"image": [{"bytes": b"broken", "path": "a.png"}] * 3}, {}, ["000000-", "000002-", "of no known format"]),
        ({}, {"split": "tset"}, ["tset"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_data_set_is_told(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], mentions: list[str]
):
    message = complaint(source=as_file(tmp_path, table(**change)), **settings)
    assert all(mention in message for mention in mentions), message


def test_a_row_without_a_picture_in_it_is_named_and_no_file_of_the_machine_is_read_for_it(tmp_path: Path):
    save(tmp_path / "private.png")
    cells = [{"bytes": png(), "path": None}, None, {"bytes": None, "path": str(tmp_path / "private.png")}]
    pq.write_table(pa.table({"image": cells, "text": TEXTS}), tmp_path / "set.parquet")
    assert "no picture in rows 1, 2" in complaint(source=str(tmp_path / "set.parquet"))


def test_a_table_without_a_captions_column_says_which_there_are(tmp_path: Path):
    message = complaint(source=as_file(tmp_path, table(prompt=TEXTS).remove_columns("text")))
    assert "dataset.caption_column" in message and "image, prompt" in message and "captions" in message


def test_a_long_list_of_faulty_rows_is_one_line(tmp_path: Path):
    made = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}] * 40, "text": ["", *[" "] * 39]})
    message = complaint(source=as_file(tmp_path, made.cast_column("image", datasets.Image())))
    assert len(message.splitlines()) == 1 and "rows 0, 1, 2, 3, 4 and 35 more" in message


def test_a_source_that_cannot_be_had_is_named(tmp_path: Path):
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    (tmp_path / "set.csv").write_text("image,text\n")
    for name in ("broken.parquet", "set.csv", "nowhere"):
        assert f"dataset.source: {tmp_path / name}" in complaint(source=str(tmp_path / name))
    assert "dataset.source: nobody/nothing" in complaint(source="nobody/nothing")


def test_a_file_in_the_library_s_own_store_stays_there(tmp_path: Path):
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "downloads" / "a.png"
    save(kept)
    cells = [{"bytes": png(), "path": None}, {"bytes": None, "path": str(kept)}]
    pq.write_table(pa.table({"image": cells, "text": TEXTS[:2]}), tmp_path / "set.parquet")
    copied, found = scan(config(source=str(tmp_path / "set.parquet")))
    assert Path(found.path) == kept and Path(copied.path).read_bytes() == png()


def test_a_folder_of_loose_pictures_is_no_data_set(tmp_path: Path):
    save(tmp_path / "set/a.png")
    assert "dataset.folder" in complaint(source=str(tmp_path / "set"))
    (tmp_path / "other").mkdir()
    source = as_folder(tmp_path / "other", table())
    save(Path(source) / "assets/preview.png")
    assert len(scan(config(source=source))) == 3


def test_a_table_that_changes_is_read_anew(tmp_path: Path):
    first = scan(config(source=as_file(tmp_path, table())))
    changed = table().map(lambda row: {"text": "another {}"}).select([2, 1])
    second = scan(config(source=as_file(tmp_path, changed)))
    assert [picture.sha256 for picture in second] == [first[2].sha256, first[1].sha256]
    assert {picture.captions for picture in second} == {("another {}",)}


def lesson(base_folder: Any, output: Path, **dataset: Any) -> Any:
    return lessons.recipe(
        base_folder("stable_diffusion"), output, "lora", "plain", output, dataset={"folder": None, **dataset}
    )


def test_the_resolved_recipe_finds_its_pictures_from_any_folder(
    base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "a"), save_pictures(tmp_path / "b")
    source = Path(as_file(tmp_path, table())).name
    given = [{"folders": [{"folder": "a", "weight": 2}, "b"]}, {"source": source}, {"source": "someone/a-set"}]
    found = [lesson(base_folder, tmp_path, **dataset).dump()["dataset"] for dataset in given]
    assert found[0]["folders"] == [
        {"folder": str(tmp_path / "a"), "weight": 2},
        {"folder": str(tmp_path / "b"), "weight": 1},
    ]
    assert [tree["source"] for tree in found[1:]] == [str(tmp_path / source), "someone/a-set"]
    for tree in found:
        assert build(DatasetConfig, tree).model_dump(mode="json") == tree


def contents(folder: Path) -> dict[str, Any]:
    """All that a run could change of what lies in a folder."""
    files = [folder, *folder.rglob("*")]
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_mode, path.is_file() and path.read_bytes())
        for path in files
    }


def folder_with_everything(folder: Path) -> dict[str, Any]:
    save_pictures(folder / "sub", caption=None, count=3)
    Image.new("L", (SIZE, SIZE), 255).save(folder / "sub/0.mask.png")
    pillow_heif.register_heif_opener()
    save(folder / "a.jpg", folder / "b.gif", folder / "c.heic")
    pictures = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*") if ".mask" not in path.name)
    write_csv(folder, [row(name) for name in pictures])
    return {"folder": str(folder), "mask": "file"}


def data_set(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    return {"source": as_folder(folder, table())}


@pytest.mark.parametrize("make", [folder_with_everything, data_set])
def test_nothing_of_the_user_s_is_ever_changed(base_folder: Any, tmp_path: Path, make: Any):
    folder = tmp_path / "mine"
    dataset = make(folder)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = contents(folder)
    moving = {"buckets": True, "crop": "random", "flip": True, "shuffle_tags": True}
    at_work = run.prepare(lesson(base_folder, tmp_path, **dataset, **moving))
    at_work.loop()
    at_work.finish()
    assert contents(folder) == before
