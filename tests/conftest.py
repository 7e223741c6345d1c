"""Tests run offline on two cores; every base is built once and kept as a folder, as users have it."""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

from finetune.quiet import quiet

quiet()

from pathlib import Path
from typing import Any

import drawing
import lessons
import pytest
import tiny
from torch import Tensor

from finetune import run


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, variant) -> the folder of a tiny base."""
    folders: dict[tuple[str, str], Path] = {}

    def folder(family: str, variant: str | None = None) -> Path:
        variant = variant or next(iter(tiny.BASES[family]))
        if (family, variant) not in folders:
            path = tmp_path_factory.mktemp(f"{family}-{variant}")
            tiny.BASES[family][variant]().save_pretrained(path)
            folders[family, variant] = path
        return folders[family, variant]

    return folder


@pytest.fixture(scope="session")
def lesson(base_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case -> its finished run, trained once for all tests."""
    finished: dict[tuple[str, ...], tuple[run.Run, run.Result, dict[str, Tensor]]] = {}

    def learn(case: tuple[str, ...]) -> tuple[run.Run, run.Result, dict[str, Tensor]]:
        if case not in finished:
            family, variant, method, way = case
            output = tmp_path_factory.mktemp("lesson")
            at_work = run.prepare(lessons.recipe(base_folder(family, variant), output, method, way))
            at_work.loop()
            trained = {name: value.clone() for name, value in at_work.trainer.student.state_dict().items()}
            finished[case] = at_work, at_work.finish(), trained
        return finished[case]

    return learn


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, variant) -> (a tiny base's pipeline, a ControlNet's folder, an editor's folder)."""
    kept: dict[tuple[str, str], tuple[Any, str, str]] = {}

    def make(family: str, variant: str | None = None) -> tuple[Any, str, str]:
        variant = variant or next(iter(tiny.BASES[family]))
        if (family, variant) not in kept:
            pipeline = tiny.BASES[family][variant]()
            folder = tmp_path_factory.mktemp(f"networks-{family}-{variant}")
            drawing.wake(drawing.control_network(pipeline)).save_pretrained(folder / "control")
            if hasattr(pipeline, "unet"):
                drawing.editing_unet(pipeline.unet).save_pretrained(folder / "editor")
            kept[family, variant] = pipeline, str(folder / "control"), str(folder / "editor")
        return kept[family, variant]

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class images of one test are never found by another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
