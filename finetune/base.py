"""The recipe's base, loaded and ready to be taught."""

from __future__ import annotations

from typing import Any

import torch

from finetune.detection import detect
from finetune.errors import UserError, reason
from finetune.families.base import Family, Source, families
from finetune.quantize import quantize
from finetune.quiet import quiet_loading
from finetune.recipe import Recipe, known_families
from finetune.render import use_ddim
from finetune.shortage import is_out_of_memory
from finetune.skeleton import build


def load_family(recipe: Recipe[Any]) -> Family:
    """The recipe's base as one of the families.

    Raises:
        UserError: no family is made for it, or the objective does not fit it.
    """
    quiet_loading()
    source = Source(recipe.base.source, recipe.base.revision, getattr(torch, recipe.frozen_dtype), recipe.base.config)
    name = recipe.base.family if recipe.base.family != "auto" else detect(source)
    if name not in known_families():
        raise UserError(f"base.source: {source.path} is a {name}, which no family here is made for")
    try:
        family = families[name].load(
            source,
            min_snr_gamma=recipe.train.min_snr_gamma,
            zero_terminal_snr=recipe.train.zero_terminal_snr,
        )
    except UserError:
        raise
    except Exception as error:  # a broken folder fails in as many ways as it has files
        if is_out_of_memory(error):
            raise
        hint = ""
        if source.is_single_file and source.config is None:
            hint = " Without the Hub, set base.config to a folder in diffusers' layout of the same architecture."
        raise UserError(f"base.source: {source.path} cannot be loaded: {reason(error)}{hint}") from error
    return _made_ready(recipe, family)


def make_family(recipe: Recipe[Any], device: torch.device) -> Family:
    """The recipe's base from its configs alone, with random weights: as fast as the real one, and as large.

    Args:
        device: where they are drawn; like loaded ones they are on the CPU then.

    Raises:
        UserError: its configs cannot be had, no family is made for it, or the objective does not fit it.
    """
    quiet_loading()
    family = build(recipe, device)
    for part in family.parts():
        part.to("cpu")
    family.fingerprint = f"random weights of {recipe.base.source}"  # not to be taken for the real one's class images
    return _made_ready(recipe, family)


def _made_ready(recipe: Recipe[Any], family: Family) -> Family:
    _check_size(recipe, family)
    if recipe.base.quantize is not None:
        quantize(family, recipe.base.quantize)
    use_ddim(family.pipeline, zero_terminal_snr=recipe.train.zero_terminal_snr)
    return family


def _check_size(recipe: Recipe[Any], family: Family) -> None:
    if why := recipe.dataset.misfit(family.pipeline.vae_scale_factor * family.size_multiple):
        raise UserError(f"dataset.resolution: {why}")
