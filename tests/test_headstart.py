"""What a run does with the time in which its libraries are imported."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import lessons
import pytest
import tiny

from finetune.headstart import head_start, hidden, importing, unused, weights
from finetune.recipe import BaseConfig, load


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


def test_what_is_installed_is_read_once_however_many_libraries_ask():
    with importing():
        first = metadata.packages_distributions()
    assert "torch" in first["torch"] and metadata.packages_distributions() is first


def test_garbage_is_looked_for_again_where_an_import_fails():
    with pytest.raises(ModuleNotFoundError), importing():
        raise ModuleNotFoundError
    assert gc.isenabled()


PACKING = {
    "none": ([], False),
    "base": (["base.quantize=nf4"], True),
    "base_without_it": (["base.quantize=fp8"], False),
    "optimizer": (["train.optimizer=adamw_8bit"], True),
    "of_someone": (["train.optimizer=someone.optim.Adam"], True),
    "of_torch": (["train.optimizer=torch.optim.SGD"], False),
}


@pytest.mark.parametrize("packing", PACKING)
def test_bitsandbytes_is_left_out_where_nothing_is_packed(packing: str):
    changes, packs = PACKING[packing]
    assert ("bitsandbytes" in unused(load("demo", changes))) is not packs


def test_a_run_imports_nothing_that_it_does_without(base: Path, tmp_path: Path):
    pictures, folder = tiny.save_pictures(tmp_path / "pictures"), tmp_path / "run"
    recipe = lessons.recipe(base, tmp_path, "lora", "plain", pictures)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-X", "importtime", "-m", "finetune", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "peft" in imported and not imported & {"bitsandbytes._ops", "sklearn", "wandb"}


def test_a_library_that_is_there_already_stays():
    with hidden(["pytest", "some_library"]):
        assert sys.modules["pytest"] is pytest and sys.modules["some_library"] is None
    assert "some_library" not in sys.modules
