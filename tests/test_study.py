"""Studies: the same concepts by several recipes, each run once, its figures kept, its differences told in pairs."""

from __future__ import annotations

import csv
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from finetune import cli
from finetune.errors import UserError
from finetune.study.plan import read, tasks
from finetune.study.study import read_rows, run_study
from finetune.study.table import difference, page
from finetune.study.work import Row

DEFAULTS = Path(__file__).parent.parent / "data" / "studies" / "defaults.yaml"


@pytest.fixture
def write(base_folder: Any, tmp_path: Path) -> Any:
    """A study of two concepts on a tiny base, by a recipe of its own."""
    for name in ("dog", "cat", "bird"):
        tiny.save_pictures(tmp_path / name, 4)
    recipe = {
        "name": "toy",
        "base": {"source": str(base_folder("stable_diffusion", "epsilon"))},
        "method": {"name": "lora", "rank": 2},
        "dataset": {"folder": "dog", "resolution": tiny.SIZE},
        "train": {"steps": 2, "batch_size": 1},
        "output": {"folder": "out"},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "two.txt").write_text("{} in snow\n{} at night\n")

    def make(**changes: Any) -> Path:
        comparison = {
            "recipe": str(tmp_path / "toy.yaml"),
            "concepts": ["animals"],
            "settings": ["dataset.held_out=1"],
            "variants": {"default": [], "rank 4": ["method.rank=4"]},
        }
        tree = {
            "judging": {"class_pictures": 2, "steps": 1, "prompts": "two.txt"},
            "concepts": {
                "animals": {name: {"folder": name, "class_prompt": f"a {name}"} for name in ("dog", "cat")},
                "others": {"bird": {"folder": "bird", "class_prompt": "a bird"}},
            },
            "comparisons": {"LoRA": comparison | changes},
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return make


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def test_every_variant_is_taught_every_concept_and_only_what_is_new_is_run_again(write: Any):
    path = write()
    tables = run_study(path, jobs=2)
    rows = rows_of(path)
    assert [(row["variant"], row["concept"]) for row in rows] == [
        (variant, concept) for concept in ("dog", "cat") for variant in ("default", "rank 4")
    ]
    assert not any(row["error"] for row in rows)
    assert all(float(row["seconds"]) > 0 and float(row["kilobytes"]) > 0 and row["identity"] for row in rows)
    assert "| rank 4 |" in tables.read_text() and "- rank 4: `method.rank=4`" in tables.read_text()

    wild = ["train.learning_rate=1e30"]
    path = write(variants={"default": [], "rank 4": ["method.rank=4"], "wild": wild, "wild, again": wild})
    run_study(path)
    again = rows_of(path)
    # Their seconds, too: they were not run again.
    assert [row for row in again if not row["variant"].startswith("wild")] == rows
    both = [[row["error"] for row in again if row["variant"] == name] for name in ("wild", "wild, again")]
    assert len(both[0]) == 2 and both[0] == both[1]
    [told] = {row["error"] for row in again if row["variant"] == "wild"}
    assert told.startswith("training diverged: step 2: the loss is")
    assert "wild (0 of 2 runs) (2 diverged)" in tables.read_text()

    few = write(variants={"default": [], "rank 8": ["method.rank=8"]}, concepts=["others"])
    run_study(few)
    kept = {(row["variant"], row["concept"]) for row in rows_of(path)}
    assert {("rank 8", "bird"), ("rank 4", "dog"), ("wild, again", "cat")} <= kept  # what is not asked for may be again

    path.with_suffix(".csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no table of a study's runs"):
        run_study(path)


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [(signal.SIGINT, 130, "stopped; what is done is kept"), (signal.SIGKILL, 2, "error: a run's process was killed")],
)
def test_a_study_that_is_broken_off_keeps_what_is_done(write: Any, number: int, status: int, told: str):
    path = write(variants={f"rank {rank}": [f"method.rank={rank}", "train.steps=20"] for rank in range(1, 9)})
    command = [sys.executable, "-m", "finetune", "study", str(path)]
    study = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not path.with_suffix(".csv").exists():
        assert study.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(study.pid, number)  # as a terminal does
    else:
        children = Path(f"/proc/{study.pid}/task/{study.pid}/children").read_text().split()
        [worker] = [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
        os.kill(int(worker), number)
    _, said = study.communicate(timeout=240)
    assert study.returncode == status and told in said and "Traceback" not in said
    assert 0 < len(rows_of(path)) < 16 and path.with_suffix(".md").exists()


def test_what_is_wrong_with_any_recipe_is_said_before_the_first_run(
    write: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = write(variants={"default": ["train.setps=3"], "rank 0": ["method.rank=0"]}, settings=["train.seed=x"])
    monkeypatch.setattr(sys, "argv", ["finetune", "study", str(path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in said
    assert "LoRA.variants.default:   train.setps: unknown key. Did you mean 'steps'?" in said
    assert "LoRA.variants.rank 0:   method.rank: " in said
    assert not path.with_suffix(".csv").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"concepts": ["animal"]}, "no group 'animal'. Did you mean 'animals'?"),
        ({"variants": {"default": []}}, "LoRA.variants: expected at least 2 entries, got "),
        ({"recipes": "demo"}, "recipes: unknown key. Did you mean 'recipe'?"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(write: Any, changes: dict[str, Any], said: str):
    with pytest.raises(UserError) as refused:
        read(write(**changes))
    assert any(said in problem for problem in refused.value.problems)


def test_a_study_that_is_not_there_is_named_once(tmp_path: Path):
    path = tmp_path / "none.yaml"
    with pytest.raises(UserError) as refused:
        read(path)
    assert refused.value.problems == [f"{path}: cannot be read: No such file or directory"]


def test_a_concept_has_one_name(write: Any):
    path = write()
    path.write_text(path.read_text().replace("    bird:", "    dog:"))
    with pytest.raises(UserError, match="'dog' stands twice"):
        read(path)


def test_a_class_that_is_asked_for_has_to_be_there(write: Any):
    path = write(settings=["method.class_prompt={class}"])
    tree = yaml.safe_load(path.read_text())
    del tree["concepts"]["animals"]["cat"]["class_prompt"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="cat has no class_prompt"):
        tasks(read(path), path)


def test_a_list_of_prompts_that_is_not_there_is_named_by_its_setting(write: Any):
    path = write()
    path.write_text(path.read_text().replace("two.txt", "three.txt"))
    with pytest.raises(UserError, match=r"study\.yaml: judging\.prompts 'three\.txt': no such file, and no list"):
        read(path)


def test_only_some_of_the_comparisons_may_be_asked_for(write: Any):
    with pytest.raises(UserError, match=r"--only lora: no such comparison\. Known: LoRA"):
        run_study(write(), only=["lora"])


def test_a_difference_is_of_the_same_concept_and_as_sure_as_concepts_agree():
    base = [Row("m", "default", concept, 0, "x", identity=0.1 * place) for place, concept in enumerate("abcdef")]
    better = [replace(row, variant="better", identity=(row.identity or 0) + 0.2) for row in base]
    mixed = [
        replace(row, variant="mixed", identity=(row.identity or 0) + 0.3 * (-1) ** place)
        for place, row in enumerate(base)
    ]
    assert difference("identity", better, base) == "**+0.20 [+0.20, +0.20]**"
    assert re.match(r"[+-]0\.00 \[-", difference("identity", mixed, base))
    assert difference("identity", better[:5], base) == "+0.20"  # so few say nothing of others
    assert difference("prompt", better, base) == "-"


def test_an_adapter_is_judged_at_the_weight_that_its_variant_asks_for(write: Any):
    weighed = {f"at {weight}": [f"judging.weight={weight}"] for weight in (0, 1)}
    path = write(variants={"default": [], **weighed}, concepts=["others"])
    default, nothing, whole = tasks(read(path), path)
    assert default.digest == whole.digest != nothing.digest  # what is judged as before is not run again
    run_study(path)
    drift = {row["variant"]: float(row["drift"]) for row in rows_of(path)}
    assert drift["at 0"] == 0 < drift["default"] == drift["at 1"]
    assert "- at 0: `judging.weight=0`" in path.with_suffix(".md").read_text()

    path = write(variants={"default": [], "wrong": ["judging.weight=much", "judging.steps=2"]})
    with pytest.raises(UserError, match=r"LoRA\.variants\.wrong: judging\.weight: "):
        tasks(read(path), path)


def test_a_run_is_known_by_all_that_its_figures_depend_on(write: Any, tmp_path: Path):
    def digests(path: Path) -> list[str]:
        return [task.digest for task in tasks(read(path), path)]

    path = write()
    before = digests(path)
    assert len(set(before)) == 4 and digests(write()) == before
    text = path.read_text()
    path.write_text(text.replace("a dog", "a hound"))
    assert [old == new for old, new in zip(before, digests(path), strict=True)] == [False, False, True, True]
    path.write_text(text)
    assert not set(digests(write(settings=["dataset.held_out=1", "output.dtype=float32"]))) & set(before)
    path.write_text(text)
    (tmp_path / "two.txt").write_text("{} in snow\n{} in the city\n")
    assert not set(digests(path)) & set(before)


def test_a_run_that_the_machine_broke_is_tried_again_and_one_that_diverged_is_not(write: Any):
    path = write(variants={"default": [], "other": ["train.seed=1"]})
    [dog, _, cat, _] = tasks(read(path), path)
    assert (dog.concept, cat.concept) == ("dog", "cat")
    header = ",".join(field.name for field in fields(Row))
    lines = [f"LoRA,default,{task.concept},0,{task.digest}," + "," * 9 for task in (dog, cat)]
    path.with_suffix(".csv").write_text(f"{header}\n{lines[0]}out of memory\n{lines[1]}training diverged: step 3\n")
    run_study(path)
    told = {(row["variant"], row["concept"]): row["error"] for row in rows_of(path)}
    assert told["default", "dog"] == "" and told["default", "cat"] == "training diverged: step 3"


def test_one_study_is_carried_out_once_at_a_time_and_writes_over_nothing_else(write: Any):
    path = write()
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being carried out already"):
            run_study(path)
    path.with_suffix(".md").write_text("notes of mine")
    with pytest.raises(UserError, match="holds something else"):
        run_study(path)
    assert path.with_suffix(".md").read_text() == "notes of mine"


def test_the_study_of_the_defaults_covers_every_method_and_its_tables_are_of_its_rows():
    study = read(DEFAULTS)
    every = {(task.comparison, task.variant, task.concept, task.digest) for task in tasks(study, DEFAULTS)}
    rows = read_rows(DEFAULTS.with_suffix(".csv"))
    # None is of other settings than those that the file and its recipes have now.
    assert {(row.comparison, row.variant, row.concept, row.digest) for row in rows} == every
    assert {row.comparison for row in rows} == set(study.comparisons)
    assert DEFAULTS.with_suffix(".md").read_text() == page(DEFAULTS.name, study, rows)
    concepts = [name for group in study.concepts.values() for name in group]
    assert len(concepts) == len(set(concepts)) >= 17 + 4
