"""The time that is told: what it is made of, and for which machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lessons
import pytest
import torch

from finetune import cli, run
from finetune.duration import Duration, Machine, clock, duration, here
from finetune.plan import survey
from finetune.recipe import Recipe
from finetune.rehearsal import Work
from finetune.request import cache_folder

CPU = Machine("a CPU", "cpu", 1e12)
GPU = Machine("a GPU", "cuda", 1e15)
WORK = {
    "step": Work(10**12, 100_000),
    "picture": Work(10**11, 0),
    "caption": Work(10**10, 0),
    "pass": Work(10**12, 0),
    "decoded": Work(10**12, 0),
}


def needs(recipe: Recipe[Any], machine: Machine = CPU, work: Any = WORK) -> Duration:
    return duration(recipe, work, survey(recipe).forecast, 1, machine)


@pytest.fixture
def dreambooth(base_folder: Any, tmp_path: Path) -> Any:
    def recipe(**sections: Any) -> Recipe[Any]:
        return lessons.recipe(base_folder("stable_diffusion"), tmp_path, "dreambooth", "images", **sections)

    return recipe


def test_class_images_that_are_there_take_no_time(dreambooth: Any):
    recipe = dreambooth()
    before = needs(recipe)
    run.prepare(recipe)
    assert (before.phases["class images"] > 0, needs(recipe).phases["class images"]) == (True, 0)
    sorted(cache_folder().rglob("*.png"))[0].unlink()
    some = needs(recipe).phases["class images"]
    assert some == pytest.approx(before.phases["class images"] / 3)


def test_each_round_of_validation_and_each_prompt_counts(dreambooth: Any):
    shown = {"prompts": ["a {}"], "steps": 2}
    once = needs(dreambooth(validation=shown)).phases["validation"]
    assert once > 0
    assert needs(dreambooth(validation={**shown, "prompts": ["a {}", "b {}"]})).phases["validation"] == 2 * once
    assert needs(dreambooth(validation={**shown, "every": 2})).phases["validation"] == 1.5 * once
    assert needs(dreambooth(validation={**shown, "every": 3})).phases["validation"] == 1.5 * once
    assert needs(dreambooth(validation={**shown, "prompts": []})).phases["validation"] == 0


def test_steps_and_pictures_that_are_encoded_count(dreambooth: Any):
    plain, longer = needs(dreambooth()).phases, needs(dreambooth(train={"steps": 400})).phases
    assert longer["steps"] == 100 * plain["steps"]
    assert longer["encoding"] == plain["encoding"]  # five pictures and three of the class, in one group
    cropped = needs(dreambooth(train={"steps": 400}, dataset={"crop": "random"})).phases
    assert cropped["encoding"] > 50 * longer["encoding"]


def test_a_gpu_waits_for_python_and_a_cpu_does_both(dreambooth: Any):
    recipe = dreambooth(train={"steps": 1, "batch_size": 1, "capture": False})
    idle, busy = {**WORK, "step": Work(0, 100_000)}, {**WORK, "step": Work(10**15, 0)}
    both = {**WORK, "step": Work(10**15, 100_000)}
    on_gpu = [needs(recipe, GPU, work).phases["steps"] for work in (idle, busy, both)]
    assert on_gpu[2] == max(on_gpu[:2]) and on_gpu[0] == pytest.approx(1.3)
    on_cpu = [needs(recipe, CPU, work).phases["steps"] for work in (idle, busy, both)]
    assert on_cpu[2] == pytest.approx(on_cpu[0] + on_cpu[1])
    captured = needs(dreambooth(train={"steps": 1, "batch_size": 1}), GPU, idle).phases["steps"]
    assert captured == pytest.approx(0.22)


def test_the_machine_at_hand_is_named_and_timed():
    machine = here(torch.float32)
    assert machine.speed > 1e8
    assert machine.kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert machine.name == (torch.cuda.get_device_name() if torch.cuda.is_available() else "1 CPU thread")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.1, "0:00:01"), (59, "0:00:59"), (60, "0:01:00"), (3723, "1:02:03"), (360_000, "100:00:00")],
)
def test_a_time_is_told_in_hours_minutes_and_seconds(seconds: float, shown: str):
    assert clock(seconds) == shown


def test_the_lines_name_the_machine_and_add_up(dreambooth: Any):
    found = needs(dreambooth(validation={"prompts": ["a {}"]}), GPU)
    lines = found.lines()
    assert "a GPU" in lines[0] and clock(found.total) in lines[-1]
    assert [line.split()[0] for line in lines[1:]] == ["class", "encoding", "steps", "validation", "in"]
    assert found.total == pytest.approx(sum(found.phases.values()))
    assert replace(found, machine=CPU).lines() != lines


def test_programs_get_it_beside_the_memory(base_folder: Any, tmp_path: Path, monkeypatch: Any, capsys: Any):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "textual_inversion", "one-vector")
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    monkeypatch.setattr("sys.argv", ["finetune", "check", str(path), "--memory", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert found["time"]["seconds"]["all"] >= found["time"]["seconds"]["steps"] > 0
    assert found["time"]["machine"]["kind"] in ("cpu", "cuda")
    assert found["memory"]["work"]["step"]["flops"] > found["memory"]["work"]["pass"]["flops"] > 0
    state = found["forecast"]["disk"]
    assert found["memory"]["checkpoint"] == state["checkpoint"] == 12 * state["trained"]


def test_a_check_without_memory_says_nothing_of_time(dreambooth: Any, tmp_path: Path):
    assert "time" not in survey(dreambooth()).as_dict()
