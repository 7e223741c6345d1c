"""Tests run offline on two cores; every base is built once and kept as a folder, as users have it."""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

from finetune.quiet import quiet

quiet()

from pathlib import Path
from typing import Any

import pytest
import tiny


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


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class images of one test are never found by another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
