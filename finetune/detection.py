"""Which family a checkpoint belongs to, by what it says of itself."""

from __future__ import annotations

from typing import Any

import torch

from finetune.errors import UserError, reason
from finetune.families.base import Source, families, shapes_in
from finetune.hub import meet


def detect(source: Source) -> str:
    """The family that a checkpoint belongs to, or what it is instead.

    Raises:
        UserError: there is none at the source.
    """
    kind = _single_file_kind(source) if source.is_single_file else _pipeline_class(source)
    if source.is_single_file and source.config is not None:  # names and shapes in a file can fit several models
        kind = _pipeline_class(Source(source.config))
    for name in families.names():
        if kind == families[name].pipeline_class or kind in families[name].single_files:
            return name
    return kind


def _pipeline_class(source: Source) -> str:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        meet(source.path, "model_index.json", source.revision)
        config: Any = DiffusionPipeline.load_config(source.path, revision=source.revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"base.source: {source.path} is no folder in diffusers' layout and cannot be had from the Hub "
            f"({reason(error)})"
        ) from None
    return config["_class_name"]


def _single_file_kind(source: Source) -> str:
    """What diffusers takes the file for, judged by its tensors' names and shapes alone."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    return infer_diffusers_model_type(
        {name: torch.empty(shape, device="meta") for name, shape in shapes_in(source).items()}
    )
