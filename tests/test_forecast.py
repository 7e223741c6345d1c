"""What a run will make and write, said before the base is loaded, is what it then makes and writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lessons
import pytest
import tiny
from PIL import Image

from finetune import run
from finetune.dataset import Pictures, scan
from finetune.dataset.buckets import Shapes
from finetune.families.base import Family, Source, families
from finetune.outline import outline, stated_by_families
from finetune.plan import Report, survey
from finetune.recipe import Recipe
from finetune.request import cache_folder
from finetune.spelling import find_speller


def data(recipe: Recipe[Any]) -> dict[str, Any]:
    """What programs get, as they get it."""
    return json.loads(json.dumps(survey(recipe).as_dict()["forecast"]))


def codes(found: Report) -> set[str]:
    return {finding.code for finding in found.findings} - {"seen-rarely", "uniform", "blurred", "near-duplicate"}


@pytest.mark.parametrize("name", tiny.BASES)
def test_what_a_family_says_of_itself_is_known_without_importing_it(name: str):
    stated = dict(stated_by_families()[name])
    assert stated.pop("class") == families[name].__name__
    for setting, value in stated.items():
        assert getattr(families[name], setting) == value, setting
    assert {"tokenizers", "attention", "size_multiple", "prompt_lengths", "text_lora"} <= stated.keys()


def test_a_check_of_any_base_does_without_torch(base_folder: Any, tmp_path: Path):
    recipes = [
        lessons.recipe(base_folder(family), tmp_path / family, "dreambooth", "images", train={"checkpoint_every": 1})
        for family in tiny.BASES
    ]
    for number, recipe in enumerate(recipes):
        (tmp_path / f"{number}.yaml").write_text(recipe.to_yaml())
    program = (
        "import sys; from finetune.plan import survey; from finetune.recipe import load\n"
        f"for number in range({len(recipes)}): assert survey(load(f'{tmp_path}/{{number}}.yaml')).lines()\n"
        "assert not {'torch', 'transformers', 'diffusers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Shapes and masks


def paint(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a {} thing")
    return folder


@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_each_shape_has_as_many_pictures_as_training_gives_it(family: str, base_folder: Any, tmp_path: Path):
    sizes = [(96, 60), (97, 61), (60, 96), (50, 50), (80, 60), (66, 60), (400, 20)]
    settings = {"buckets": True, "resolution": 64}
    folder = paint(tmp_path / "pictures", sizes)
    recipe = lessons.recipe(base_folder(family), tmp_path, "lora", "plain", folder, dataset=settings)
    pictures = Pictures.from_pictures(scan(recipe.dataset), recipe.dataset, "sks")
    multiple = 2 * families[family].size_multiple
    shapes = Shapes(pictures.rows, 64, multiple, 1)
    expected = sorted(shapes.sizes[place] for place in shapes.assign(pictures.rows))
    found = data(recipe)["shapes"]
    assert sorted((row["width"], row["height"]) for row in found for _ in range(row["pictures"])) == expected
    report = survey(recipe)
    assert [fate.trained_at for fate in report.pictures] == [shapes.sizes[i] for i in shapes.assign(pictures.rows)]
    for row in found:
        assert f"{row['width']} x {row['height']}: {row['pictures']}" in report.plan["shapes"]


def test_without_buckets_there_is_one_shape_and_no_word_of_it(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain")
    assert data(recipe)["shapes"] == [{"width": tiny.SIZE, "height": tiny.SIZE, "pictures": 5}]
    assert data(recipe)["masks"] is None and not {"shapes", "masks"} & survey(recipe).plan.keys()


def test_masks_are_counted(base_folder: Any, tmp_path: Path):
    folder = tiny.save_pictures(tmp_path / "pictures")
    for number in (1, 3):
        Image.new("L", (tiny.SIZE, tiny.SIZE), 255).save(folder / f"{number}.mask.png")
    settings = {"mask": "file", "unmasked_weight": 0.25}
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain", folder, dataset=settings)
    assert data(recipe)["masks"] == {"pictures": 2, "unmasked_weight": 0.25}
    assert survey(recipe).plan["masks"] == "2 of 5 pictures have one; what is outside counts 0.25"


def test_a_side_that_the_base_cannot_take_is_told_before_it_is_loaded(base_folder: Any, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(base_folder("flux"), base)
    config = json.loads((base / "vae/config.json").read_text())
    (base / "vae/config.json").write_text(json.dumps({**config, "block_out_channels": [8] * 4}))
    report = survey(lessons.recipe(base, tmp_path, "lora", "plain", dataset={"resolution": 40}))
    (finding,) = [finding for finding in report.findings if finding.code == "resolution"]
    assert report.status == 2 and finding.message.startswith("40 is not a multiple of 16") and "32" in finding.message


# Class images


@pytest.mark.parametrize("family", tiny.BASES)
def test_class_images_are_found_as_a_run_finds_them(family: str, base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder(family), tmp_path, "dreambooth", "images")
    assert data(recipe)["class_images"] == {"wanted": 3, "there": 0}
    assert "none of them there, 3 to be made" in survey(recipe).plan["prior"]
    run.prepare(recipe)
    assert data(recipe)["class_images"] == {"wanted": 3, "there": 3}
    assert data(recipe)["disk"]["class_images"] == 0
    next(cache_folder().rglob("*.png")).unlink()
    assert data(recipe)["class_images"] == {"wanted": 3, "there": 2}
    assert "2 of them there, 1 to be made" in survey(recipe).plan["prior"]


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"precision": "bf16"}},
        {"base": {"dtype": "bfloat16"}},
        {"validation": {"guidance": 3.0}},
        {"train": {"seed": 7}},
        {"train": {"zero_terminal_snr": True}},
    ],
    ids=str,
)
def test_those_of_another_request_are_not_counted(sections: Any, base_folder: Any, tmp_path: Path):
    base = base_folder("stable_diffusion", "v_prediction")
    run.prepare(lessons.recipe(base, tmp_path, "dreambooth", "images"))
    if "base" in sections:
        sections["base"]["source"] = str(base)
    other = lessons.recipe(base, tmp_path, "dreambooth", "images", **sections)
    assert data(other)["class_images"]["there"] == 0
    run.prepare(other, overwrite=True)
    assert data(other)["class_images"]["there"] == 3


def test_of_a_base_that_is_elsewhere_they_cannot_be_counted(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(
        base_folder("flux"),
        tmp_path,
        "dreambooth",
        "images",
        base={"source": "someone/a-model"},
        train={"checkpoint_every": 1},
    )
    assert data(recipe)["class_images"] == {"wanted": 3, "there": None}
    plan = survey(recipe).plan
    assert "unless they are there" in plan["prior"] and "how many class images" in plan["unchecked"]
    assert "how large checkpoints are, which --memory works out" in plan["unchecked"]


# Captions


def family_of(folder: Path, name: str) -> Family:
    return families[name].load(Source(str(folder)), min_snr_gamma=None, zero_terminal_snr=False)


@pytest.mark.parametrize("name", tiny.BASES)
def test_a_caption_is_cut_where_the_last_encoder_of_the_base_stops(name: str, base_folder: Any, tmp_path: Path):
    folder = base_folder(name)
    speller, family = find_speller(lessons.recipe(folder, tmp_path, "lora", "plain").base), family_of(folder, name)
    assert speller is not None and not speller.unread
    text = "abcdefghij" * 60
    fits = max(length for length in range(len(text)) if not family.too_long([text[:length]]))
    for more in range(60):
        assert speller.cut_off(text[: fits + more])[0] == text[fits : fits + more]


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", "z_image"])
def test_a_caption_that_a_longer_reader_reads_on_is_not_complained_of(name: str, base_folder: Any, tmp_path: Path):
    folder = tiny.save_pictures(tmp_path / "pictures")
    (folder / "1.txt").write_text("{} " + "a" * 150)
    (folder / "2.txt").write_text("{} " + "a" * 600)
    found = survey(lessons.recipe(base_folder(name), tmp_path, "lora", "plain", folder)).findings
    (cut,) = [finding for finding in found if finding.code == "caption-cut"]
    assert cut.file == str(folder / "2.png")
    room = {"stable_diffusion_3": 255, "flux": 511, "z_image": 512 - len("user: ")}[name]
    assert f"room for {room} tokens" in cut.message


def test_the_words_around_a_message_take_room_as_the_base_writes_them(base_folder: Any, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(base_folder("z_image"), base)
    template = (
        "{%- for message in messages %}\n    {{- '<' + message.role + '>' + message.content + '</end>' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- 'assistant' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n        {{- 'none' }}\n"
        "    {%- endif %}\n{%- endif %}"
    )
    (base / "tokenizer/chat_template.jinja").write_text(template)
    speller = find_speller(lessons.recipe(base, tmp_path, "lora", "plain").base)
    assert speller is not None
    (reader,) = speller.readers
    family = family_of(base, "z_image")
    tokenizer: Any = getattr(family.pipeline, "tokenizer")  # noqa: B009
    assert family._write("a fox", tokenizer) == f"{reader.before}a fox{reader.after}" == "<user>a fox</end>assistant"
    assert reader.cut_off("a" * 506) == "" and reader.cut_off("a" * 507) == "a"


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_a_tokenizer_of_another_kind_is_left_to_the_base(name: str, base_folder: Any, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(base_folder(name), base)
    part = "tokenizer_2" if name == "flux" else "tokenizer"
    (base / part / "tokenizer.json").unlink()
    folder = tiny.save_pictures(tmp_path / "pictures", caption="{} " + "a" * 600)
    report = survey(lessons.recipe(base, tmp_path, "lora", "plain", folder))
    assert "caption-cut" not in codes(report)
    assert f"only the base itself can read its {part}" in report.plan["unchecked"]


@pytest.mark.parametrize(("name", "part"), [("flux", "tokenizer_2"), ("z_image", "tokenizer")])
def test_a_word_of_any_encoder_cannot_be_taught_as_a_new_one(name: str, part: str, base_folder: Any, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(base_folder(name), base)
    file = base / part / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    vocabulary["added_tokens"] += [{**vocabulary["added_tokens"][0], "id": 900, "content": "foxy"}]
    file.write_text(json.dumps(vocabulary))
    word = {"placeholder": "foxy"}
    folder = tiny.save_pictures(tmp_path / "pictures")
    taught = lessons.recipe(base, tmp_path, "textual_inversion", "one-vector", folder, **word)
    assert survey(taught).status == 2 and "word-taken" in codes(survey(taught))
    beside = lessons.recipe(base, tmp_path, "lora", "plain", folder, **word)
    assert "word-ordinary" in codes(survey(beside))
    assert not {"word-taken", "word-ordinary"} & codes(survey(lessons.recipe(base, tmp_path, "lora", "plain", folder)))


# Disk


WAYS = [case for case in lessons.CASES if case[:2] == ("stable_diffusion", "epsilon")]


@pytest.mark.parametrize("case", dict.fromkeys([*WAYS, *lessons.FAMILY_X_METHOD]), ids=lessons.name)
def test_what_is_trained_is_counted_as_the_method_attaches_it(case: Any, base_folder: Any, tmp_path: Path):
    family, variant, method, way = case
    recipe = lessons.recipe(base_folder(family, variant), tmp_path, method, way)
    counted = data(recipe)["disk"]["trained"]
    if lessons.WAYS[method][way].get("variant") == "lokr":
        assert counted is None
    else:
        student = recipe.method.attach(family_of(base_folder(family, variant), family), recipe.placeholder, 0.01)
        assert counted == student.num_parameters()


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("lora", "plain"),
        ("lora", "dora"),
        ("lora", "pissa"),
        ("lora", "loha"),
        ("lora", "patterns"),
        ("dreambooth", "whole-denoiser-alone"),
        ("textual_inversion", "three-vectors"),
    ],
)
def test_what_a_run_writes_is_what_was_said(method: str, way: str, base_folder: Any, tmp_path: Path):
    train = {"checkpoint_every": 1, "keep_checkpoints": 2, "ema": 0.9}
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, method, way, train=train)
    said = data(recipe)["disk"]
    at_work = run.prepare(recipe)
    at_work.loop()
    files = at_work.finish().files
    checkpoints = list((recipe.output.folder / "checkpoints").glob("step-*/state.safetensors"))
    for file in checkpoints:
        tensors = file.stat().st_size - int.from_bytes(file.read_bytes()[:8], "little")
        assert tensors == pytest.approx(said["checkpoint"], rel=0.03, abs=1000)
    assert said["num_checkpoints"] == len(checkpoints) + 1
    written = sum(file.stat().st_size - int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert written == pytest.approx(said["files"], rel=0.02, abs=64)


def test_a_checkpoint_that_a_disk_has_no_room_for_is_named(base_folder: Any, tmp_path: Path, monkeypatch: Any):
    recipe = lessons.recipe(base_folder("flux"), tmp_path, "lora", "plain", train={"checkpoint_every": 1})
    disk = survey(recipe).forecast.disk
    usage = shutil.disk_usage(tmp_path)
    for free, wanted in ((disk.output + 1, False), (disk.output - 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert ("disk" in codes(survey(recipe))) == wanted
    assert f"3 checkpoints of {disk.checkpoint / 1000:.1f} kB" in survey(recipe).plan["disk"]


def test_a_base_in_one_file_with_its_configs_beside_is_known_as_far_as_they_tell(base_folder: Any, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.touch()
    base = {"source": str(file), "config": str(base_folder("flux"))}
    recipe = lessons.recipe(base_folder("flux"), tmp_path, "dreambooth", "images", base=base)
    known = outline(recipe.base)
    assert known is not None and known.kind == "Flux" and known.multiple == 4
    assert data(recipe)["disk"]["trained"] is None
    assert data(recipe)["class_images"] == {"wanted": 3, "there": 0}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model_index.json", "[1]"),
        ("model_index.json", '{"_class_name": "FluxPipeline", "scheduler": [1, 2], "text_encoder": 3}'),
        ("vae/config.json", '{"block_out_channels": 4}'),
        ("scheduler/scheduler_config.json", "\x00"),
        ("text_encoder/config.json", '{"hidden_size": "wide"}'),
        ("tokenizer/tokenizer_config.json", "[]"),
        ("tokenizer_2/tokenizer.json", "{}"),
        ("transformer/diffusion_pytorch_model.safetensors", "short"),
        ("transformer/diffusion_pytorch_model.safetensors", "\x02\x00\x00\x00\x00\x00\x00\x00[]"),
    ],
)
def test_a_base_that_is_damaged_does_not_stop_a_check(file: str, text: str, base_folder: Any, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(base_folder("flux"), base)
    (base / file).write_text(text)
    for method, way in (("dreambooth", "images"), ("textual_inversion", "one-vector")):
        recipe = lessons.recipe(base, tmp_path, method, way, train={"checkpoint_every": 1})
        assert survey(recipe).lines()
