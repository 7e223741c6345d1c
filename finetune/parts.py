"""A pipeline's parts as they should be when they are moved and trained, where their libraries leave something out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def move(part: Any, device: torch.device) -> None:
    """All of it: bitsandbytes' layers in 8 bits have their weight under several names, and `to` knows of one."""
    part.to(device)
    for module in part.modules():
        for name in ("weight", "state"):
            holder: Any = getattr(module, name, None)
            if getattr(holder, "CB", None) is not None:
                holder.CB, holder.SCB = module.weight.data, holder.SCB.to(device)


@contextmanager
def lent(part: nn.Module, device: torch.device) -> Iterator[None]:
    """What is frozen, on a device for a while; its weights stay where they were, so that going back takes no time."""
    home = next(part.parameters()).device
    weights = [(weight, weight.data) for weight in part.parameters()]
    buffers = [(module, *known) for module in part.modules() for known in module.named_buffers(recurse=False)]
    try:
        move(part, device)
        yield
    finally:
        if any(weight.dtype in (torch.uint8, torch.int8) for weight in part.parameters()):
            move(part, home)  # what was packed there is smaller, and packing it again would take its time
        else:
            for weight, kept in weights:
                weight.data = kept
            for module, name, buffer in buffers:
                setattr(module, name, buffer)


def keep_all(part: Any) -> None:
    """Drop nothing while it trains: T5 would a tenth, which its own pretraining did not (2002.05202)."""
    for module in part.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):  # of attention
            module.dropout = 0.0
