"""The cheapest settings with which a run fits a card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lessons
import pytest
import real_shapes

from finetune import cli
from finetune.config import build
from finetune.memory import estimate
from finetune.methods.base import methods
from finetune.needs import CONTEXT, GIB, ROOM, fit
from finetune.plan import survey
from finetune.recipe import Recipe


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe[Any]]:
    folder = real_shapes.stable_diffusion(tmp_path_factory.mktemp("real") / "sd")

    def recipe(**train: Any) -> Recipe[Any]:
        tree = {
            "name": "fit",
            "base": {"source": str(folder)},
            "method": {"name": "lora", "rank": 16},
            "dataset": {"folder": str(folder), "resolution": 512},
            "train": {"steps": 1, "precision": "bf16", **train},
            "output": {"folder": str(folder / "run")},
        }
        return build(Recipe[methods["lora"]], tree)

    return recipe


@pytest.mark.parametrize(
    ("card", "batch", "wanted"),
    [
        (9, 8, {}),
        (6, 8, {"train.accumulate": 2}),
        (2.9, 1, {"train.gradient_checkpointing": True}),
        (1, 1, None),
    ],
)
def test_the_changes_that_are_named_fit_and_none_of_them_is_idle(
    card: float, batch: int, wanted: dict[str, Any] | None, sd15: Callable[..., Recipe[Any]]
):
    recipe = sd15(batch_size=batch)
    needed = estimate(recipe)
    found = fit(recipe, (), needed, card)
    assert found == wanted
    assert (found == {}) == (needed.run / GIB + CONTEXT <= ROOM * card)


def test_check_says_how_a_card_is_enough(
    base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    monkeypatch.setattr("sys.argv", ["finetune", "check", str(path), "--card", "8"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "fit into 8 GiB" in capsys.readouterr().out
    assert survey(recipe).status == 1
