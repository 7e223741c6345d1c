"""Frozen linear layers in 8-bit floating point, half as large as in 16 bits, through which adapters still learn.

Weights are e4m3 (2209.05433), 3 bits after the point, with a power of two for each output, which rounds nothing.
Activations stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PACKED = torch.float8_e4m3fn
GREATEST = torch.finfo(PACKED).max
LEAST = 2.0**-24  # that float16 knows


class Float8Linear(nn.Linear):
    """A layer whose weight is bytes, which nothing takes for numbers of its own precision.

    Args:
        layer: what it stands for.
        dtype: what it computes in.
    """

    scale: Tensor  # (m, 1), float32

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = layer.in_features, layer.out_features, dtype
        weight = layer.weight.data.float()
        scale = (weight.abs().amax(1, keepdim=True) / GREATEST).clamp(min=LEAST).log2().ceil().exp2()
        self.weight = nn.Parameter((weight / scale).to(PACKED).view(torch.uint8), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in torch
        """(..., n) to (..., m), in the layer's precision."""
        with torch.autocast(input.device.type, enabled=False):
            x = input.to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return _Product.apply(x, self.weight, self.scale, bias)

    @property
    def W_q(self) -> Tensor:  # noqa: N802 - by this name peft knows layers that it asks to `dequantize`
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight in the layer's precision: (m, n)."""
        return _unpacked(self.weight, self.scale, self.compute_dtype)


class _Product(torch.autograd.Function):
    """`x W^T + b` with a gradient for x alone; between the passes W is kept packed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(x, _unpacked(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, scale = ctx.saved_tensors
        return gradient @ _unpacked(weight, scale, gradient.dtype), None, None, None


def _unpacked(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.view(PACKED).to(dtype) * scale.to(dtype)
