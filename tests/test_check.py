"""Before a run: every fault of pictures, captions and settings is found, and nothing is found where there is none."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from finetune import cli
from finetune.config import build
from finetune.dataset import scan
from finetune.dataset.health import Finding
from finetune.methods.base import methods
from finetune.plan import Report, survey, warnings
from finetune.recipe import RECIPES, Recipe

ROOT = Path(__file__).parent.parent
BASE, CONCEPTS = ROOT / "data/base", ROOT / "data/concepts"
SIZE = 96


def draw(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """Flat shapes with sharp edges, another picture for each seed."""
    random = np.random.default_rng(seed)
    large = Image.new("RGB", (4 * width, 4 * height), tuple(map(int, random.integers(0, 256, 3))))
    pen = ImageDraw.Draw(large)
    for number in range(12):
        left, right = np.sort(random.integers(0, 4 * width, 2))
        top, bottom = np.sort(random.integers(0, 4 * height, 2))
        color = tuple(map(int, random.integers(0, 256, 3)))
        (pen.ellipse if number % 2 else pen.rectangle)([left, top, right, bottom], fill=color)
    return large.resize((width, height), Image.Resampling.LANCZOS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures that nothing is wrong with."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        add(pictures, f"{number}.png", draw(number))
    return pictures


def add(folder: Path, name: str, image: Image.Image, caption: str = "a {} thing", **options: Any) -> Path:
    path = folder / name
    image.save(path, **options)
    path.with_suffix(".txt").write_text(caption)
    return path


def recipe(folder: Path, **sections: Any) -> Recipe[Any]:
    tree = {
        "name": "test",
        "base": {"source": str(BASE)},
        "method": {"name": "lora"},
        "output": {"folder": str(folder.parent / "out")},
        **sections,
        "dataset": {"folder": str(folder), "resolution": SIZE, **sections.get("dataset", {})},
        "train": {"steps": 100, "batch_size": 1, **sections.get("train", {})},
    }
    return build(Recipe[methods[tree["method"]["name"]]], tree)


def report(folder: Path, **sections: Any) -> Report:
    return survey(recipe(folder, **sections))


def only(found: Report, code: str) -> Finding:
    """The one thing that is wrong."""
    assert [finding.code for finding in found.findings] == [code], found.findings
    assert found.status == 1
    return found.findings[0]


@pytest.mark.parametrize("name", [path.name for path in sorted(CONCEPTS.iterdir()) if path.is_dir()])
def test_nothing_is_wrong_with_a_sample_concept(name: str):
    found = report(CONCEPTS / name, dataset={"resolution": 256}, train={"steps": 200})
    assert (found.findings, found.status) == ([], 0)


def test_different_things_before_the_same_background_are_not_alike():
    folders = [str(path) for path in sorted(CONCEPTS.iterdir()) if path.is_dir()]
    dataset = {"folder": None, "folders": folders, "resolution": 256}
    assert report(CONCEPTS, dataset=dataset, train={"steps": 1000}).findings == []


def test_nothing_is_wrong_with_pictures_drawn_with_care(folder: Path):
    assert report(folder).findings == []


def test_a_picture_that_must_be_enlarged_is_named(folder: Path):
    path = add(folder, "small.png", draw(9, 60, 50))
    found = only(report(folder), "small")
    assert found.file == str(path)
    assert "60 x 50" in found.message and "1.9 times" in found.message and "dataset.resolution" in found.message


def test_a_picture_a_little_too_small_is_not_worth_a_warning(folder: Path):
    add(folder, "small.png", draw(9, 70, 70))
    assert report(folder).findings == []


def test_a_long_picture_that_is_mostly_cut_away_is_named(folder: Path):
    path = add(folder, "long.png", draw(9, 5 * SIZE, SIZE))
    found = only(report(folder), "cut")
    assert found.file == str(path)
    assert "80%" in found.message and "dataset.buckets=true" in found.message


def test_in_its_own_shape_the_same_picture_is_cut_less(folder: Path):
    add(folder, "long.png", draw(9, 2 * SIZE + 40, SIZE))
    assert only(report(folder), "cut")
    assert report(folder, dataset={"buckets": True}).findings == []


@pytest.mark.parametrize("name", ["fluent_3d", "openmoji", "fox", "teapot"])
def test_blurred_copies_of_sharp_pictures_are_named(name: str, tmp_path: Path):
    blurred = 0
    for path in sorted((CONCEPTS / name).glob("*.png")):
        add(tmp_path, path.name, Image.open(path).filter(ImageFilter.GaussianBlur(2)))
        blurred += 1
    found = report(tmp_path, dataset={"resolution": 256}, train={"steps": 200}).findings
    assert [finding.code for finding in found] == ["blurred"] * blurred


def test_a_sharp_thing_before_a_blurred_background_is_not_blurred(folder: Path):
    background = draw(9, 512, 512).filter(ImageFilter.GaussianBlur(12))
    background.paste(draw(10, 180, 180), (160, 160))
    add(folder, "portrait.png", background)
    assert report(folder).findings == []


def test_a_picture_of_one_color_is_named_once(folder: Path):
    path = add(folder, "blank.jpg", Image.new("RGB", (SIZE, SIZE), "#8899aa"))
    assert only(report(folder), "uniform").file == str(path)


def test_two_blank_pictures_are_not_called_alike(folder: Path):
    for name, color in (("blue.png", "#8899aa"), ("white.png", "#ffffff")):
        add(folder, name, Image.new("RGB", (SIZE, SIZE), color))
    assert [finding.code for finding in report(folder).findings] == ["uniform", "uniform"]


def test_copies_of_a_file_are_named_once(folder: Path):
    for name in ("copy", "other"):
        shutil.copy(folder / "1.png", folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a {} thing")
    found = only(report(folder), "same-file")
    assert found.file == str(folder / "1.png") and "copy.png, other.png" in found.message


def test_the_same_pixels_in_another_file_are_named(folder: Path):
    add(folder, "again.bmp", Image.open(folder / "2.png"))
    found = only(report(folder), "same-pixels")
    assert found.file == str(folder / "2.png") and "again.bmp" in found.message


def _as_jpeg(image: Image.Image) -> Image.Image:
    return image


def _brighter(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.1)


def _without_edges(image: Image.Image) -> Image.Image:
    return image.crop((3, 3, 253, 253))


def _smaller(image: Image.Image) -> Image.Image:
    return image.resize((200, 200), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("change", [_as_jpeg, _brighter, _without_edges, _smaller])
def test_nearly_the_same_picture_is_named(change: Callable[[Image.Image], Image.Image], tmp_path: Path):
    for number in range(3):
        add(tmp_path, f"{number}.png", draw(number, 256, 256))
    add(tmp_path, "copy.jpg", change(draw(2, 256, 256)), quality=60)
    found = only(report(tmp_path, dataset={"resolution": 128}), "near-duplicate")
    assert found.file == str(tmp_path / "2.png") and "copy.jpg" in found.message


def photo(path: Path, stored: tuple[int, int], recorded: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769).update({0xA002: recorded[0], 0xA003: recorded[1]})
    add(path.parent, path.name, draw(9, *stored), exif=exif, quality=95)


@pytest.mark.parametrize("recorded", [(150, 100), (6000, 4000)], ids=["as-large", "made-smaller"])
def test_a_picture_that_was_turned_and_still_says_so_is_named(folder: Path, recorded: tuple[int, int]):
    photo(folder / "turned.jpg", (100, 150), recorded, 6)
    found = only(report(folder), "turned-twice")
    assert found.file == str(folder / "turned.jpg") and "without that tag" in found.message


@pytest.mark.parametrize(
    ("stored", "recorded", "orientation"),
    [((150, 100), (150, 100), 6), ((150, 100), (6000, 4000), 6), ((100, 150), (150, 100), 1), ((99, 99), (99, 99), 6)],
)
def test_a_picture_as_its_camera_left_it_is_not(folder: Path, stored: Any, recorded: Any, orientation: int):
    photo(folder / "photo.jpg", stored, recorded, orientation)
    assert report(folder).findings == []


def test_what_lies_in_the_folder_unused_is_named(folder: Path):
    add(folder, "5.png", draw(5))
    (folder / "5.png").rename(folder / ".5.png")  # its caption stays behind
    (folder / "clip.mov").write_bytes(b"0")
    (folder / "more").mkdir()
    draw(6).save(folder / "more/6.png")
    found = only(report(folder), "ignored-files")
    assert found.file == str(folder)
    assert "4 of" in found.message and ".5.png, 5.txt, clip.mov and more" in found.message
    assert "dataset.folders" in found.message


def test_what_a_system_leaves_in_a_folder_is_not_worth_a_word(folder: Path):
    for name in (".DS_Store", "._0.png", "Thumbs.db", "README.md", "LICENSE"):
        (folder / name).write_bytes(b"0")
    (folder / "notes").mkdir()
    assert report(folder).findings == []


def test_pictures_that_metadata_points_to_are_used(tmp_path: Path):
    (tmp_path / "inside").mkdir()
    rows = [{"file_name": f"inside/{number}.png", "caption": "a {} thing"} for number in range(3)]
    for number, row in enumerate(rows):
        draw(number).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert report(tmp_path).findings == []


def test_captions_without_the_word_are_named_where_others_have_it(folder: Path):
    path = add(folder, "x.png", draw(7), "a red thing")
    assert only(report(folder), "placeholder-missing").file == str(path)


def test_a_lora_may_do_without_a_word_and_dreambooth_may_not(folder: Path):
    for file in folder.glob("*.txt"):
        file.write_text(f"picture {file.stem}")
    assert report(folder).findings == []
    found = report(folder, method={"name": "dreambooth", "prior": "none"}).findings
    assert [finding.code for finding in found] == ["placeholder-missing"] * 4


def test_a_caption_of_the_recipe_is_complained_of_once(folder: Path):
    for file in folder.glob("*.txt"):
        file.unlink()
    method = {"name": "dreambooth", "prior": "none"}
    found = report(folder, method=method, dataset={"captions": ["a thing"]})
    assert only(found, "placeholder-missing").file == "dataset.captions"


def test_one_caption_for_all_pictures_of_a_style_is_named(folder: Path):
    assert report(folder).findings == []  # of a subject
    for file in folder.glob("*.txt"):
        file.write_text("a drawing in {} style")
    assert "Say in each" in only(report(folder), "same-captions").message


@pytest.mark.parametrize(("steps", "code"), [(39, "seen-rarely"), (4001, "seen-often")])
def test_pictures_that_are_seen_too_rarely_or_too_often_are_named(folder: Path, steps: int, code: str):
    found = only(report(folder, train={"steps": steps}), code)
    assert found.file == "train.steps" and {"seen-rarely": "=40", "seen-often": "=4000"}[code] in found.message


def test_a_weight_counts_in_how_often_a_picture_is_seen(folder: Path):
    other = folder.parent / "other"
    other.mkdir()
    add(other, "x.png", draw(8))
    folders = [{"folder": str(folder), "weight": 4}, str(other)]
    found = report(folder, dataset={"folder": None, "folders": folders}, train={"steps": 85})
    assert [fate.seen for fate in found.pictures] == [20, 20, 20, 20, 5]
    assert "5 to 20 times" in found.plan["steps"]
    assert only(found, "seen-rarely").message.endswith("train.steps=170.")


def test_an_ordinary_word_is_no_placeholder(folder: Path):
    found = only(report(folder, placeholder="Dog"), "word-ordinary")
    assert found.file == "placeholder" and "'Dog'" in found.message


def test_a_word_of_the_base_cannot_be_taught_as_a_new_one(folder: Path):
    found = report(folder, placeholder="dog", method={"name": "textual_inversion", "init": "cat"})
    assert [(finding.code, finding.severity) for finding in found.findings] == [("word-taken", "error")]
    assert found.status == 2


LONG = "a {} thing " + "and a red hat " * 20


@pytest.mark.parametrize("old", [False, True], ids=["tokenizer.json", "vocab.json"])
def test_a_caption_whose_end_is_not_read_is_named(folder: Path, old: bool):
    base = folder.parent / "base"
    shutil.copytree(BASE / "tokenizer", base / "tokenizer")
    if old:
        (base / "tokenizer/tokenizer.json").unlink()
    (folder / "2.txt").write_text(LONG)
    found = only(report(folder, base={"source": str(base)}), "caption-cut")
    assert found.file == str(folder / "2.png")
    read = LONG.strip().removesuffix(found.message.split("tokens: '")[1].split("'")[0])
    assert len(LONG) > len(read) > 100 and LONG.startswith(read)


def test_the_end_is_where_the_base_itself_cuts(folder: Path):
    from transformers import CLIPTokenizer

    (folder / "2.txt").write_text(LONG)
    message = only(report(folder), "caption-cut").message
    tokenizer = CLIPTokenizer.from_pretrained(str(BASE / "tokenizer"))
    ids = tokenizer(LONG.replace("{}", "sks"), add_special_tokens=False).input_ids
    assert tokenizer.decode(ids[75:]).strip() in message
    assert tokenizer.decode(ids[74:]).strip() not in message


def test_each_vector_of_a_new_word_takes_room(folder: Path):
    for file in folder.glob("*.txt"):
        file.write_text("{}" + " a" * 72)
    word = {"name": "textual_inversion", "init": "thing"}
    for vectors, cut in ((1, 0), (3, 0), (4, 4)):
        found = report(folder, placeholder="<it>", method={**word, "num_vectors": vectors}).findings
        assert [finding.code for finding in found] == ["caption-cut"] * cut


def test_of_a_base_that_is_elsewhere_it_says_what_was_not_checked(folder: Path):
    found = report(folder, base={"source": "someone/a-model"}, placeholder="dog")
    assert found.findings == [] and "not on this machine" in found.plan["unchecked"]
    assert "unchecked" not in report(folder).plan


def test_a_base_in_the_hubs_cache_is_on_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub = folder.parent / "hub"
    cached = hub / "models--someone--a-model"
    shutil.copytree(BASE / "tokenizer", cached / "snapshots/abc/tokenizer")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    assert only(report(folder, base={"source": "someone/a-model"}, placeholder="dog"), "word-ordinary")


def test_a_disk_that_is_clearly_too_small_is_named(folder: Path):
    shown = {"prompts": ["a {} thing"], "every": 1}
    vast = {"steps": 10**12, "checkpoint_every": 100}
    found = report(folder, train=vast, validation=shown)
    assert [finding.code for finding in found.findings] == ["seen-often", "disk"]
    assert str(folder.parent) in found.findings[1].file and "GB are free" in found.findings[1].message


def test_a_sized_recipe_has_nothing_wrong_with_itself(tmp_path: Path):
    for number in range(5):
        add(tmp_path, f"{number}.png", draw(number, 512, 512))
    from finetune.recipe import load

    for path in sorted(RECIPES.glob("*-*gb.yaml")):
        found = survey(load(path.stem, [f"dataset.folder={tmp_path}"])).findings
        assert {finding.code for finding in found} <= {"small"}, path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def file(folder: Path) -> str:
    path = folder.parent / "r.yaml"
    path.write_text(recipe(folder).to_yaml())
    return str(path)


def test_the_status_tells_fine_from_warnings_from_errors(folder: Path, file: str, call: Any):
    assert call("check", file)[0] == 0
    add(folder, "small.png", draw(9, 50, 50))
    assert call("check", file)[0] == 1
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    assert call("check", file)[0] == 2


def test_a_picture_with_something_wrong_is_told_with_its_fate(folder: Path, file: str, call: Any):
    add(folder, "small.png", draw(9, 50, 60))
    _, printed, _ = call("check", file)
    lines = printed.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith(str(folder / "small.png"))]
    assert "50 x 60 to 96 x 96 (x 1.92, 17% cut away), seen 20 times as 'a sks thing'" in lines[place]
    assert lines[place + 1].startswith("  warning: is 50 x 60 and enlarged")
    assert not any(str(folder / "0.png") in line for line in lines)


def test_programs_get_one_object_with_everything(folder: Path, file: str, call: Any):
    add(folder, "small.png", draw(9, 50, 60))
    status, printed, complaint = call("check", file, "--json")
    found = json.loads(printed)
    assert (status, found["status"], complaint) == (1, 1, "")
    (problem,) = found["problems"]
    assert (problem["code"], problem["severity"]) == ("small", "warning")
    assert problem["file"] == str(folder / "small.png") and problem["message"].startswith("is 50 x 60")
    assert found["plan"]["method"].startswith("lora")
    assert [picture["captions"] for picture in found["pictures"]] == [["a sks thing"]] * 5
    assert found["pictures"][0]["trained_at"] == [SIZE, SIZE]


def _cut_short(folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])


def _stray(folder: Path) -> None:
    (folder / "1.png").write_text("not a picture")


def _empty_caption(folder: Path) -> None:
    (folder / "1.txt").write_text(" \n")


def _no_caption(folder: Path) -> None:
    (folder / "1.txt").unlink()


def _two_captions(folder: Path) -> None:
    (folder / "1.caption").write_text("a {}")


@pytest.mark.parametrize(
    ("harm", "code", "name"),
    [
        (_cut_short, "unreadable", "1.png"),
        (_stray, "unreadable", "1.png"),
        (_empty_caption, "empty-caption", "1.txt"),
        (_no_caption, "no-caption", "1.png"),
        (_two_captions, "two-captions", "1.png"),
        (shutil.rmtree, "invalid", "dataset.folder"),
    ],
)
def test_programs_get_errors_in_the_same_form(harm: Any, code: str, name: str, folder: Path, file: str, call: Any):
    harm(folder)
    status, printed, complaint = call("check", file, "--json")
    found = json.loads(printed)
    assert (status, found["status"], found["plan"]) == (2, 2, None)
    assert [(problem["code"], Path(problem["file"]).name) for problem in found["problems"]] == [(code, name)]
    assert complaint.startswith("error: ")


def test_all_errors_of_pictures_come_at_once(folder: Path, file: str, call: Any):
    _cut_short(folder)
    (folder / "2.txt").write_text("")
    (folder / "3.txt").unlink()
    found = json.loads(call("check", file, "--json")[1])["problems"]
    assert sorted(problem["code"] for problem in found) == ["empty-caption", "no-caption", "unreadable"]


def test_programs_get_what_is_wrong_with_a_recipe(file: str, call: Any):
    found = json.loads(call("check", file, "--json", "train.setps=3", "method.rnak=1")[1])["problems"]
    assert [(problem["code"], problem["file"]) for problem in found] == [("recipe", file)] * 2
    assert "train.setps" in "".join(problem["message"] for problem in found)


def test_a_run_tells_a_few_of_them_before_it_starts(folder: Path):
    for number in range(8):
        add(folder, f"small-{number}.png", draw(20 + number, 50, 50), LONG)
    asked = recipe(folder, train={"steps": 400})
    found = warnings(asked, scan(asked.dataset))
    assert len(found) == 6 and found[-1] == "3 more: finetune check says them all"
    assert all("small" in line and "enlarged" in line for line in found[:-1])


def test_train_prints_them(folder: Path, file: str, base_folder: Any, call: Any):
    path = add(folder, "small.png", draw(9, 16, 16))
    tiny = [f"base.source={base_folder('stable_diffusion')}", "dataset.resolution=32", "train.steps=1"]
    status, printed, _ = call("train", file, *tiny)
    assert status == 0
    assert f"warning: {path}: is 16 x 16 and enlarged 2.0 times" in printed
    assert "warning: train.steps: a picture is seen 0.2 times" in printed
