"""Gradient checkpointing (1604.06174): activations that are computed anew in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune.errors import UserError, did_you_mean


def checkpoint_all(model: Any) -> None:
    """Every block by itself, as its library sees to it."""
    settings = _settings(model)
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing(partial(checkpoint, **settings))
    else:  # transformers' name, and only in train mode
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def checkpoint_some(model: nn.Module, names: Sequence[str]) -> None:
    """The parts of these names, each as a whole, whatever kind they are; of a list each of its parts."""
    for part in dict.fromkeys(block for found in find_parts(model, names) for block in _blocks(found)):
        _recompute(part)


def find_parts(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The parts of a model of these names.

    Raises:
        UserError: there is no such part.
    """
    parts = dict(model.named_modules())
    if unknown := [name for name in names if name not in parts or not name]:
        usual = [name for name in parts if name.count(".") <= 1]
        raise UserError(
            [
                f"train.gradient_checkpointing: no part is named {name!r}. {did_you_mean(name, usual)}"
                for name in unknown
            ]
        )
    return [parts[name] for name in names]


def _blocks(part: nn.Module) -> Iterator[nn.Module]:
    yield from part if isinstance(part, nn.ModuleList) else [part]


def _recompute(block: Any) -> None:
    forward, block._gradient_checkpointing_func = block.forward, partial(checkpoint, **_settings(block))

    @wraps(forward)
    def anew(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return block._gradient_checkpointing_func(forward, *args, **kwargs)

    block.forward = anew


def _settings(model: nn.Module) -> dict[str, Any]:
    """The state of random numbers, which dropout needs, cannot be kept in a captured step."""
    keeps = any(getattr(module, "p", 0) for module in model.modules() if isinstance(module, nn.Dropout))
    return {"use_reentrant": False, "preserve_rng_state": keeps}
