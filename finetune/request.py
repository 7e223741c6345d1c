"""Which class images a recipe asks for: what they are kept under, known before the base is loaded and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.dataset.class_images import ClassImages
from finetune.dataset.storage import kept
from finetune.fingerprint import fingerprint
from finetune.methods.base import Prior
from finetune.outline import Outline
from finetune.recipe import Recipe


def cache_folder() -> Path:
    return kept("class-images")


def request_for(recipe: Recipe[Any], prior: Prior, model: str, sampler: str) -> ClassImages:
    """Everything that decides how they look."""
    return ClassImages(
        prompt=prior.prompt,
        model=model,
        sampler=sampler,
        steps=recipe.validation.steps,
        guidance=recipe.validation.guidance,
        size=recipe.dataset.resolution,
        seed=recipe.train.seed,
    )


def sampler_name(kind: str, config: Mapping[str, Any], dtype: str) -> str:
    """All of the sampler that shows in a picture, beside its steps and guidance."""
    ending = " to zero SNR" if config.get("rescale_betas_zero_snr") else ""
    return f"{kind}{ending} in {dtype}"


def foreseen(recipe: Recipe[Any], prior: Prior, base: Outline) -> ClassImages:
    """The same, from the base's files alone: flow models keep their sampler, all others are sampled with DDIM."""
    kind, config = base.index["scheduler"][1], base.config("scheduler")
    if "FlowMatch" not in kind:
        kind = "DDIMScheduler"
        config |= {"rescale_betas_zero_snr": True} if recipe.train.zero_terminal_snr else {}
    return request_for(
        recipe, prior, fingerprint(base.kind, base.weights), sampler_name(kind, config, f"torch.{recipe.frozen_dtype}")
    )
