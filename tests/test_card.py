"""The model card beside an export: its code does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lessons
import pytest
import single_files
import tiny
import torch

from finetune.architectures import from_pipeline
from finetune.card import write_card
from finetune.config import build
from finetune.export import Verdict, save_words
from finetune.families.base import Source, families
from finetune.vocabulary import extend


def write(base: Path, family: str, folder: Path, **settings: Any) -> str:
    """The code in the card of a word that was taught to a base."""
    recipe = lessons.recipe(base, folder, "textual_inversion", "one-vector")
    tree = recipe.dump()
    recipe = build(type(recipe), {**tree, "base": {**tree["base"], **settings}})
    loaded = families[family].load(Source(str(base)), min_snr_gamma=None, zero_terminal_snr=False)
    extend(loaded, "<it>", 1, "a")
    header = {"trigger": "<it>", "architecture": from_pipeline(loaded.pipeline) or ""}
    files = save_words(loaded, recipe.output.folder, torch.float32, header)
    card = write_card(recipe, files, fingerprint="0", num_pictures=1, verdict=Verdict(0.0, 1.0))
    found = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("family", tiny.BASES)
def test_the_code_in_the_card_loads_the_word_into_every_family(
    family: str, base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = write(base_folder(family), family, tmp_path)
    loads, _, draws = code.partition("\npicture = ")
    monkeypatch.chdir(tmp_path / "run")
    known: dict[str, Any] = {}
    exec(loads, known)
    assert draws and all(
        "<it>" in getattr(known["pipeline"], tokenizer).get_vocab()
        for tokenizer in families[family].tokenizers.values()
    )


@pytest.mark.parametrize("family", ["stable_diffusion_3", "z_image"])
def test_the_card_suggests_no_loader_that_diffusers_has_not(family: str, base_folder: Any, tmp_path: Path):
    code = write(base_folder(family), family, tmp_path)
    assert "load_textual_inversion" not in code and "finetune.load.load_adapters" in code


def test_the_card_opens_a_base_in_one_file_as_one(tmp_path: Path):
    pipeline = tiny.stable_diffusion(deep=True)
    pipeline.save_pretrained(tmp_path / "folder")
    file = single_files.write_single_file(pipeline, "sd1", tmp_path / "base.safetensors")
    code = write(tmp_path / "folder", "stable_diffusion", tmp_path, source=str(file), config=str(tmp_path / "folder"))
    known: dict[str, Any] = {}
    exec(code[: code.index("pipeline.load")], known)
    opened = known["pipeline"]
    for part in ("unet", "vae", "text_encoder"):
        tiny.assert_same_weights(getattr(opened, part), getattr(pipeline, part))
    tiny.assert_as_said(tiny.predict(opened), tiny.predict(pipeline))


@pytest.mark.parametrize("architecture", tiny.DEEP)
def test_the_architecture_is_told_by_the_pipeline(architecture: str):
    assert from_pipeline(tiny.DEEP[architecture][1]()) == architecture


def test_every_family_has_an_architecture():
    assert {family for family, _ in tiny.DEEP.values()} == set(families.names())


def test_stable_diffusion_2_is_told_by_the_width_of_its_prompts():
    pipeline = tiny.stable_diffusion()
    pipeline.register_modules(unet=tiny.unet(1024))
    assert from_pipeline(pipeline) == "sd2"
