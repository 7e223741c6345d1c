"""The recipes for cards of a size need what they say, and that fits; one recipe may stand on another."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import real_shapes

from finetune.errors import UserError
from finetune.listing import BASES, sized
from finetune.memory import estimate
from finetune.needs import CONTEXT, GIB, ROOM
from finetune.recipe import RECIPES, load

FAMILIES = {
    "sd15": "stable_diffusion",
    "sdxl": "stable_diffusion_xl",
    "sd3": "stable_diffusion_3",
    "flux": "flux",
    "z-image": "z_image",
}
SIZED = sorted(RECIPES.glob("*gb.yaml"))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("configs")
    return cache(lambda base: real_shapes.BASES[FAMILIES[base]](folder / base))


def test_every_base_has_a_recipe_for_every_way_that_can_fit():
    found = {sized(path.stem)[:2] for path in SIZED}
    for base in BASES:
        ways = {"lora", "dreambooth", "textual-inversion", "pivotal-tuning"}
        # 12 and 6 billion weights in float32 with gradients and a copy exceed the largest card.
        ways |= set() if base in ("flux", "z-image") else {"dreambooth-whole"}
        assert {way for other, way in found if other == base} == ways


def need(path: Path) -> float:
    """GiB, as the recipe says."""
    said = re.search(r"^# Memory: ([\d.]+) GiB", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert said is not None, f"{path.stem} does not say what it needs"
    return float(said[1])


# Of each base the recipe that fills its card the most: an estimate takes seconds.
FULLEST = {
    sized(path.stem)[0]: path for path in sorted(SIZED, key=lambda path: need(path) / sized(path.stem)[2])
}.values()


@pytest.mark.parametrize("path", FULLEST, ids=lambda path: path.stem)
def test_a_recipe_needs_what_it_says(path: Path, configs: Any):
    base, _, _ = sized(path.stem)
    needs = estimate(load(str(path), [f"base.source={configs(base)}"])).run / GIB
    assert need(path) == pytest.approx(needs, abs=0.1)


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem)
def test_a_recipe_fits_its_card_and_says_where_its_numbers_come_from(path: Path):
    recipe = load(str(path))
    assert need(path) + CONTEXT <= ROOM * sized(path.stem)[2]
    assert recipe.name == path.stem and recipe.output.folder.name == path.stem
    assert "# Numbers: " in path.read_text(encoding="utf-8")


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(f"name: {name}\n{text}")
    return str(path)


def test_a_recipe_extends_another_key_by_key(tmp_path: Path):
    write(tmp_path, "mine", "extends: demo\ntrain: {steps: 7, warmup: 1}\n")
    recipe = load(write(tmp_path, "yours", "extends: mine\nmethod: {rank: 3}\n"), ["train.batch_size=2"])
    below = load("demo")
    assert (recipe.name, recipe.train.steps, recipe.train.batch_size, recipe.method.rank) == ("yours", 7, 2, 3)
    assert recipe.train.learning_rate == below.train.learning_rate
    assert recipe.method.class_prompt == below.method.class_prompt
    assert load(write(tmp_path, "resolved", recipe.to_yaml().replace("name: yours\n", "", 1))).train == recipe.train


def test_another_method_inherits_nothing_of_the_first(tmp_path: Path):
    recipe = load(write(tmp_path, "mine", "extends: demo\nmethod: {name: lora}\n"))
    assert recipe.method.targets == ("attention",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: dem\n", "recipe 'dem': no such file.* Did you mean 'demo'"),
        ("extends: mine\n", "mine.yaml: extends: it extends itself"),
        ("extends: [demo]\n", "extends: expected the name of a recipe"),
        ("extends: demo\ntrain: {stepz: 3}\n", "train.stepz: unknown key. Did you mean 'steps'"),
    ],
)
def test_a_recipe_that_cannot_be_extended_is_explained(text: str, says: str, tmp_path: Path):
    with pytest.raises(UserError, match=says):
        load(write(tmp_path, "mine", text))
