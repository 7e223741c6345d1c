"""What is said where the Hub cannot give what is asked for, by a server that speaks as the Hub does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parent.parent
NOWHERE = "http://127.0.0.1:9"  # a port that nothing listens on


class Hub(BaseHTTPRequestHandler):
    """Has the model someone/there."""

    def do_HEAD(self) -> None:
        there = self.path.startswith("/someone/there/resolve/main/")
        self.send_response(200 if there else 404)
        headers = {"ETag": '"e"', "X-Repo-Commit": "c" * 40} if there else {"X-Error-Code": "RepoNotFound"}
        for name, value in {"Content-Length": "2", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the library
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(endpoint: str, home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    unset = {"HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    environment = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)


def meet(endpoint: str, home: Path, name: str) -> subprocess.CompletedProcess[str]:
    return ask(endpoint, home, "-c", f"from finetune.hub import meet; meet({name!r}, 'config.json')")


def test_a_model_that_is_there_is_met_and_another_is_not(hub: str, tmp_path: Path):
    assert meet(hub, tmp_path, "someone/there").returncode == 0
    said = meet(hub, tmp_path, "someone/else")
    assert said.returncode and "RepositoryNotFoundError" in said.stderr


def test_a_folder_needs_no_hub(tmp_path: Path):
    assert meet(NOWHERE, tmp_path, str(tmp_path)).returncode == 0


FOX = str(ROOT / "data/concepts/fox")
COMMANDS = {
    "train": ["train", "sd15-lora-8gb", f"dataset.folder={FOX}", "output.folder={folder}"],
    "check": ["check", "sd15-lora-8gb", f"dataset.folder={FOX}", "output.folder={folder}", "--memory"],
    "base": ["generate", "a thing", "--base", "someone/there"],
    "controlnet": [
        *("generate", "a thing", "--base", str(ROOT / "data/base"), "--control", f"{FOX}/01.png"),
        *("--controlnet", "someone/there"),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hub_that_cannot_be_reached_is_named_in_one_line(command: str, tmp_path: Path):
    words = [word.format(folder=tmp_path / "run") for word in COMMANDS[command]]
    done = ask(NOWHERE, tmp_path, "-m", "finetune", *words)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "the Hub cannot be reached" in line


def test_an_encoder_that_is_out_of_reach_is_named(tmp_path: Path):
    done = ask(NOWHERE, tmp_path, "-c", "from finetune.evaluation.encoders import *; Encoder.load('someone/there')")
    assert "--encoder someone/there: cannot be loaded (the Hub cannot be reached" in done.stderr
