"""What a run does with the time in which its libraries are imported."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.headstart import head_start, hidden, importing, weights
from finetune.recipe import BaseConfig


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """Other tests' garbage is collected again."""
    yield
    gc.unfreeze()


@pytest.fixture
def base(base_folder: Any, tmp_path: Path) -> Path:
    return shutil.copytree(base_folder("stable_diffusion"), tmp_path / "base")


def test_the_files_that_a_base_is_loaded_from_are_read_ahead_and_no_others(base: Path):
    unet, words, vae = (base / name for name in ("unet", "text_encoder", "vae"))
    shutil.copy(unet / "diffusion_pytorch_model.safetensors", unet / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copytree(words, base / "safety_checker")
    shutil.copy(words / "model.safetensors", base / "v1-5-pruned.safetensors")
    first = words / "model-00001-of-00002.safetensors"
    (words / "model.safetensors").rename(first)
    wanted = {unet / "diffusion_pytorch_model.safetensors", first, vae / "diffusion_pytorch_model.safetensors"}
    assert set(weights(BaseConfig(source=str(base)))) == wanted


def test_a_base_in_one_file_is_read_ahead_whole(base: Path):
    file = base / "vae/diffusion_pytorch_model.safetensors"
    assert weights(BaseConfig(source=str(file))) == [file]


def test_of_a_base_that_is_elsewhere_nothing_is_read_ahead():
    assert weights(BaseConfig(source="someone/a-model")) == []


def test_a_broken_base_is_left_to_what_loads_it(base: Path, capfd: pytest.CaptureFixture[str]):
    (base / "model_index.json").write_text("{")
    with head_start(BaseConfig(source=str(base))):
        pass
    assert capfd.readouterr() == ("", "")


def test_garbage_is_looked_for_again_once_the_libraries_are_there():
    with importing():
        assert not gc.isenabled()
        stays: list[Any] = [[] for _ in range(100)]
    assert gc.isenabled() and gc.get_freeze_count() > len(stays)
    loop: list[Any] = []
    loop.append(loop)
    del loop
    assert gc.collect() > 0


def test_garbage_is_looked_for_again_where_an_import_fails():
    with pytest.raises(ModuleNotFoundError), importing():
        raise ModuleNotFoundError
    assert gc.isenabled()


@pytest.mark.parametrize("quantize", ["null", "nf4"])
def test_bitsandbytes_is_not_waited_for_where_nothing_is_packed_and_is_there_when_it_is_asked_for(quantize: str):
    script = f"""
from finetune.headstart import head_start
from finetune.recipe import BaseConfig
import sys, yaml
with head_start(BaseConfig(source="someone/a-model", quantize=yaml.safe_load("{quantize}"))):
    import finetune.run
print("bitsandbytes" in sys.modules)
from bitsandbytes.optim import AdamW8bit
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(quantize == "nf4")]


def test_a_library_that_is_there_already_stays():
    with hidden("pytest"):
        assert sys.modules["pytest"] is pytest
