"""The benchmark works on a toy; how fast it is, is no test's business."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lessons
from typer.testing import CliRunner

from finetune.bench import machine, measure, table
from finetune.cli import app


def test_a_recipe_is_timed_without_leaving_anything_behind(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "dreambooth", "images")
    timing = measure(recipe, steps=2)
    assert timing.batch == 4  # two of the concept, two of the prior
    assert min(timing.step_ms, timing.images_per_s, timing.picture_s, timing.first_step_s, timing.peak_gib) >= 0
    assert not recipe.output.folder.exists()
    assert table([timing]).splitlines()[2].startswith("| lesson |  | dreambooth | 4 |")
    assert {"device", "python", "torch"} <= machine().keys()


def test_a_recipe_is_timed_once_for_each_setting(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path / "run", "lora", "plain")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    settings, output = ["train.batch_size=1", "train.batch_size=2 train.accumulate=2"], tmp_path / "figures.json"
    arguments = [part for text in settings for part in ("--set", text)]
    command = ["bench", str(tmp_path / "recipe.yaml"), *arguments, "--steps", "1", "--output", str(output)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    timings = json.loads(output.read_text())["timings"]
    assert [(timing["setting"], timing["batch"]) for timing in timings] == [(settings[0], 1), (settings[1], 2)]
    assert 1.9 < timings[1]["tflop"] / timings[0]["tflop"] < 2.1
    assert all(text in result.output for text in settings)
