"""The commands as a user meets them: fast answers, every mistake named, never a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tiny import SIZE, save_pictures

from finetune import cli

# Runs commands in one process, after each of which the heavy libraries that it imported are printed.
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "wandb")
LIGHT_COMMANDS = [["--help"], ["train", "--help"], ["version"], ["list"], ["show", "r.yaml"], ["check", "r.yaml"]]
LIGHT_COMMANDS += [["show", "r.yaml", "train.setps=3"], ["check", "nowhere"]]
LIGHT_COMMANDS += [["check", "r.yaml", f"base.source={Path(__file__).parent.parent / 'data/base'}", "--json"]]
WATCH = f"""
import contextlib, io, sys
from finetune import cli
for command in {LIGHT_COMMANDS}:
    sys.argv = ["finetune", *command]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), \\
            contextlib.redirect_stderr(io.StringIO()):
        cli.main()
    print(*command, ":", *sys.modules.keys() & {set(HEAVY)})
"""

LONG = 300 * "x"  # more than a file system takes, which it says in a way of its own


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with pictures and a recipe."""
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "pictures", 3)
    write()
    return tmp_path


def write(**sections: Any) -> None:
    tree = {
        "name": "test",
        "base": {"source": "someone/a-model"},
        "method": {"name": "lora"},
        "dataset": {"folder": "pictures", "resolution": SIZE},
        "train": {"steps": 6, "batch_size": 2},
        "output": {"folder": "out"},
        **sections,
    }
    Path("r.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: its exit status, what it printed, what it complained of."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.usefixtures("home")
def test_no_heavy_library_is_imported_to_help_to_list_or_to_check():
    done = start("-c", WATCH)
    assert done.stdout.splitlines() == [" ".join([*command, ":"]) for command in LIGHT_COMMANDS], done.stderr


@pytest.mark.usefixtures("home")
def test_a_bad_recipe_ends_with_status_2_and_every_problem_on_stderr():
    overrides = ["trian.steps=3", "method.rnak=4", "train.steps=true", "dataset.flip=maybe"]
    done = start("-m", "finetune", "train", "r.yaml", *overrides)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    problems = ("trian: unknown key. Did you mean 'train'?", "method.rnak: unknown key. Did you mean 'rank'?")
    assert all(problem in done.stderr for problem in (*problems, "r.yaml", "train.steps: ", "dataset.flip: "))
    assert done.stderr.count("\n") == 5


@pytest.mark.usefixtures("home")
def test_no_command_at_all_shows_them_all(call: Any):
    _, printed, complaint = call()
    assert all(command in printed + complaint for command in ("train", "generate", "list", "show", "check"))


def test_list_names_recipes_methods_and_families(call: Any):
    status, printed, _ = call("list")
    assert status == 0
    names = ("demo", "dreambooth", "lora", "pivotal_tuning", "textual_inversion", "stable_diffusion")
    assert all(f"\n  {name}" in printed for name in names)


@pytest.mark.usefixtures("home")
def test_show_prints_a_recipe_that_can_be_shown_again(call: Any):
    status, printed, _ = call("show", "r.yaml", "train.learning_rate=1e-3")
    assert status == 0
    train = yaml.safe_load(printed)["train"]
    assert (train["steps"], train["learning_rate"], train["warmup"]) == (6, 1e-3, 0)
    Path("again.yaml").write_text(printed, encoding="utf-8")
    assert call("show", "again.yaml") == (0, printed, "")


@pytest.mark.usefixtures("home")
def test_check_tells_the_plan_in_pictures_and_updates(call: Any):
    status, printed, _ = call("check", "r.yaml")
    assert status == 1  # 4 times are few
    assert "3 in pictures" in printed and "6 updates of 2 pictures" in printed and "4 times" in printed


@pytest.mark.usefixtures("home")
def test_check_does_not_round_what_is_seen_to_never(call: Any):
    assert " 0 times" not in call("check", "r.yaml", "train.steps=1", "train.batch_size=1")[1]


@pytest.mark.usefixtures("home")
def test_check_says_which_pictures_are_enlarged(call: Any):
    assert f"from {SIZE}" in call("check", "r.yaml", "dataset.resolution=512")[1]


def _remove(folder: Path) -> str:
    shutil.rmtree(folder)
    return "pictures is not a folder"


def _empty(folder: Path) -> str:
    for file in folder.iterdir():
        file.unlink()
    return "no pictures in pictures"


def _corrupt(folder: Path) -> str:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    return "pictures/1.png: cannot be read"


def _uncaption(folder: Path) -> str:
    (folder / "2.txt").unlink()
    return "pictures/2.png: has no caption. Add 2.txt"


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("harm", [_remove, _empty, _corrupt, _uncaption])
def test_pictures_that_cannot_be_used_are_named_with_status_2(
    command: str, harm: Callable[[Path], str], home: Path, call: Any
):
    mention = harm(home / "pictures")
    status, printed, complaint = call(command, "r.yaml")
    assert (status, printed) == (2, "")
    assert mention in complaint
    assert all(line.startswith("error: ") for line in complaint.splitlines())


@pytest.mark.usefixtures("home")
def test_a_caption_without_the_word_that_is_taught_is_named(call: Any):
    Path("pictures/1.txt").write_text("a red thing")
    status, _, complaint = call("check", "r.yaml", "method={name: textual_inversion, init: thing}")
    assert status == 2
    assert "'a red thing'" in complaint and "1.png" in complaint


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["check", LONG], LONG),
        (["check", "r.yaml", f"dataset.folder={LONG}"], LONG),
        (["train", "r.yaml", f"output.folder={LONG}"], LONG),
        (["generate", "a dog", "--adapter", LONG], LONG),
        (["check", "demoo"], "Did you mean 'demo'?"),
        (["check", "nowhere.yaml"], "'nowhere.yaml'"),
        (["check", "pictures"], "'pictures'"),
        (["check", "pictures/0.png"], "pictures/0.png"),
        (["check", "r.yaml", "name=2026-13-45"], "2026-13-45"),
        (["train", "r.yaml", "base.source=./nowhere"], "./nowhere is not a folder"),
        (["train", "r.yaml", "base.source=not/in/here"], "base.source: not/in/here"),
        (["train", "r.yaml", "base.source=pictures"], "base.source: pictures"),
        (["train", "r.yaml"], "base.source: someone/a-model"),
        (["train", "r.yaml", "--resume", "--overwrite"], "--resume and --overwrite"),
        (["generate", "a dog"], "--base"),
        (["generate", "a dog", "--base", "./nowhere"], "--base: ./nowhere"),
        (["generate", "a dog", "--base", "not/in/here"], "--base: not/in/here"),
        (["generate", "a dog", "--base", "pictures"], "--base: pictures"),
        (["generate", "a dog", "--adapter", "nowhere"], "nowhere does not exist"),
        (["generate", "a dog", "--adapter", "pictures"], "pictures"),
        (["generate", "a dog", "--adapter", "pictures/0.png"], "pictures/0.png: not a safetensors file"),
        (["generate", "a dog", "--adapter", "pictures=much"], "not a number"),
        (["generate", "a dog", "--adapter", "pictures=nan"], "not a number"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_ends_with_status_2_and_one_clear_line(arguments: list[str], mention: str, call: Any):
    status, printed, complaint = call(*arguments)
    assert (status, printed) == (2, "")
    assert mention in complaint
    assert all(line.startswith("error: ") for line in complaint.splitlines())


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("folder", ["r.yaml", "pictures/0.png/x", "/proc/out"])
def test_an_output_folder_that_cannot_be_made_is_named(folder: str, base_folder: Any, call: Any):
    base = base_folder("stable_diffusion")
    status, printed, complaint = call("train", "r.yaml", f"base.source={base}", f"output.folder={folder}")
    assert (status, printed) == (2, "")
    assert f"output.folder: {folder}" in complaint


@pytest.mark.usefixtures("home")
def test_a_run_that_could_not_start_is_in_nobodys_way(call: Any):
    first = call("train", "r.yaml", "base.source=pictures")
    assert call("train", "r.yaml", "base.source=pictures") == first
    assert not Path("out").exists()


@pytest.mark.parametrize("harm", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json"])
def test_a_broken_base_is_named_with_status_2(harm: str, home: Path, base_folder: Any, call: Any):
    broken = shutil.copytree(base_folder("stable_diffusion"), home / "broken")
    (broken / harm).write_bytes((broken / harm).read_bytes()[:40])
    for command in (["train", "r.yaml", "base.source=broken"], ["generate", "a dog", "--base", "broken"]):
        status, _, complaint = call(*command)
        assert status == 2
        assert "broken" in complaint.splitlines()[-1]


@pytest.mark.usefixtures("home")
def test_a_size_that_the_base_cannot_draw_is_refused(base_folder: Any, call: Any):
    base = str(base_folder("stable_diffusion"))
    status, _, complaint = call("generate", "a dog", "--base", base, "--size", "30", "--steps", "1")
    assert status == 2 and "--size" in complaint


@pytest.mark.usefixtures("home")
def test_generate_writes_the_pictures_it_names(base_folder: Any, call: Any):
    base = str(base_folder("stable_diffusion"))
    options = ("--base", base, "--steps", "1", "--count", "2", "--seed", "5", "--output", "drawn")
    status, printed, _ = call("generate", "a dog", "a cat!", *options)
    assert status == 0
    names = ["0005-a-dog.png", "0006-a-dog.png", "0007-a-cat.png", "0008-a-cat.png"]
    assert printed.splitlines() == [f"drawn/{name}" for name in names]
    assert {Image.open(path).size for path in printed.splitlines()} == {(SIZE, SIZE)}
