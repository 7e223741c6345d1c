"""The benchmark works on a toy; how fast it is, is no test's business."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lessons
import pytest
import tiny
import torch
from typer.testing import CliRunner

from finetune.bench import counter, machine, measure, measure_peer, table
from finetune.cli import app
from finetune.errors import UserError
from finetune.plan import survey


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


@pytest.mark.parametrize("family", tiny.BASES)
def test_a_base_of_configs_alone_is_timed_with_random_weights(family: str, base_folder: Any, tmp_path: Path):
    base = shutil.copytree(base_folder(family), tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors*"))
    settings = {"rank": 2, "class_prompt": "a thing", "num_class_images": 2}
    recipe = lessons.recipe(base, tmp_path, "dreambooth", settings, train={"precision": "bf16"})
    real = lessons.recipe(base_folder(family), tmp_path, "dreambooth", settings, train={"precision": "bf16"})
    timing = measure(recipe, steps=1, random=True)
    assert timing.tflop == measure(real, steps=1).tflop > 0
    with pytest.raises(UserError):
        measure(recipe, steps=1)


def test_a_recipe_is_timed_from_the_command_to_the_adapter(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain")
    timing = measure(recipe, steps=1, command=True)
    assert timing.command_s is not None and timing.command_s > timing.step_ms / 1000
    assert not recipe.output.folder.exists()
    result = CliRunner().invoke(app, ["bench", "demo", "--command", "--random"])
    assert isinstance(result.exception, UserError) and "--random" in str(result.exception)


def test_two_processes_share_the_steps_that_are_timed_and_one_speaks(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path / "run", "lora", "plain")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    done = lessons.on_two("bench", str(tmp_path / "recipe.yaml"), "--steps", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| lesson |  | lora | 2 |") == 1


def test_a_batched_product_in_float32_of_halves_is_counted_like_any_other():
    a, b = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((2, 3, 4), (2, 4, 5)))
    with counter() as counted:
        torch.bmm(a, b, out_dtype=torch.float32)
    assert counted.get_total_flops() == 2 * 2 * 3 * 4 * 5


def test_class_images_of_random_weights_are_not_taken_for_those_of_the_base(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "dreambooth", "images")
    measure(recipe, steps=1, random=True)
    made = survey(recipe).forecast.class_images
    assert made is not None and made.there == 0


def test_a_peers_step_is_what_longer_runs_of_it_take_longer(tmp_path: Path):
    script = tmp_path / "peer.py"
    script.write_text("import sys, time; time.sleep(0.2 + 0.06 * int(sys.argv[1])); open(sys.argv[2] + '/a', 'w')")
    timing = measure_peer(f"{sys.executable} {script} {{steps}} {{folder}}", steps=10)
    assert (timing.recipe, timing.setting, timing.batch) == ("peer.py", "peer", None)
    assert timing.step_ms >= 50
    assert timing.first_step_s >= 0.2


def test_a_peer_that_fails_is_told_with_the_end_of_what_it_said(tmp_path: Path):
    script = tmp_path / "peer.py"
    script.write_text("import sys; sys.exit('no such base')")
    with pytest.raises(UserError, match=r"ended with status 1:(?s:.*)no such base"):
        measure_peer(f"{sys.executable} {script} {{steps}}", steps=1)
    with pytest.raises(UserError, match=r"needs .steps."):
        measure_peer(f"{sys.executable} {script}", steps=1)
