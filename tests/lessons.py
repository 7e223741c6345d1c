"""Short runs of every method on tiny bases: what the matrix of tests walks through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from finetune import cache
from finetune.config import build
from finetune.families.base import families
from finetune.methods.base import methods
from finetune.recipe import Recipe

KEPT = {setting: getattr(cache, setting) for setting in ("IN_MEMORY", "OF_DISK", "SEGMENT")}

# Method -> the ways to use it that differ in code. A registered method without one fails the matrix.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "plain": {"rank": 4},
        "alpha-and-text": {"rank": 4, "alpha": 1.0, "text_encoder": True, "text_encoder_learning_rate": 0.01},
        "rslora": {"variant": "rslora", "rank": 4, "alpha": 2.0, "text_encoder": True},
        "dora": {"variant": "dora", "rank": 4, "alpha": 2.0, "text_encoder": True, "targets": ["convolution"]},
        "pissa": {"variant": "pissa", "rank": 4, "alpha": 2.0, "text_encoder": True, "targets": ["convolution"]},
        "loha": {"variant": "loha", "rank": 2, "alpha": 3.0, "text_encoder": True, "targets": ["convolution"]},
        "lokr": {"variant": "lokr", "rank": 1, "alpha": 2.0, "factor": 2, "text_encoder": True},
        "patterns": {"rank": 4, "alpha": 2.0, "targets": ["convolution"], "rank_pattern": {"conv1|to_k": 2, "to_q": 6}},
    },
    "dreambooth": {
        "images": {"rank": 4, "class_prompt": "a thing", "num_class_images": 3},
        "prediction": {"rank": 4, "prior": "prediction", "class_prompt": "a thing", "text_encoder": True},
        "whole": {
            "denoiser": "whole",
            "rank": 16,
            "prior": "prediction",
            "class_prompt": "a thing",
            "text_encoder": True,
        },
        "whole-denoiser-alone": {"denoiser": "whole", "rank": 16, "prior": "none"},
    },
    "textual_inversion": {
        "one-vector": {"init": "thing"},
        "three-vectors": {"init": "thing", "num_vectors": 3, "preserve_norm": True},
    },
    "pivotal_tuning": {
        "prediction": {"rank": 4, "init": "thing", "prior": "prediction", "class_prompt": "a thing"},
        "denoiser-alone": {"rank": 4, "init": "thing"},
        "plain": {"rank": 4, "init": "thing", "num_vectors": 2, "text_encoder": True},
    },
}
CASES = [
    (family, variant, method, way)
    for family, variants in tiny.BASES.items()
    for variant in variants
    for method in methods.names()
    for way, settings in WAYS[method].items()
    if families[family].text_lora or not settings.get("text_encoder")  # refused, by a test of its own
]
# The last way of each method on each family, where a test is about the loop and not about the way.
FAMILY_X_METHOD = list({(case[0], case[2]): case for case in CASES}.values())


def name(case: tuple[str, ...]) -> str:
    return "-".join(case)


def recipe(
    base: Path, output: Path, method: str, way: str | dict[str, Any], pictures: Path | None = None, /, **sections: Any
) -> Recipe[Any]:
    """Four steps of two pictures at a rate that moves things; `sections` are merged over it."""
    settings = WAYS[method][way] if isinstance(way, str) else way
    tree: dict[str, Any] = {
        "name": "lesson",
        "placeholder": "<it>",
        "base": {"source": str(base)},
        "method": {"name": method, **settings},
        "dataset": {"folder": str(pictures or tiny.save_pictures(output / "pictures")), "resolution": tiny.SIZE},
        "train": {"steps": 4, "batch_size": 2, "learning_rate": 0.01},
        "validation": {"prompts": ["a {} thing"], "steps": 2, "guidance": 2.0},
        "output": {"folder": str(output / "run"), "dtype": "float32"},
    }
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return build(Recipe[methods[method]], tree)


PLACES = {"memory": {}, "file": {"IN_MEMORY": 0, "SEGMENT": 2**16}, "nowhere": {"IN_MEMORY": 0, "OF_DISK": 0}}


def keep_in(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is encoded finds room, or that it finds none."""
    for setting in ("IN_MEMORY", "OF_DISK", "SEGMENT"):
        monkeypatch.setattr(cache, setting, PLACES[place].get(setting, KEPT[setting]))


def lines(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, but what it took, which is never twice the same."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "seconds" not in line]


def on_two(*command: str) -> subprocess.CompletedProcess[str]:
    """A command of finetune carried out by two processes, each on a core of its own."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return subprocess.run(
        [*launcher, "-m", "finetune", *command],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
    )
