"""What each tracker wrote is read back with its own code; one that fails is dropped and the run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune import tracking
from finetune.tracking import METRICS_FILE, Trackers
from finetune.validation import Judged, Measured

LOSSES = [0.5, 0.25, 0.125]
NAME = "validation/a sks dog"
MEASURED = {
    step: {
        **Measured(step, tuple(0.1 * level + step for level in range(9))).numbers,
        **Judged(step, i, 0.25, None).numbers,
    }
    for step, i in ((0, 0.125), (3, 0.875))
}
# A process of its own, since the trackers read their folders from the environment when they are imported.
WRITE = f"""
import sys
from pathlib import Path
from PIL import Image
from finetune.quiet import quiet
from finetune.tracking import Trackers
quiet()
trackers = Trackers(("wandb", "tensorboard", "trackio"), Path("run"), "dog", {{"train": {{"steps": 3}}}}, 0)
trackers.pictures(0, {{"{NAME}": Image.new("RGB", (8, 8), "red")}})
trackers.numbers(0, {MEASURED[0]})
for step, loss in enumerate({LOSSES}, 1):
    trackers.numbers(step, {{"loss": loss, "learning_rate/unet": 1e-4}}, ["0.png", "1.png"])
trackers.numbers(3, {MEASURED[3]})
trackers.pictures(3, {{"{NAME}": Image.new("RGB", (8, 8), "blue")}})
assert trackers.close() == {{}}
assert not any(relay.off for relay in trackers.relays)
"""
READ_TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("finetune")
print(json.dumps({"name": run.name, "config": dict(run.config), "logs": SQLiteStorage.get_logs("finetune", run.name)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracked")


@pytest.fixture(scope="module")
def call(folder: Path) -> Callable[..., str]:
    """Run a command in the folder of a user without any account, whom it must not ask; its output."""
    hidden = ("WANDB_", "TRACKIO_", "XDG_", "HF_HOME")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    env |= {"HOME": str(folder / "home"), "TRACKIO_DIR": str(folder / "trackio")}
    (folder / "home").mkdir()
    (folder / "run").mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def written(call: Callable[..., str]) -> str:
    """What was printed while the three trackers followed a run."""
    return call(sys.executable, "-c", WRITE)


@pytest.mark.usefixtures("written")
def test_every_number_is_in_the_json_lines_with_the_pictures_of_its_step(folder: Path):
    lines = [json.loads(line) for line in (folder / "run" / METRICS_FILE).read_text().splitlines()]
    rest = {"learning_rate/unet": 1e-4, "pictures": ["0.png", "1.png"]}
    steps = [{"step": step, "loss": loss, **rest} for step, loss in enumerate(LOSSES, 1)]
    assert lines == [{"step": 0, **MEASURED[0]}, *steps, {"step": 3, **MEASURED[3]}]


@pytest.mark.usefixtures("written")
def test_tensorboard_reads_back_numbers_pictures_and_the_recipe(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == list(enumerate(LOSSES, 1))
    assert len(events.Scalars("learning_rate/unet")) == 3
    for name, value in MEASURED[3].items():
        found = events.Scalars(name)
        assert [event.step for event in found] == [0, 3] and found[1].value == pytest.approx(value)
    pictures = events.Images(NAME)
    assert [(event.step, event.width, event.height) for event in pictures] == [(0, 8, 8), (3, 8, 8)]
    (text,) = events.Tensors("recipe/text_summary")
    assert b'"steps": 3' in text.tensor_proto.string_val[0]


@pytest.mark.usefixtures("written")
def test_wandb_reads_back_numbers_pictures_and_the_recipe_without_an_account(folder: Path, call: Callable[..., str]):
    (run,) = (folder / "run" / "wandb").glob("offline-run-*")
    inspected = call(str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run))
    records = [json.loads(line) for line in inspected.splitlines() if line.startswith("{")]
    (start,) = [record["run"] for record in records if record["type"] == "run"]
    assert (start["display_name"], start["project"]) == ("dog", "finetune")
    assert start["config"]["update"]["train"] == {"steps": 3}
    history = [record["history"] for record in records if record["type"] == "history"]
    text = json.dumps(history)
    assert all(str(loss) in text for loss in LOSSES)
    assert all(text.count(name) == 2 for name in MEASURED[3])
    assert text.count("image-file") == 2
    assert sorted(int(path.stem.split("_")[-2]) for path in run.rglob("*.png")) == [0, 3]


@pytest.mark.usefixtures("written")
def test_trackio_reads_back_numbers_pictures_and_the_recipe(folder: Path, call: Callable[..., str]):
    found = json.loads(call(sys.executable, "-c", READ_TRACKIO).splitlines()[-1])
    assert found["name"] == "dog" and found["config"]["train"] == {"steps": 3}
    assert [(row["step"], row["loss"]) for row in found["logs"] if "loss" in row] == list(enumerate(LOSSES, 1))
    for name in MEASURED[3]:
        assert {row["step"]: row[name] for row in found["logs"] if name in row} == {
            step: pytest.approx(values[name]) for step, values in MEASURED.items()
        }
    pictures = {row["step"]: row[NAME]["file_path"] for row in found["logs"] if NAME in row}
    colours = [np.asarray(Image.open(folder / "trackio" / "media" / pictures[step]))[0, 0] for step in (0, 3)]
    assert [colour.tolist()[:3] for colour in colours] == [[255, 0, 0], [0, 0, 255]]


def test_the_trackers_add_nothing_to_what_the_run_prints(written: str):
    assert written == ""


@pytest.mark.usefixtures("written")
def test_a_run_without_an_account_asks_nothing_and_leaves_no_credentials(folder: Path):
    assert not list((folder / "home").glob(".netrc"))


def follow(folder: Path, steps: Sequence[int], first_step: int = 0) -> list[dict[str, Any]]:
    """The JSON lines after another part of a run."""
    trackers = Trackers((), folder, "dog", {}, first_step)
    for step in steps:
        trackers.numbers(step, {"loss": step / 2}, [f"{step}.png"])
    trackers.close()
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path: Path):
    whole = follow(tmp_path, range(1, 7))
    assert follow(tmp_path, range(5, 7), first_step=4) == whole


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, last in ((0, 6), (4, 8)):
        trackers = Trackers(("tensorboard",), tmp_path, "dog", {}, first_step)
        for step in range(first_step + 1, last + 1):
            trackers.numbers(step, {"loss": step / 2}, [])
        trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(n, n / 2) for n in range(1, 9)]


def test_a_new_run_starts_a_new_file(tmp_path: Path):
    follow(tmp_path, range(1, 7))
    assert [line["step"] for line in follow(tmp_path, [1])] == [1]


def test_resuming_where_there_is_no_file_starts_one(tmp_path: Path):
    assert [line["step"] for line in follow(tmp_path, [5], first_step=4)] == [5]


@pytest.mark.parametrize("torn", ['{"step": 7, "lo', "\x00\x00", "{}", "3"])
def test_resuming_survives_a_line_that_a_power_failure_cut(tmp_path: Path, torn: str):
    whole = follow(tmp_path, range(1, 7))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(torn)
    assert follow(tmp_path, [7], first_step=6)[:-1] == whole


def test_lines_are_on_disk_as_soon_as_their_step_is_done(tmp_path: Path):
    trackers = Trackers((), tmp_path, "dog", {}, 0)
    trackers.numbers(1, {"loss": 1.0}, [])
    assert json.loads((tmp_path / METRICS_FILE).read_text())["step"] == 1
    trackers.close()


def test_every_line_is_json_that_strict_readers_take(tmp_path: Path):
    trackers = Trackers((), tmp_path, "dog", {}, 0)
    trackers.numbers(1, {"loss": 1.0, "grad_norm": float("inf"), "other": float("nan")}, [])
    trackers.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)


class Backend:
    """A tracker that works until it is asked for the method it fails in."""

    seen: list[tuple[str, int]]

    def __init__(self, fails_in: str):
        self.fails_in = fails_in
        self.seen = []
        self._do("start", 0)

    def _do(self, what: str, step: int) -> None:
        if what == self.fails_in:
            raise ConnectionError("no route to host,\n  try again\n  later")
        self.seen.append((what, step))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._do("numbers", step)

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        self._do("pictures", step)

    def close(self) -> None:
        self._do("close", 0)


@pytest.mark.parametrize("fails_in", ["start", "numbers", "pictures", "close"])
def test_a_tracker_that_fails_is_dropped_with_one_line_and_the_others_go_on(
    fails_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    healthy = Backend("")
    monkeypatch.setitem(tracking.BACKENDS, "wandb", lambda *_: Backend(fails_in))
    monkeypatch.setitem(tracking.BACKENDS, "trackio", lambda *_: healthy)
    trackers = Trackers(("wandb", "trackio"), tmp_path, "dog", {}, 0)
    for step in (1, 2):
        trackers.numbers(step, {"loss": 0.5}, [])
        trackers.pictures(step, {NAME: Image.new("RGB", (8, 8))})
    trackers.close()
    rounds = [(what, step) for step in (1, 2) for what in ("numbers", "pictures")]
    assert healthy.seen == [("start", 0), *rounds, ("close", 0)]
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 2
    printed = capsys.readouterr()
    (line,) = (printed.out + printed.err).splitlines()
    assert "wandb" in line and "no route to host" in line


# A real server on this machine, and W&B as a user with an account has it. Forty steps of 0.1 s, patience for 3 s.
FOLLOW = """
import http.server, json, os, signal, socket, struct, sys, threading, time
from pathlib import Path
from finetune.quiet import quiet
from finetune import tracking

ways, started = sys.argv[1], time.monotonic()

class WandB(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if ways == "hang" or "graphql" not in self.path or b"CreateRunFiles" in content:
            time.sleep(1000)
        if ways == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        me, asked = {"id": "me", "name": "me", "entity": "me", "username": "me"}, json.loads(content)
        project = {"id": "p", "name": "finetune", "entity": me}
        bucket = {"id": "b", "name": asked.get("variables", {}).get("name"), "project": project}
        answer = json.dumps({"data": {"viewer": me, "upsertBucket": {"bucket": bucket, "inserted": True}}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), WandB)
server.daemon_threads, server.handle_error = True, lambda *_: None
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": 40 * "a"}
quiet()
tracking.PATIENCE = 3.0
folder = Path(ways)
folder.mkdir()
trackers, slowest = tracking.Trackers(("wandb",), folder, "dog", {}, 0), 0.0
for step in range(1, 41):
    before = time.monotonic()
    trackers.numbers(step, {"loss": 1.0}, [])
    slowest = max(slowest, time.monotonic() - before)
    if step == 20 and ways == "killed":
        import psutil
        for service in psutil.Process().children(recursive=True):
            service.kill()
    time.sleep(0.1)
trackers.close(3.0)
print(json.dumps({"slowest": slowest, "lines": len((folder / "metrics.jsonl").read_text().splitlines())}))
print(time.monotonic() - started)
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, str, float]]:
    """What was printed, what was complained of and how long the process outlived its work; all at the same time."""
    folder = tmp_path_factory.mktemp("hanging")
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(folder), "WANDB_SILENT": "true"}

    def start(way: str) -> subprocess.Popen[str]:
        files = {stream: (folder / f"{way}.{stream}").open("w") for stream in ("stdout", "stderr")}
        return subprocess.Popen([sys.executable, "-c", FOLLOW, way], cwd=folder, env=env, text=True, **files)

    begun, running = time.monotonic(), {way: start(way) for way in ("hang", "reset", "silent later", "killed")}
    lasted = {way: (process.wait(90), time.monotonic() - begun)[1] for way, process in running.items()}

    def seen(way: str) -> tuple[str, str, float]:
        assert running[way].returncode == 0
        return (folder / f"{way}.stdout").read_text(), (folder / f"{way}.stderr").read_text(), lasted[way]

    return seen


@pytest.mark.parametrize("way", ["hang", "reset", "silent later", "killed"])
def test_a_service_that_hangs_or_dies_costs_one_line_and_no_time(way: str, followed: Any):
    printed, complaint, lasted = followed(way)
    numbers, spent = printed.splitlines()
    assert json.loads(numbers)["lines"] == 40
    assert json.loads(numbers)["slowest"] < 0.5
    (line,) = [line for line in complaint.splitlines() if not line.startswith("wandb: ")]
    assert line.startswith("warning: tracking.wandb is off from here")
    assert float(spent) < 20 and lasted < 40


def test_a_tracker_that_is_not_installed_is_dropped_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "trackio", None)
    Trackers(("trackio",), tmp_path, "dog", {}, 0).close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "trackio" in line
