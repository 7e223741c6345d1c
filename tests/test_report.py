"""The report: a real run read back as a page that is whole, safe, and right on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lessons
import numpy as np
import pytest
import tiny
from PIL import Image

from finetune import cli, run
from finetune.errors import UserError
from finetune.evaluation.encoders import EMBEDDED
from finetune.evaluation.evaluate import Settings, evaluate
from finetune.evaluation.studio import Size
from finetune.export import LORA_FILE
from finetune.files import read_shapes, read_tensors, write_tensors
from finetune.report import charts, write_report

HOSTILE = """<script>alert("1")</script><img src=x onerror='alert(2)'> & {} </td>"""
PROMPTS = ["a {} thing", HOSTILE]
FEW = Size(seeds=2, class_pictures=2, weights=(0.5, 1.0), sweep_prompts=1)
SECTIONS = ["What was asked", "The pictures it learnt from", "What it draws", "How training went"]
SECTIONS += ["How good it is", "Files, time and memory"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass
class Page(HTMLParser):
    """What a page holds; its tags must be balanced."""

    text: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def read(*folders: Path, file: Path | None = None) -> Page:
    return Page(write_report(folders, file).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(base_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with hostile captions and prompts, held-out pictures, samples while training, and an evaluation."""
    output = tmp_path_factory.mktemp("reported")
    pictures = tiny.save_pictures(output / "pictures", caption=HOSTILE)
    base = base_folder("stable_diffusion")
    validation = {"prompts": PROMPTS, "every": 2, "measure_every": 1, "encoder": str(EMBEDDED)}
    settings = {"dataset": {"held_out": 1}, "validation": validation}
    recipe = lessons.recipe(base, output, "dreambooth", "images", pictures, **settings)
    run.train(recipe)
    asked = output / "prompts.txt"
    asked.write_text("{} in snow\na {} at night\n")
    evaluate([str(recipe.output.folder)], settings=Settings(str(asked), (str(EMBEDDED),), FEW))
    return recipe.output.folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """That run, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")


def change_metrics(folder: Path, values: dict[str, dict[int, float]]) -> None:
    """Put numbers by name and step into a run's lines."""
    path = folder / "metrics.jsonl"
    lines = [{"step": step, name: value} for name, table in values.items() for step, value in table.items()]
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_is_shown_from_what_was_asked_to_what_it_cost(finished: Path):
    page = read(finished)
    positions = [page.said.index(title) for title in SECTIONS]
    assert positions == sorted(positions)
    assert "dreambooth" in page.said and "4 of 2 pictures each" in page.said
    assert "Does it look like the subject?" in page.said and "Was it taught for too long?" in page.said
    titles = ("Loss on the training pictures", "Loss on held-out photos", "By noise level")
    titles += ("Likeness against obedience, by step", "Likeness against obedience, by adapter weight")
    assert all(title in page.said for title in titles)
    assert "before training" in page.said and "step 2" in page.said
    assert "pytorch_lora_weights.safetensors" in page.said
    pictures = 5 + 3 * len(PROMPTS) + 2 * 2 + 1  # of the data, the samples, each prompt, and the worst
    assert len(page.all("img")) == pictures
    assert "held out: not trained on" in page.said and "gone" not in page.said


def test_captions_and_prompts_are_text_and_never_markup(finished: Path):
    page = read(finished)
    assert HOSTILE.replace("{}", "<it>") in page.said
    assert not page.all("script")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_nothing_outside_the_file_is_asked_for(finished: Path, tmp_path: Path):
    for page in (read(finished), read(finished, shutil.copytree(finished, tmp_path / "b"), file=tmp_path / "r.html")):
        assert not page.all("link") and not page.all("iframe") and not page.all("a")
        assert all((image["src"] or "").startswith("data:image/webp;base64,") for image in page.all("img"))
        assert not any("href" in attributes for _, attributes in page.tags)
        style = re.findall(r"<style>(.*?)</style>", page.text, re.DOTALL)
        assert len(style) == 1 and "url(" not in style[0] and "@import" not in style[0]
        [policy] = [each["content"] for each in page.all("meta") if "http-equiv" in each]
        assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_picture_and_chart_is_described_and_every_table_has_headers(finished: Path):
    page = read(finished)
    assert all(image["alt"] for image in page.all("img"))
    drawn = [chart for chart in page.all("svg") if chart.get("aria-hidden") != "true"]
    assert len(drawn) >= 10 and all(chart["role"] == "img" and chart["aria-label"] for chart in drawn)
    assert len(page.all("table")) == len(page.all("caption")) == 4
    assert {head.get("scope") for head in page.all("th")} == {"row", "col"}
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1


def test_what_is_missing_is_named_and_left_out(copy: Path):
    shutil.rmtree(copy / "samples")
    shutil.rmtree(copy / "evaluation")
    recipe = copy / "recipe.yaml"
    recipe.write_text(re.sub(r"folder: .*/pictures", "folder: /nowhere/pictures", recipe.read_text()))
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    plain = [{name: value for name, value in line.items() if "validation" not in name} for line in lines]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))
    page = read(copy)
    assert "The pictures cannot be shown any more: dataset.folder: /nowhere/pictures is not a folder" in page.said
    assert "No samples: validation.prompts" in page.said
    assert "No loss on held-out photos: with dataset.held_out" in page.said
    assert "No scores while training" in page.said and "No chart of adapter weights" in page.said
    assert "This run was not evaluated yet: finetune evaluate RUN" in page.said
    assert not page.all("img") and len(page.all("svg")) == 3  # the loss and its legend


def test_a_picture_that_went_since_is_a_box_that_says_so(copy: Path):
    (copy / "samples/step-000004").rename(copy / "samples/step-000003")
    sample = next((copy / "samples/step-000003").glob("00-*"))
    sample.write_bytes(sample.read_bytes()[:100])
    assert "gone: a <it> thing, at step 3" in [span.get("aria-label") for span in read(copy).all("span")]


def test_an_evaluation_of_another_version_is_named_with_what_to_do(copy: Path):
    (copy / "evaluation/evaluation.json").write_text('{"name": "x"}')
    assert "is not what this version writes" in (said := read(copy).said)
    assert "finetune evaluate RUN --overwrite" in said


def test_half_a_line_of_metrics_is_passed_over(copy: Path):
    odd = '{"step": "5"}\n[1]\n{"step": 9, "loss": NaN}\n{"step": 9, "loss": 1e999}\n'
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(odd + '{"step": 5, "loss": null}\n{"step": 6, "loss": "\n{"step": 7, "lo')
    assert "at step 4." in next(
        label for chart in read(copy).all("svg") if "training loss" in (label := chart.get("aria-label") or "")
    )


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({0: 0.5, 2: 0.4, 4: 0.3}, "fell until the last step, 4"),
        ({0: 0.5, 2: 0.4, 4: 0.404}, "was lowest at step 2 and stayed about there"),
        ({0: 0.5, 2: 0.4, 4: 0.5}, "Overfitting began after step 2: the loss on held-out photos ended 25% above that."),
        ({0: 0.3, 2: 0.4, 4: 0.5}, "never fell below the base's"),
    ],
)
def test_the_report_says_when_overfitting_began(copy: Path, losses: dict[int, float], words: str):
    change_metrics(copy, {"validation_loss/mean": losses | {1: 0.6, 3: 0.6}})
    page = read(copy)
    assert page.said.count(words) == 2  # in the verdict and under the chart


def test_the_step_whose_weights_were_exported_is_the_result(copy: Path):
    assert "step 4, the result" in (said := read(copy).said) and "exported step" not in said
    path = copy / LORA_FILE
    header = read_shapes(path)[1] | {"steps": "2"}
    write_tensors(read_tensors(path), path, header, overwrite=True)
    assert "step 2, the result" in (said := read(copy).said) and "exported step 2, which was the best" in said


def test_scores_while_training_become_points_with_their_steps(copy: Path):
    names = "validation_score/prompt", "validation_score/identity"
    change_metrics(copy, {names[0]: {2: 0.6, 4: 0.5}, names[1]: {2: 0.2, 4: 0.4}})
    labels = [chart.get("aria-label") or "" for chart in read(copy).all("svg")]
    assert any("2 at 0.60, 0.20, 4 at 0.50, 0.40" in label for label in labels)


def test_time_and_memory_are_told_where_they_are_known(copy: Path):
    assert "GPU memory" not in read(copy).said
    change_metrics(copy, {"seconds": {4: 3725.0}, "peak_gib": {4: 9.81}})
    said = read(copy).said
    assert "time 1 h 2 min" in said and "GPU memory at most 9.8 GiB" in said


def test_a_copy_stands_beside_the_photo_that_it_repeats(copy: Path):
    path = copy / "evaluation/evaluation.json"
    found = json.loads(path.read_text())
    row = next(row for row in found["pictures"] if row["kind"] == "concept")
    before = len(read(copy).all("img"))
    row |= {"copied": True, "nearest_cosine": 0.987}
    path.write_text(json.dumps(found))
    page = read(copy)
    assert len(page.all("img")) == before + 2
    assert f"drawn, and {Path(row['nearest']).name}: cosine 0.99" in page.said


def test_several_runs_stand_beside_each_other(finished: Path, copy: Path, tmp_path: Path):
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    page = read(finished, copy, file=tmp_path / "both.html")
    assert "2 runs compared" in page.said and "train.learning_rate 0.01" not in page.said
    header, *rows = [row for row in re.findall(r"<tr>.*?</tr>", page.text) if "<img" not in row][:3]
    assert "<code>train.<wbr>learning_rate</code>" in header and "steps" not in header
    assert "<td>0.01</td>" in rows[0] and "<td>0.02</td>" in rows[1]
    assert [name for row in rows for name in re.findall(r'<th scope="row">(\w+)</th>', row)] == ["run", "copy"]
    assert len(page.all("img")) == 3 * len(PROMPTS)  # before training, and by each run
    assert "leaking into its class: run 0." in " ".join(chart.get("aria-label") or "" for chart in page.all("svg"))
    assert "Careful: these runs were judged by other" not in page.said
    legends = re.findall(r'<ul class="legend">.*?</ul>', page.text)
    assert all("run" in part and "copy" in part for part in legends) and len(legends) >= 3


def test_scores_that_do_not_compare_are_named(finished: Path, copy: Path, tmp_path: Path):
    path = copy / "evaluation/evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"photos": ["/somewhere/else.png"]}))
    assert "Careful: these runs were judged by other" in read(finished, copy, file=tmp_path / "both.html").said


def test_runs_of_the_same_name_are_told_apart_by_their_folders(copy: Path, tmp_path: Path):
    other = shutil.copytree(copy, tmp_path / "elsewhere" / "copy")
    said = read(copy, other, file=tmp_path / "both.html").said
    assert f"{tmp_path.name}/copy" in said and "elsewhere/copy" in said


def say(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command line says of a mistake, which ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["finetune", "report", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in said
    return said


def test_folders_that_are_no_runs_are_named_together(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "begun").mkdir()
    shutil.copy(finished / "recipe.yaml", tmp_path / "begun")
    folders = [str(tmp_path / "nowhere"), str(tmp_path), str(finished), str(tmp_path / "begun")]
    said = say(folders, capsys, monkeypatch)
    assert "nowhere is no folder" in said and f"{tmp_path} holds no recipe.yaml" in said
    assert "begun has no metrics, samples or evaluation yet" in said and str(finished) not in said
    assert "named twice" in say([str(finished), f"{finished}/"], capsys, monkeypatch)
    assert "is a folder. Name a file" in say([str(finished), "--output", str(tmp_path)], capsys, monkeypatch)


def test_the_command_says_where_the_report_is(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(sys, "argv", ["finetune", "report", str(copy)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None) and capsys.readouterr().out.strip() == str(copy / "report.html")
    first = (copy / "report.html").read_text()
    assert read(copy).text == first  # what a report says does not depend on an earlier one
    with pytest.raises(UserError, match="name at least one"):
        write_report([])


def test_a_report_of_many_large_pictures_can_be_sent_by_mail(copy: Path, tmp_path: Path):
    folder, random = tmp_path / "many", np.random.default_rng(0)
    folder.mkdir()
    for number in range(70):
        pixels = random.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.jpg")
        (folder / f"{number:02}.txt").write_text("a {}")
    recipe = copy / "recipe.yaml"
    recipe.write_text(re.sub(r"folder: .*/pictures", f"folder: {folder}", recipe.read_text()))
    page = read(copy)
    assert "70 pictures, 1 of them held out; the first 60 are shown" in page.said and len(page.text) < 3e6


def colours() -> Iterator[tuple[dict[str, str], str]]:
    """The page's colours by day and by night."""
    style = (Path(charts.__file__).with_name("style.css")).read_text()
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        yield dict(re.findall(r"--(\w+): (#\w{6})", block)), block


def contrast(one: str, other: str) -> float:
    """As WCAG 2 has it."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_letters_and_lines_can_be_read_by_day_and_by_night():
    found = [colour for colour, _ in colours()]
    assert len(found) == 2
    for colour in found:
        assert all(
            contrast(colour[text], colour[back]) >= 4.5 for text in ("ink", "soft") for back in ("paper", "tint")
        )
        assert all(contrast(colour[f"c{i}"], colour["paper"]) >= 4.5 for i in range(charts.COLOURS))


def test_thinning_keeps_every_peak_and_smoothing_is_a_mean():
    points = [(step, 1.0 if step == 4321 else -1.0 if step == 777 else 0.0) for step in range(10_000)]
    thin = charts.thin(points)
    assert len(thin) <= charts.DOTS and {(4321, 1.0), (777, -1.0)} <= set(thin) and thin == sorted(thin)
    assert charts.smooth([(1, 1.0), (2, 3.0), (3, 5.0)], 2) == [(1, 1.0), (2, 2.0), (3, 4.0)]


@pytest.mark.parametrize("numbers", [[0.0], [5.0, 5.0], [1e-9, 2e-9], [-3.0, 1e6], [0.011, 0.52]])
def test_an_axis_has_a_few_round_numbers_within_it(numbers: list[float]):
    scale = charts.Scale.over(numbers, 0, 100)
    assert 2 <= len(scale.ticks()) <= 7
    assert all(0 <= scale(number) <= 100 for number in [*scale.ticks(), *numbers])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_without_scrolling_sideways(finished: Path, copy: Path, tmp_path: Path, width: int):
    write_report([finished], tmp_path / "one.html")
    write_report([finished, copy], tmp_path / "two.html")
    frames = "".join(f'<iframe src="{name}.html" width="{width}" height="800"></iframe>' for name in ("one", "two"))
    script = """onload = () => document.title = [...document.querySelectorAll("iframe")].map(frame => {
        const page = frame.contentDocument, images = [...page.images];
        return [page.documentElement.clientWidth, page.documentElement.scrollWidth,
                images.filter(image => image.naturalWidth).length, images.length].join(" ") }).join(";")"""
    style = "<style>iframe { border: 0 }</style>"
    (tmp_path / "frames.html").write_text(f"<!doctype html><title>-</title>{style}{frames}<script>{script}</script>")
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    shown = subprocess.run(
        [*command, (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    [title] = re.findall(r"<title>(.*?)</title>", shown.stdout)
    for measured in title.split(";"):
        window, page, drawn, images = map(int, measured.split())
        assert width - 20 <= window <= width and page <= window, measured
        assert drawn == images > 0
