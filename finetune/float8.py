"""Frozen linear layers in 8-bit floating point, half as large as in 16 bits.

Weights are e4m3 (2209.05433), 3 bits after the point, with a power of two for each output, which rounds nothing.
Activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from finetune.gpu import kernels_for
from finetune.packed import Packed

FLOAT8 = torch.float8_e4m3fn
GREATEST = torch.finfo(FLOAT8).max
LEAST = 2.0**-24  # that float16 knows


class Float8Linear(Packed):
    """A layer whose weight is bytes, which nothing takes for numbers of its own precision.

    It is packed when it is moved for the first time, where it is moved to: a GPU takes no time for it.

    Args:
        layer: what it stands for.
        dtype: what it computes in.
    """

    scale: Tensor  # (m, 1), float32

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = layer.in_features, layer.out_features, dtype
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("scale", None, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, and pack what is not packed yet."""
        super()._apply(fn, recurse)
        if self.scale is None and not self.weight.is_meta:
            weight = self.weight.data.float()
            self.scale = (weight.abs().amax(1, keepdim=True) / GREATEST).clamp(min=LEAST).log2().ceil().exp2()
            self.weight = nn.Parameter((weight / self.scale).to(FLOAT8).view(torch.uint8), requires_grad=False)
        return self

    @property
    def W_q(self) -> Tensor:  # noqa: N802 - by this name peft knows layers that it asks to `dequantize`
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight in the layer's precision: (m, n)."""
        return self.unpacked(self.compute_dtype)

    def unpacked(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device) if out is None else out
        if (kernels := kernels_for(out)) is not None:
            return kernels.unpack_float8(self.weight, self.scale, out)
        return torch.mul(self.weight.view(FLOAT8).to(dtype), self.scale.to(dtype), out=out)
