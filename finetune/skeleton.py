"""A base without its weights: every part from its config alone, in shapes or with random weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.detection import detect
from finetune.errors import UserError
from finetune.families.base import Family, Source, families
from finetune.files import read_shapes
from finetune.hub import meet
from finetune.recipe import Recipe, known_families

CONFIGS = ["*.json", "*.txt", "*.model", "*.jinja"]  # what is downloaded of a model of the Hub


def build(recipe: Recipe[Any], device: torch.device) -> Family:
    """The recipe's base as one of the families.

    Args:
        device: meta for shapes alone; elsewhere weights are what a new model has.

    Raises:
        UserError: its configs cannot be had, no family is made for it, or the objective does not fit it.
    """
    train, base, dtype = recipe.train, recipe.base, getattr(torch, recipe.frozen_dtype)
    source = Source(base.source, base.revision, dtype, base.config)
    name = base.family if base.family != "auto" else detect(source)
    if name not in known_families():
        raise UserError(f"base.source: {source.path} is a {name}, which no family here is made for")
    kind = families[name]
    try:
        pipeline = _pipeline(kind, _folder(source), dtype, device)
    except Exception as error:  # configs fail in as many ways as there are files
        reason = " ".join(str(error).split())
        raise UserError(f"base.source: the configs of {source.path} cannot be had: {reason}") from error
    objective = kind.objective_class.from_scheduler(
        pipeline.scheduler.config, min_snr_gamma=train.min_snr_gamma, zero_terminal_snr=train.zero_terminal_snr
    )
    return kind(pipeline, objective.to(device), source)


def _folder(source: Source) -> Path:
    path, revision = source.path, source.revision
    if source.is_single_file:
        path, revision = source.config or _usual_config(path), None
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    meet(path, "model_index.json", revision)
    return Path(snapshot_download(path, revision=revision, allow_patterns=CONFIGS))


def _usual_config(file: str) -> str:
    """The model of the Hub whose configs diffusers takes for a single file."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    shapes = read_shapes(Path(file))[0]
    found = fetch_diffusers_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    return found["pretrained_model_name_or_path"]


def _pipeline(kind: type[Family], folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    index: Any = DiffusionPipeline.load_config(str(folder))
    parts = {
        name: _part(folder / name, entry[0], entry[1], dtype, device)
        for name, entry in index.items()
        if isinstance(entry, list | tuple) and name not in kind.without
    }
    return getattr(diffusers, kind.pipeline_class)(**parts, **kind.without)


def _part(folder: Path, library: str | None, name: str | None, dtype: torch.dtype, device: torch.device) -> Any:
    if library is None or name is None:
        return None
    kind = getattr(importlib.import_module(library), name)
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(folder)
    model: Any = kind
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # there may be no room for all of it in float32
    try:
        with device:
            if library == "diffusers":
                part = model.from_config(model.load_config(folder))
            else:
                part = model(model.config_class.from_pretrained(folder))
    finally:
        torch.set_default_dtype(usual)
    part.to(dtype)
    for layer, module in part.named_modules() if dtype == torch.float16 else ():
        if layer.rpartition(".")[2] in (part._keep_in_fp32_modules or ()):  # in T5 they would overflow
            module.float()
    return part
