"""The validation prompts as pictures: before, while and after training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.dataset import Picture
from finetune.errors import reason, warn
from finetune.families.base import Family
from finetune.files import whole
from finetune.folder import GRID_FILE, SAMPLES
from finetune.grid import make_grid
from finetune.recipe import Recipe
from finetune.render import file_name, render


class Samples:
    """Picture i is of prompt i, from the seed `seed + i`, at every step."""

    def __init__(self, recipe: Recipe[Any], family: Family):
        self.recipe = recipe
        self.family = family
        self.folder = recipe.output.folder
        self.prompts = [recipe.fill(prompt) for prompt in recipe.validation.prompts]

    def paths(self, step: int) -> list[Path]:
        folder = self.folder / SAMPLES / f"step-{step:06d}"
        return [folder / f"{index:02d}-{file_name(prompt)}.png" for index, prompt in enumerate(self.prompts)]

    def render(self, indices: Sequence[int]) -> dict[int, Image.Image]:
        """Some of the pictures, with the family as it is."""
        shown = self.recipe.validation
        images = render(
            self.family.pipeline,
            [self.prompts[index] for index in indices],
            [shown.seed + index for index in indices],
            steps=shown.steps,
            guidance=shown.guidance,
            size=self.recipe.dataset.resolution,
            batch_size=shown.batch_size,
            capture=self.recipe.train.capture,
        )
        return dict(zip(indices, images, strict=True))

    def read(self, indices: Sequence[int]) -> None:
        """Have the prompts of some of the pictures encoded, as they are asked for when these are drawn."""
        self.family.read_to_draw(self.render, indices, self.recipe.validation.batch_size)

    def save(self, step: int, images: Mapping[int, Image.Image]) -> None:
        """Raises: OSError, with those that are written whole."""
        paths = self.paths(step)
        for index, image in images.items():
            with whole(paths[index], overwrite=True) as unfinished:
                image.save(unfinished, format="PNG")

    def load(self, step: int) -> dict[str, Image.Image]:
        """By prompt, those that could be written."""
        found = zip(self.prompts, self.paths(step), strict=True)
        return {prompt: _open(path) for prompt, path in found if path.exists()}

    def save_grid(self, pictures: Sequence[Picture], step: int) -> Path | None:
        """The concept's pictures, what the base made of the prompts, and what it makes of them at a step."""
        if not self.prompts:
            return None
        shown = list(_still_there(pictures[: len(self.prompts)]))
        rows = {
            "the pictures": shown,
            "before training": list(self.load(0).values()),
            "after training": list(self.load(step).values()),
        }
        path = self.folder / GRID_FILE
        with whole(path, overwrite=True) as unfinished:
            make_grid(rows, self.prompts, self.recipe.dataset.resolution).save(unfinished, format="PNG")
        return path


def _still_there(pictures: Sequence[Picture]) -> Iterator[Image.Image]:
    for picture in pictures:
        try:
            yield _open(Path(picture.path))
        except OSError as error:
            warn(f"{picture.path} cannot be read any more ({reason(error)}); {GRID_FILE} is made without it")


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture
