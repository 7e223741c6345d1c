"""Prompts and seeds to pictures, with any pipeline of diffusers that makes them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from finetune.placeholder import spell
from finetune.replay import replayed

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
    guidance: float | None,
    size: int | tuple[int, int],
    batch_size: int = 4,
    pictures: Mapping[str, Image.Image] | None = None,
    settings: Mapping[str, Any] | None = None,
    capture: bool = True,
) -> list[Image.Image]:
    """One picture for each prompt and seed. A picture depends on its own seed alone, not on its neighbours.

    Args:
        guidance: without it, the pipeline's own.
        size: of the square, or width and height, in pixels.
        pictures: inputs of the pipeline, the same for each prompt.
        settings: other arguments of the pipeline.
        capture: on a GPU, replay the denoiser as a CUDA graph.
    """
    pipeline.set_progress_bar_config(disable=True)
    width, height = (size, size) if isinstance(size, int) else size
    accepted = inspect.signature(pipeline.__call__).parameters
    wanted = {"width": width, "height": height, "guidance_scale": guidance}
    given: dict[str, Any] = {name: value for name, value in wanted.items() if name in accepted and value is not None}
    given |= settings or {}
    images: list[Image.Image] = []
    with replayed(pipeline) if capture else nullcontext({}) as more:
        given |= {name: value for name, value in more.items() if name in accepted}
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[chunk]]
            # Each prompt gets a copy, or its generator would not draw what it draws when alone.
            inputs = {name: [picture] * len(generators) for name, picture in (pictures or {}).items()}
            with torch.random.fork_rng([pipeline.device] if pipeline.device.type == "cuda" else []):
                torch.manual_seed(seeds[start])  # for the pipelines that forget their generator
                texts = _spelt(pipeline, prompts[chunk])
                asked = {"prompt": texts, "generator": generators, "num_inference_steps": steps}
                images += pipeline(**asked, **given, **inputs).images
    return images


def _spelt(pipeline: Any, prompts: Sequence[str]) -> list[str]:
    """Words of several vectors written out, where the pipeline does not do it itself."""
    if hasattr(pipeline, "maybe_convert_prompt"):
        return list(prompts)
    return [spell(prompt, pipeline.tokenizer) for prompt in prompts]


def file_name(text: str) -> str:
    """A prompt as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "picture"
