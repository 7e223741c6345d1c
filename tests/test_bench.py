"""The benchmark works on a toy; how fast it is, is no test's business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lessons

from finetune.bench import machine, measure, table


def test_a_recipe_is_timed_without_leaving_anything_behind(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "dreambooth", "images")
    timing = measure(recipe, steps=2)
    assert timing.batch == 4  # two of the concept, two of the prior
    assert min(timing.step_ms, timing.images_per_s, timing.picture_s, timing.first_step_s, timing.peak_gib) >= 0
    assert not recipe.output.folder.exists()
    assert table([timing]).splitlines()[2].startswith("| lesson | dreambooth | 4 |")
    assert {"device", "python", "torch"} <= machine().keys()
