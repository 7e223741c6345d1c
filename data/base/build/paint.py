"""The pictures that `measure` judges, painted from the stored files in float32 by the pipelines that users load.

Every folder is filled picture by picture, so that a cut-off run goes on, and so that another machine may judge them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from composer import Composer
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from edits import KINDS, Edit, draw_edits
from PIL import Image
from prompts import shared_prompts, world_prompts
from settings import Settings
from specification import Picture
from sprites import Sprite
from torch import Tensor

from finetune.companions import companion
from finetune.edges import edge_map

GUIDANCE, IMAGE_GUIDANCE, STEPS = 5.0, 1.5, 25
CONTROL_SEED, EDIT_SEED = 79, 80


def to_image(picture: Tensor) -> Image.Image:
    """[3, h, w] in 0..1."""
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().cpu().numpy())


def from_image(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def read_pictures(folder: Path, count: int) -> Tensor | None:
    """The stored pictures [n, 3, h, w] in 0..1, or None where some are missing."""
    paths = sorted(folder.glob("*.webp"))[:count]
    return torch.stack([from_image(Image.open(p)) for p in paths]) if len(paths) == count else None


def load(kind: type, folder: Path, **parts):
    """A pipeline in float32, on the accelerator if there is one."""
    pipeline = kind.from_pretrained(folder, dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Studio:
    """Everything that is painted for one base: `settings.folder/judged/NAME/0000.webp` and on."""

    base: Path
    settings: Settings
    composer: Composer
    sprites: list[Sprite]
    count: int

    @cached_property
    def batch(self) -> int:
        return 64 if torch.cuda.is_available() else 8

    def fill(self, name: str, count: int, maker: Callable[[], Callable[[Sequence[int], torch.Generator], list]]):
        """Pictures of `judged/name`; the maker gives a function of row numbers and noise, and is asked if needed."""
        folder = self.settings.folder / "judged" / name
        stored = read_pictures(folder, count)
        if stored is not None:
            return stored
        folder.mkdir(parents=True, exist_ok=True)
        make = maker()
        for start in range(len(list(folder.glob("*.webp"))) // self.batch * self.batch, count, self.batch):
            rows = range(start, min(start + self.batch, count))
            for row, image in zip(rows, make(rows, torch.Generator("cpu").manual_seed(start)), strict=True):
                image.save(folder / f"{row:04d}.webp", quality=95)
        print(f"painted {folder}", flush=True)
        return read_pictures(folder, count)

    def said(self, name: str, captions: list[str], base: Path | None = None) -> Tensor:
        """Pictures of captions."""

        def maker() -> Callable:
            pipeline = load(StableDiffusionPipeline, base or self.base)
            return lambda rows, noise: (
                pipeline(
                    [captions[i] for i in rows], num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise
                ).images
            )

        return self.fill(name, len(captions), maker)

    def controlled(self, name: str, captions: list[str], maps: list[Image.Image]) -> Tensor:
        """Pictures of captions that follow edge maps."""

        def maker() -> Callable:
            controlnet = companion("controlnet", self.base)
            pipeline = load(StableDiffusionControlNetPipeline, self.base, controlnet=controlnet)
            return lambda rows, noise: pipeline(
                [captions[i] for i in rows], [maps[i] for i in rows], num_inference_steps=STEPS,
                guidance_scale=GUIDANCE, generator=noise,
            ).images  # fmt: skip

        return self.fill(name, len(captions), maker)

    def edited(self, name: str, instructions: list[str], sources: list[Image.Image]) -> Tensor:
        """Sources changed as the instructions say."""

        def maker() -> Callable:
            unet = companion("instruct_pix2pix", self.base)
            pipeline = load(StableDiffusionInstructPix2PixPipeline, self.base, unet=unet)
            return lambda rows, noise: pipeline(
                [instructions[i] for i in rows], [sources[i] for i in rows], num_inference_steps=STEPS,
                guidance_scale=GUIDANCE, image_guidance_scale=IMAGE_GUIDANCE, generator=noise,
            ).images  # fmt: skip

        return self.fill(name, len(instructions), maker)

    # -- what is judged -----------------------------------------------------------------------------------------------

    @cached_property
    def world_prompts(self) -> list[Picture]:
        return world_prompts(self.sprites, self.count)

    @cached_property
    def shared_prompts(self) -> list[Picture]:
        return shared_prompts(self.sprites, max(4, self.count // 8))

    @cached_property
    def control_prompts(self) -> list[Picture]:
        return world_prompts(self.sprites, max(4, self.count // 8), CONTROL_SEED)

    @cached_property
    def edits(self) -> list[Edit]:
        """As many of each kind."""
        each = max(1, self.count // 32)
        found = [draw_edits(self.sprites, EDIT_SEED + i, each, True, kind) for i, kind in enumerate(KINDS)]
        return [edit for some in found for edit in some]

    def draw(self, pictures: list[Picture], batch: int = 32) -> Tensor:
        """The true pictures [n, 3, h, w]."""
        return torch.cat([self.composer.draw(pictures[i : i + batch]) for i in range(0, len(pictures), batch)])

    def paint(self, beside: Path | None, beside_world: Path | None) -> None:
        """All of it: companions first, they are asked for most."""
        edits, control = self.edits, self.control_prompts
        sources = [to_image(p) for p in self.draw([e.source for e in edits])]
        self.edited("edited", [e.instruction for e in edits], sources)
        self.said("afresh", [e.caption for e in edits])
        maps = [edge_map(to_image(p)) for p in self.draw(control)]
        self.controlled("controlled", [p.caption for p in control], maps)
        self.said("uncontrolled", [p.caption for p in control])
        self.said("shared", [p.caption for p in self.shared_prompts])
        self.said("world", [p.caption for p in self.world_prompts])
        if beside:
            self.said("beside", [p.caption for p in self.shared_prompts], beside)
        if beside and beside_world:
            captions = (beside_world / "prompts.txt").read_text().splitlines()
            self.said("beside_world", captions[: self.count], beside)
