"""A run survives what machines do to it. Every fault is a real one: a process that is killed, a file system that is
full, memory that is refused, a server that is silent, a second process in the same folder.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lessons
import pytest
import tiny
import torch
import victims
from PIL import Image
from safetensors.torch import load_file
from victims import Both, Dies, Fills, HasNoLocks, Mounts, Removes, Sets, Signals, Starves, Victim, gives_back

from finetune import checkpoint
from finetune.export import LORA_FILE
from finetune.files import read_shapes

SECONDS = 20  # to save and leave, on a machine that does other things as well; work goes on for minutes
NO_ROOM = "No space left on device"
UNCACHED = Sets(
    "finetune.cache", IN_MEMORY=0, OF_DISK=0
)  # no room to keep what was encoded: pictures are read at each step
can_filter = victims.works("Dies('mkdir')", "os.mkdir(sys.argv[1] + '/a')", -signal.SIGSYS)
can_mount = victims.works("Mounts(Path(sys.argv[1]), 4096)", "assert os.statvfs(sys.argv[1]).f_blocks == 1", 0)
filters = pytest.mark.skipif(not can_filter, reason="the kernel filters no system calls here")
mounts = pytest.mark.skipif(not can_mount, reason="users may have no mounts of their own here")


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    victims.start_server()


@pytest.fixture(autouse=True)
def nobody_is_left_behind() -> Any:
    yield
    victims.end_all()


@pytest.fixture
def write(base_folder: Any, tmp_path: Path) -> Any:
    """A recipe as a file, with a base and pictures."""

    def written(method: str = "lora", way: Any = "plain", name: str = "run", **sections: Any) -> tuple[str, Path]:
        pictures = tmp_path / "pictures"
        if not pictures.exists():
            tiny.save_pictures(pictures)
        sections["train"] = {"steps": 6, "checkpoint_every": 1, **sections.get("train", {})}
        sections["output"] = {"folder": str(tmp_path / name), "dtype": "float32", **sections.get("output", {})}
        recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, method, way, pictures, **sections)
        file = tmp_path / f"{name}.yaml"
        file.write_text(recipe.to_yaml())
        return str(file), recipe.output.folder

    return written


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What its steps have said, which no clock has a part in."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if "seconds" not in line]


def checkpoints(folder: Path) -> list[int]:
    """Steps of all that have a checkpoint's name, each of which must be whole."""
    found = sorted((folder / "checkpoints").glob("step-*"))
    assert [checkpoint.damage(path) for path in found] == [None] * len(found)
    return [int(path.name[5:]) for path in found]


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / LORA_FILE)


def assert_same(folder: Path, other: Path) -> None:
    """Two runs did the same, bit for bit."""
    assert metrics(folder) == metrics(other)
    assert learnt(folder).keys() == learnt(other).keys()
    assert all(torch.equal(value, learnt(other)[name]) for name, value in learnt(folder).items())


def assert_one(lines: list[str], start: str, *mentions: str) -> None:
    """One line begins so, and tells all that."""
    found = [line for line in lines if line.startswith(start) and all(mention in line for mention in mentions)]
    assert len(found) == 1, lines


# Killed


@filters
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(write: Any):
    plain, undisturbed = write(name="undisturbed")
    assert Victim("train", plain).end() == 0
    recipe, folder = write(name="killed")
    deaths = {2: Dies("mkdir"), 3: Dies("fsync"), 4: Dies("rename"), 5: Dies("unlink")}  # the save of each step
    for step, death in deaths.items():
        victim = Victim("train", recipe, *(["--resume"] if step > 2 else []), steps={step: death})
        assert victim.end() == -signal.SIGSYS
        assert checkpoints(folder)[-1] == (step if step == 5 else step - 1)  # step 5 dies while it deletes step 3
        assert not (folder / LORA_FILE).exists()
    assert Victim("train", recipe, "--resume").end() == 0
    assert_same(folder, undisturbed)
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_run_that_is_killed_at_any_moment_goes_on(write: Any):
    plain, undisturbed = write(name="undisturbed", train={"steps": 12}, validation={"every": 3})
    assert Victim("train", plain).end() == 0
    recipe, folder = write(name="killed", train={"steps": 12}, validation={"every": 3})
    for wait in (0.0, 0.013, 0.029, 0.05):
        done = len(metrics(folder))
        victim = Victim("train", recipe, *(["--resume"] if done else []))
        victim.await_(lambda done=done: len(metrics(folder)) > done + 1)
        time.sleep(wait)
        victim.send(signal.SIGKILL)
        victim.end()
        checkpoints(folder)
    assert Victim("train", recipe, "--resume").end() == 0
    assert_same(folder, undisturbed)
    for sample in folder.rglob("samples/*/*"):
        assert sample.read_bytes() == (undisturbed / sample.relative_to(folder)).read_bytes()


@filters
def test_a_run_that_is_killed_while_it_exports_leaves_no_adapter_and_exports_again(write: Any):
    recipe, folder = write()
    assert Victim("train", recipe, finish=Dies("fsync")).end() == -signal.SIGSYS
    assert not (folder / LORA_FILE).exists() and checkpoints(folder)[-1] == 6
    assert Victim("train", recipe, "--resume").end() == 0
    names = [
        "README.md",
        "checkpoints",
        "grid.png",
        "metrics.jsonl",
        LORA_FILE,
        "recipe.yaml",
        "report.html",
        "samples",
    ]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", *names]


@filters
def test_a_whole_pipeline_that_is_exported_is_there_whole_or_not_at_all(write: Any):
    way = {"denoiser": "whole", "rank": 16, "prior": "none", "export_checkpoint": True}
    recipe, folder = write("dreambooth", way, train={"steps": 1})
    assert Victim("train", recipe, finish=Dies("fsync")).end() == -signal.SIGSYS
    assert not (folder / "checkpoint").exists() and not (folder / LORA_FILE).exists()
    assert Victim("train", recipe, "--resume").end() == 0
    assert (folder / "checkpoint" / "model_index.json").exists() and not list(folder.glob(".checkpoint*"))


def test_a_run_that_replaces_another_leaves_nothing_of_it_that_could_be_taken_for_its_own(write: Any):
    recipe, folder = write()
    assert Victim("train", recipe).end() == 0
    victim = Victim("train", recipe, "--overwrite", steps={2: Signals(signal.SIGKILL)})
    assert victim.end() == -signal.SIGKILL
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [
        "checkpoints",
        "metrics.jsonl",
        "recipe.yaml",
        "samples",
    ]
    assert checkpoints(folder) == [1]


def test_class_images_are_whole_or_made_again_after_a_kill(write: Any):
    recipe, folder = write("dreambooth", {"rank": 4, "class_prompt": "a thing", "num_class_images": 8})
    cache = Path(os.environ["XDG_CACHE_HOME"])
    victim = Victim("train", recipe, "validation.batch_size=1", "validation.steps=8")
    victim.await_(lambda: len(list(cache.rglob("*.png"))) > 2)
    victim.send(signal.SIGKILL)
    victim.end()
    kept = {path: path.read_bytes() for path in cache.rglob("*.png")}
    assert 2 < len(kept) < 8 and not folder.joinpath("metrics.jsonl").exists()
    again = Victim("train", recipe, "--resume", "validation.batch_size=1", "validation.steps=8")
    assert again.end() == 0
    assert len(list(cache.rglob("*.png"))) == 8
    assert sum(path.read_bytes() == content for path, content in kept.items()) >= len(kept) - 1  # the last was at work


# Asked to stop


def stop(victim: Victim, *numbers: int) -> tuple[int, float]:
    """Send signals; its exit status, and how long that took."""
    start = time.monotonic()
    for number in numbers:
        victim.send(number)
        time.sleep(0.2)
    return victim.end(), time.monotonic() - start


SLOW = {"steps": 900, "prompts": 5 * ["a {} thing"]}
PHASES = {
    "class images": (signal.SIGINT, "dreambooth", {"rank": 4, "class_prompt": "a thing"}, SLOW, "class images:"),
    "encoding": (signal.SIGTERM, "lora", "plain", {"prompts": []}, "encoding pictures:"),
    "the first pictures": (signal.SIGHUP, "lora", "plain", SLOW, ""),  # of which nothing can be seen yet
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_is_stopped_before_its_first_step_leaves_at_once(phase: str, write: Any, tmp_path: Path):
    number, method, way, shown, sign = PHASES[phase]
    if phase == "encoding":
        tiny.save_pictures(tmp_path / "pictures", 150)
    recipe, folder = write(method, way, validation=shown, dataset={"resolution": 256 if phase == "encoding" else 32})
    victim = Victim("train", recipe)
    victim.await_(lambda: sign in victim.complaint if sign else (folder / "metrics.jsonl").exists())
    time.sleep(0.5)
    status, seconds = stop(victim, number)
    assert (status, len(victim.lines)) == (130, 1) and seconds < SECONDS
    assert_one(victim.lines, "stopped before the first step")
    assert not (folder / "checkpoints").exists()


def test_a_run_that_is_stopped_while_it_draws_has_saved_its_last_step(write: Any):
    plain, undisturbed = write(name="undisturbed", train={"checkpoint_every": None})
    assert Victim("train", plain).end() == 0
    recipe, folder = write(train={"checkpoint_every": None})
    closed = Both(Signals(signal.SIGHUP), Signals(signal.SIGHUP))  # of the terminal and of the shell: one is the other
    first = Victim("train", recipe, steps={2: closed})  # while a step is at work
    assert first.end() == 130
    assert_one(first.lines, "stopped after step 2", "step 2 is kept", "--resume")
    second = Victim("train", recipe, "--resume", "validation.every=1", "validation.steps=900")
    second.await_(lambda: len(metrics(folder)) == 3)
    time.sleep(0.5)
    status, seconds = stop(second, signal.SIGINT)
    assert status == 130 and seconds < SECONDS
    assert_one(second.lines, "stopped after step 3", "step 3 is kept")
    assert checkpoints(folder) == [2, 3]
    assert Victim("train", recipe, "--resume").end() == 0
    assert_same(folder, undisturbed)


def test_a_run_that_is_stopped_while_it_exports_says_what_is_there(write: Any):
    recipe, folder = write()
    victim = Victim("train", recipe, finish=Signals(signal.SIGINT))
    assert victim.end() == 130
    assert_one(victim.lines, "stopped after the export", LORA_FILE, "not compared")
    assert learnt(folder)


def test_nohup_keeps_its_word_and_a_background_job_of_a_shell_can_be_stopped(write: Any):
    recipe, folder = write(train={"steps": 2000, "checkpoint_every": None})
    victim = Victim("train", recipe, before=InTheBackground())
    victim.await_(lambda: len(metrics(folder)) > 1)
    victim.send(signal.SIGHUP)
    done = len(metrics(folder))
    victim.await_(lambda: len(metrics(folder)) > done + 3)
    assert stop(victim, signal.SIGINT)[0] == 130
    (last,) = checkpoints(folder)
    assert_one(victim.lines, f"stopped after step {last}")


class InTheBackground:
    """`nohup finetune ... &` in a shell's script."""

    def __call__(self) -> None:
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def test_a_second_signal_ends_what_the_first_one_waits_for(write: Any, tmp_path: Path):
    recipe, folder = write()
    pictures = [tmp_path / "pictures" / f"{index}.png" for index in range(5)]

    victim = Victim("train", recipe, before=UNCACHED, steps={3: Hides(pictures)})
    victim.await_(lambda: len(metrics(folder)) == 2)
    time.sleep(1)
    victim.send(signal.SIGINT)  # the step waits for a picture that never comes, as on a network folder that is gone
    time.sleep(1)
    assert victim.process.is_alive() and "a second signal ends it" in victim.complaint
    status, seconds = stop(victim, signal.SIGINT)
    assert status == 130 and seconds < 1
    assert checkpoints(folder) == [1, 2]


# Without room on the disk


class FullDisk:
    """A disk of 2 MB that is full from step 3 on; that has room again, and the run goes on; that is full between
    steps 3 and 5 of another run; that is full before yet another; and one without room for class images.
    """

    def __init__(self, recipe: str, with_prior: str, disk: Path, seen: Path):
        self.recipe, self.with_prior, self.disk, self.seen = recipe, with_prior, disk, seen

    def __call__(self) -> None:
        Mounts(self.disk, 2_000_000)()
        full, room = Fills(self.disk), Removes(self.disk / "ballast")
        self.run("full", self.recipe, steps={3: full})
        room()
        self.run("resumed", self.recipe, "--resume")
        self.run("for a while", self.recipe, "--overwrite", steps={3: full, 5: room})
        Fills(self.disk)()
        self.run("from the start", self.recipe, f"output.folder={self.disk}/another")
        Fills(self.disk, but=12_288)()
        os.environ["XDG_CACHE_HOME"] = str(self.disk / "cache")
        self.run("class images", self.with_prior, "validation.batch_size=1")
        os._exit(0)

    def run(self, name: str, *arguments: str, **faults: Any) -> None:
        def act() -> None:
            complaint = os.open(self.seen / f"{name}.txt", os.O_CREAT | os.O_WRONLY)
            os.dup2(complaint, 2)
            victims.strike(**faults)
            victims.command("train", *arguments)

        status = victims.fork(act)
        with (self.seen / f"{name}.txt").open("a") as complaint:
            complaint.write(f"\nstatus {status}\n")
        shutil.copytree(self.disk, self.seen / name, ignore=shutil.ignore_patterns("ballast"))


@pytest.fixture(scope="module")
def full_disk(base_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was seen of it: a folder and a text for each of the runs."""
    folder = tmp_path_factory.mktemp("full")
    for name in ("seen", "disk", "elsewhere"):
        (folder / name).mkdir()
    ways = {"plain": ("lora", "plain"), "prior": ("dreambooth", {"rank": 4, "class_prompt": "a thing"})}
    pictures = tiny.save_pictures(folder / "pictures")
    for file in list(pictures.iterdir()):  # three lines that name them are more than a page of the disk
        file.rename(pictures / f"{130 * file.stem}{file.suffix}")
    for name, way in ways.items():
        recipe = lessons.recipe(
            base_folder("stable_diffusion"),
            folder,
            *way,
            pictures,
            train={"checkpoint_every": 1, "steps": 6, "batch_size": 10},
            output={"folder": str(folder / "disk" / "run" if name == "plain" else folder / name), "dtype": "float32"},
            validation={"every": 1, "prompts": ["a {} thing"], "steps": 2},
        )
        (folder / f"{name}.yaml").write_text(recipe.to_yaml())
    act = FullDisk(str(folder / "plain.yaml"), str(folder / "prior.yaml"), folder / "disk", folder / "seen")
    victim = Victim(before=Both(Sets("tempfile", tempdir=str(folder / "elsewhere")), act))
    assert victim.end(120) == 0, victim.complaint
    return folder


def complained(folder: Path, name: str, status: int) -> list[str]:
    text = (folder / "seen" / f"{name}.txt").read_text()
    assert f"\nstatus {status}\n" in text and "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith(("error: ", "warning: "))]


def assert_whole(folder: Path) -> None:
    """Nothing has a name that is not whole."""
    checkpoints(folder)
    metrics(folder)
    for picture in folder.rglob("*.png"):
        Image.open(picture).load()
    for file in folder.glob("*.safetensors"):
        load_file(file)


@mounts
def test_a_full_disk_leaves_what_was_there_and_the_result_goes_elsewhere(full_disk: Path):
    lines, folder = complained(full_disk, "full", 2), full_disk / "seen" / "full" / "run"
    for what in ("checkpoints in", "samples in", "metrics.jsonl cannot"):
        assert_one(lines, "warning: ", what, NO_ROOM)
    assert_whole(folder)
    assert checkpoints(folder) == [1, 2] and [line["step"] for line in metrics(folder)] == [1, 2]
    assert not (folder / LORA_FILE).exists()
    assert_one(lines, "error: output.folder: ", "cannot be written there", NO_ROOM)
    (written,) = (full_disk / "elsewhere").rglob(LORA_FILE)
    assert_one(lines, "error: It was written to", str(written))
    assert_one(lines, "error: step 6 cannot be saved", NO_ROOM, "step 2 is kept", "--resume")
    assert read_shapes(written)[1]["steps"] == "6"


@mounts
def test_a_run_goes_on_once_the_disk_has_room_again(full_disk: Path):
    assert complained(full_disk, "resumed", 0) == []
    folder = full_disk / "seen" / "resumed" / "run"
    assert_whole(folder)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    (written,) = (full_disk / "elsewhere").rglob(LORA_FILE)
    assert all(torch.equal(value, learnt(folder)[name]) for name, value in load_file(written).items())


@mounts
def test_a_disk_that_is_full_for_a_while_costs_what_was_written_meanwhile(full_disk: Path):
    lines, folder = complained(full_disk, "for a while", 2), full_disk / "seen" / "for a while" / "run"
    assert_whole(folder)
    assert checkpoints(folder) == [5, 6] and [line["step"] for line in metrics(folder)] == [1, 2, 5, 6]
    for name, value in learnt(full_disk / "seen" / "resumed" / "run").items():
        assert torch.equal(value, learnt(folder)[name])
    for what in ("checkpoints", "samples", "metrics.jsonl"):
        assert_one(lines, f"error: {what} could not be written in full ({NO_ROOM})")


@mounts
def test_a_disk_without_room_is_told_before_a_step_is_made(full_disk: Path):
    (line,) = complained(full_disk, "from the start", 2)
    assert line.startswith("error: output.folder: ") and "another cannot be written to" in line and NO_ROOM in line
    lines = complained(full_disk, "class images", 2)
    assert_one(lines, "error: class images: ", NO_ROOM, "XDG_CACHE_HOME")


class Hides:
    """Files that nobody ever finishes writing."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __call__(self) -> None:
        for path in self.paths:
            path.unlink()
            os.mkfifo(path)


# Without its pictures


def test_pictures_that_vanish_are_not_missed_once_they_are_encoded(write: Any, tmp_path: Path):
    recipe, folder = write()
    victim = Victim("train", recipe, steps={2: Removes(*(tmp_path / "pictures").glob("*.png"))})
    assert victim.end() == 0
    assert learnt(folder)
    assert_one(victim.lines, "warning: ", "0.png cannot be read any more", "grid.png")


def test_a_picture_that_vanishes_where_it_is_read_again_is_named_with_its_step(write: Any, tmp_path: Path):
    recipe, folder = write(train={"checkpoint_every": None})
    pictures = {path: path.read_bytes() for path in (tmp_path / "pictures").glob("*.png")}
    victim = Victim("train", recipe, before=UNCACHED, steps={4: Removes(*pictures)})
    assert victim.end() == 2
    assert_one(victim.lines, "error: step 4: ", str(tmp_path / "pictures"), ".png cannot be read any more")
    assert_one(victim.lines, "error: step 3 is kept", "--resume")
    assert "Traceback" not in victim.complaint and checkpoints(folder) == [3]
    without = Victim("train", recipe, "--resume")
    assert without.end() == 2 and "no pictures in" in without.complaint
    for path, content in pictures.items():
        path.write_bytes(content)
    assert Victim("train", recipe, "--resume").end() == 0


# Without memory

SHORT = {"steps": 3, "batch_size": 4, "checkpoint_every": None}


def test_memory_that_runs_out_in_a_step_is_told_with_the_settings_that_need_less(write: Any):
    recipe, folder = write(train=SHORT, dataset={"resolution": 256})
    victim = Victim("train", recipe, before=gives_back, steps={2: Starves(2**20)})
    assert victim.end() == 2, victim.complaint
    assert "Traceback" not in victim.complaint
    assert_one(victim.lines, "error: step 2: the computer is out of memory", "ried to allocate")
    same = ("train.accumulate=2, up to 4", "train.gradient_checkpointing=true", "after --resume")
    assert_one(victim.lines, "error: Cheapest first", *same)
    other = ("train.precision=bf16", "train.optimizer=adamw_8bit", "base.quantize=fp8, up to nf4")
    assert_one(victim.lines, "error: Then these, for a new run", *other)
    assert_one(victim.lines, "error: step 1 is kept")
    assert checkpoints(folder) == [1]
    frugal = ("train.accumulate=4", "train.gradient_checkpointing=true")
    assert Victim("train", recipe, "--resume", *frugal).end() == 0
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]


def test_memory_that_runs_out_for_pictures_is_told_with_the_settings_of_pictures(write: Any):
    shown = {"prompts": 16 * ["a {} thing"], "every": 1, "steps": 1, "batch_size": 16}
    recipe, folder = write(train=SHORT | {"batch_size": 1}, dataset={"resolution": 128}, validation=shown)
    victim = Victim("train", recipe, before=gives_back, drawing={1: Starves(2**20)})
    assert victim.end() == 2
    assert_one(victim.lines, "error: the validation pictures of step 1: the computer is out of memory")
    assert_one(victim.lines, "error: Cheapest first", "validation.batch_size=1, not 16")
    assert_one(victim.lines, "error: step 1 is kept")
    assert checkpoints(folder) == [1]

    way = {"rank": 4, "class_prompt": "a thing"}
    recipe, _ = write("dreambooth", way, name="prior", dataset={"resolution": 128}, validation=shown)
    alone = {"TOKENIZERS_PARALLELISM": "false"}  # its threads could not be started any more
    victim = Victim("train", recipe, before=gives_back, class_images=Starves(2**20), env=alone)
    assert victim.end() == 2, victim.complaint
    assert_one(victim.lines, "error: class images: the computer is out of memory")
    assert_one(victim.lines, "error: Cheapest first", "validation.batch_size=1, not 16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_memory_of_a_gpu_that_runs_out_is_told_and_the_last_step_is_kept(write: Any):
    recipe, folder = write(train=SHORT, dataset={"resolution": 128})
    victim = Victim("train", recipe, steps={2: StarvesGpu()})
    assert victim.end() == 2, victim.complaint
    assert_one(victim.lines, "error: step 2: the GPU is out of memory", "ried to allocate")
    assert_one(victim.lines, "error: Cheapest first", "train.accumulate=2, up to 4")
    assert_one(victim.lines, "error: step 1 is kept")
    assert checkpoints(folder) == [1]


class StarvesGpu:
    """The allocator gets no more of the GPU than it has."""

    def __call__(self) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)


# Diverged


def test_a_run_that_diverges_at_once_has_nothing_to_export_and_says_so(write: Any):
    recipe, folder = write(train={"learning_rate": 1e30})
    victim = Victim("train", recipe)
    assert victim.end() == 2
    assert "Traceback" not in victim.complaint
    assert_one(victim.lines, "error: step 2: the loss is ", ".png", "train.learning_rate")
    assert_one(victim.lines, "error: None of its weights", "nothing to export")
    assert not (folder / LORA_FILE).exists()


def test_a_run_that_diverges_exports_the_newest_weights_that_are_good(write: Any):
    train = {"learning_rate": 1e5, "optimizer": "torch.optim.SGD", "max_grad_norm": 1e9, "steps": 20}
    recipe, folder = write(train={**train, "keep_checkpoints": 50})
    victim = Victim("train", recipe)
    assert victim.end() == 2
    (told,) = [line for line in victim.lines if line.startswith("error: What was learnt until step ")]
    header = read_shapes(folder / LORA_FILE)[1]
    assert told.startswith(f"error: What was learnt until step {header['steps']} is in {folder / LORA_FILE}")
    assert "diverged" in header["ended"] and 0 < int(header["steps"]) < len(metrics(folder))
    assert all(bool(value.isfinite().all()) for value in learnt(folder).values())


# With a tracker that does not answer


def test_a_run_ends_as_ever_though_its_tracker_never_answers(write: Any, tmp_path: Path):
    recipe, folder = write(tracking=["wandb"])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        service = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = {"WANDB_BASE_URL": service, "WANDB_API_KEY": 40 * "a", "WANDB_MODE": "online", "HOME": str(tmp_path)}
        victim = Victim("train", recipe, before=Sets("finetune.run", PATIENCE=2.0), env=env)
        assert victim.end(30) == 0
    assert_one(victim.lines, "warning: tracking.wandb is off from here (it does not come to an end")
    assert len(victim.lines) == 1 and learnt(folder) and len(metrics(folder)) == 6


# In the same folder, and as another run


def test_a_second_process_is_refused_and_told_of_the_first_and_a_killed_one_blocks_nobody(write: Any):
    recipe, folder = write(train={"steps": 2000, "checkpoint_every": 5})
    first = Victim("train", recipe)
    first.await_(lambda: len(metrics(folder)) > 5)
    before = (folder / "recipe.yaml").stat().st_mtime_ns
    for flag in ("--resume", "--overwrite"):
        second = Victim("train", recipe, flag)
        assert second.end() == 2
        assert_one(second.lines, "error: output.folder: ", f"process {first.pid} on {socket.gethostname()}")
        assert len(second.lines) == 1
    first.send(signal.SIGKILL)
    first.end()
    assert (folder / "recipe.yaml").stat().st_mtime_ns == before and (folder / ".lock").exists()
    last = checkpoints(folder)[-1]
    third = Victim("train", recipe, "--resume", steps={last + 2: Signals(signal.SIGTERM)})
    assert third.end() == 130
    assert_one(third.lines, f"stopped after step {last + 2}")


def test_two_that_start_in_the_same_moment_are_told_apart(write: Any):
    recipe, folder = write()
    victims_ = [Victim("train", recipe) for _ in range(3)]
    assert sorted(victim.end() for victim in victims_) == [0, 2, 2]
    for victim in victims_:
        assert "Traceback" not in victim.complaint
    assert learnt(folder) and len(metrics(folder)) == 6


@filters
def test_a_folder_that_knows_no_locks_is_used_with_a_warning(write: Any):
    recipe, folder = write()
    victim = Victim("train", recipe, before=HasNoLocks())
    assert victim.end() == 0
    assert_one(victim.lines, "warning: output.folder: ", "cannot be locked (No locks available)")
    assert learnt(folder)


@mounts
def test_a_folder_that_cannot_be_written_is_named(write: Any, tmp_path: Path):
    recipe, _ = write()
    victim = Victim("train", recipe, f"output.folder={tmp_path}/here/run", before=IsReadOnly(tmp_path / "here"))
    assert victim.end() == 2
    (line,) = victim.lines
    assert line.startswith("error: output.folder: ") and "Read-only file system" in line


class IsReadOnly:
    """A folder on a file system that takes nothing."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> None:
        Mounts(self.folder, 1_000_000)()
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)


def test_a_base_that_was_changed_since_the_checkpoint_is_refused(write: Any, base_folder: Any, tmp_path: Path):
    base = shutil.copytree(base_folder("stable_diffusion"), tmp_path / "base")
    recipe, _ = write(base={"source": str(base)})
    assert Victim("train", recipe, steps={3: Signals(signal.SIGTERM)}).end() == 130
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = Victim("train", recipe, "--resume")
    assert changed.end() == 2
    assert_one(changed.lines, "error: --resume: the base ", str(base), "step-000003", "--overwrite")
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "pictures" / "0.png").rename(tmp_path / "pictures" / "9.png")
    (tmp_path / "pictures" / "0.txt").rename(tmp_path / "pictures" / "9.txt")
    (tmp_path / "pictures" / "2.txt").write_text("another {} thing")
    changed = Victim("train", recipe, "--resume")
    assert changed.end() == 2
    assert_one(changed.lines, "error: --resume: the pictures differ", "step-000003")
    for what, name in {"gone": "0.png", "new": "9.png", "changed": "2.png"}.items():
        assert_one(changed.lines, f"error: {what}: ", name)


def test_a_damaged_checkpoint_is_passed_over_and_the_bits_are_the_same(write: Any):
    plain, undisturbed = write(name="undisturbed")
    assert Victim("train", plain).end() == 0
    recipe, folder = write()
    assert Victim("train", recipe, steps={4: Signals(signal.SIGTERM)}).end() == 130
    state = folder / "checkpoints" / "step-000004" / checkpoint.TENSORS
    content = bytearray(state.read_bytes())
    content[-5] ^= 4
    state.write_bytes(content)
    again = Victim("train", recipe, "--resume")
    assert again.end() == 0
    assert_one(again.lines, "warning: ", "step-000004 is damaged", "passed over")
    assert_same(folder, undisturbed)
    for path in folder.glob("checkpoints/step-*/state.safetensors"):
        path.write_bytes(b"")
    hopeless = Victim("train", recipe, "--resume")
    assert hopeless.end() == 2
    assert_one(hopeless.lines, "error: --resume: every checkpoint in ", "damaged", "--overwrite")


# Among several processes


def ranks(recipe: str, *arguments: str, faults: dict[int, dict[str, Any]], launched: bool = False) -> list[Victim]:
    """Two processes of one run, each knowing the other by an address, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true"} | ({"TORCHELASTIC_RUN_ID": "none"} if launched else {})
    return [
        Victim("train", recipe, *arguments, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **faults[rank])
        for rank in range(2)
    ]


LONG = {"steps": 2000, "checkpoint_every": None, "batch_size": 4}


def test_a_process_that_fails_leaves_no_other_waiting(write: Any):
    recipe, folder = write(train=LONG, dataset={"resolution": 64})
    main, other = ranks(recipe, faults={0: {}, 1: {"before": UNCACHED, "steps": {3: Hidden()}}})
    assert other.end() == 2
    start = time.monotonic()
    assert main.end() == 2
    assert time.monotonic() - start < SECONDS
    assert_one(other.lines, "error: step 3: ", "cannot be read any more")
    assert_one(main.lines, "error: step 3: another process of this run has ended")
    assert "Traceback" not in main.complaint + other.complaint
    assert checkpoints(folder) == [2]


def test_a_process_that_cannot_encode_its_pictures_leaves_no_other_waiting(write: Any):
    recipe, _ = write(train=LONG, dataset={"resolution": 64})
    main, other = ranks(recipe, faults={0: {}, 1: {"before": Hidden()}})
    assert other.end() == 2, other.complaint
    assert main.end() == 2, main.complaint
    assert_one(other.lines, "error: encoding the pictures: ", "cannot be read any more")
    assert_one(main.lines, "error: before the first step: another process of this run has ended")
    assert "Traceback" not in main.complaint + other.complaint


class Hidden:
    """Pictures that this process alone cannot read any more."""

    def __call__(self) -> None:
        Sets("finetune.dataset.draws", Path=Nowhere)()


class Nowhere:
    def __init__(self, path: str):
        self.path = path

    def read_bytes(self) -> bytes:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)


def test_a_process_that_is_killed_leaves_no_other_waiting(write: Any):
    recipe, folder = write(train=LONG)
    main, other = ranks(recipe, faults={0: {}, 1: {}})
    main.await_(lambda: len(metrics(folder)) > 3)
    other.send(signal.SIGKILL)
    start = time.monotonic()
    assert main.end() == 2
    assert time.monotonic() - start < SECONDS
    assert_one(
        main.lines,
        "error: step ",
        "another process of this run has ended",
    )
    (last,) = checkpoints(folder)
    assert last == metrics(folder)[-1]["step"]


def test_processes_that_are_stopped_together_wait_for_the_one_that_saves(write: Any):
    recipe, folder = write(train=LONG)
    main, other = ranks(recipe, faults={0: {}, 1: {}}, launched=True)
    main.await_(lambda: len(metrics(folder)) > 3)
    for number in (signal.SIGINT, signal.SIGTERM):  # of the terminal, and what the launcher makes of it
        for victim in (main, other):
            victim.send(number)
    assert (main.end(), other.end()) == (130, 130)
    (last,) = checkpoints(folder)
    assert_one(main.lines, f"stopped after step {last}")


def test_a_second_signal_ends_a_process_that_waits_for_another(write: Any):
    recipe, folder = write(train=LONG)
    main, other = ranks(recipe, faults={0: {}, 1: {}})
    main.await_(lambda: len(metrics(folder)) > 3)
    other.send(signal.SIGSTOP)  # as a machine that is gone
    time.sleep(0.5)
    main.send(signal.SIGINT)
    time.sleep(0.5)
    assert main.process.is_alive()
    status, seconds = stop(main, signal.SIGINT)
    assert status == 130 and seconds < 1


def test_a_folder_in_use_is_refused_to_all_processes_alike(write: Any):
    recipe, folder = write(train=LONG)
    owner = Victim("train", recipe)
    owner.await_(lambda: len(metrics(folder)) > 1)
    main, other = ranks(recipe, "--resume", faults={0: {}, 1: {}})
    assert (main.end(), other.end()) == (2, 2)
    assert_one(main.lines, "error: output.folder: ", f"process {owner.pid}")
    assert "Traceback" not in main.complaint + other.complaint
    owner.send(signal.SIGKILL)
    owner.end()


def test_torchrun_ends_all_of_a_run_of_which_one_is_killed(write: Any):
    recipe, folder = write(train=LONG)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    launcher = subprocess.Popen(
        [*command, "-m", "finetune", "train", recipe], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    end = time.monotonic() + 120
    while len(metrics(folder)) < 3:
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    workers = {int(_environment(pid)["RANK"]): pid for pid in _children(launcher.pid)}
    os.kill(workers[1], signal.SIGKILL)
    start = time.monotonic()
    output = launcher.communicate(timeout=60)[0].decode()
    assert launcher.returncode != 0 and time.monotonic() - start < 20
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    assert "another process of this run has ended" in output or "stopped after step" in output, output[-3000:]
    assert len(checkpoints(folder)) == 1, output[-3000:]
    (last,) = checkpoints(folder)
    assert abs(last - metrics(folder)[-1]["step"]) <= 1


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
