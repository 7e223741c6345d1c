"""Prompts and seeds to pictures, with any text-to-image pipeline of diffusers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL import Image


def use_ddim(pipeline: Any, *, zero_terminal_snr: bool = False) -> None:
    """Sample with DDIM (2010.02502) on the base's own noise schedule; flow models keep their Euler sampler."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if "FlowMatch" in type(pipeline.scheduler).__name__:
        return

    settings: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    if zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)


def render(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    size: int,
    batch_size: int = 4,
) -> list[Image.Image]:
    """One picture for each prompt and seed. A picture depends on its own seed alone, not on its neighbours."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[chunk]]
        images += pipeline(
            prompt=list(prompts[chunk]),
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=size,
            width=size,
        ).images
    return images


def file_name(text: str) -> str:
    """A prompt as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "picture"
