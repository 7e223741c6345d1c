"""Frozen linear layers whose weights are packed into fewer bits, through which adapters still learn (2305.14314).

Shapes: N rows, n inputs, m outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Packed(nn.Linear):
    """A layer that unpacks its weight for each product; between the passes nothing wider is kept."""

    compute_dtype: torch.dtype

    @abstractmethod
    def unpacked(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight as numbers: (m, n).

        Args:
            out: where to write it, of that precision and shape.
        """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in torch
        """(..., n) to (..., m), in the layer's precision."""
        with torch.autocast("cpu" if input.is_meta else input.device.type, enabled=False):
            x = input.to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return _Product.apply(x, self.unpacked, bias)


class _Product(torch.autograd.Function):
    """`x W^T + b` with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpacked: Callable[[torch.dtype], Tensor], bias: Tensor | None) -> Tensor:
        ctx.unpacked = unpacked
        return nn.functional.linear(x, unpacked(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient @ ctx.unpacked(gradient.dtype), None, None


def computes(layer: nn.Linear) -> torch.dtype:
    """The precision of a layer's products."""
    return layer.compute_dtype if isinstance(layer, Packed) else layer.weight.dtype


def unpacked_together(layers: Sequence[Packed], dtype: torch.dtype) -> Tensor:
    """The weights of k layers of one shape, one below another: (km, n)."""
    first = layers[0]
    shape = len(layers) * first.out_features, first.in_features
    whole = torch.empty(shape, dtype=dtype, device=first.weight.device)
    for layer, part in zip(layers, whole.split(first.out_features), strict=True):
        layer.unpacked(dtype, out=part)
    return whole
