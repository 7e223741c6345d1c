"""A frozen linear layer and its trained low-rank update as one operation.

peft computes them apart, in the update's own precision: it copies each layer's input to
float32 and back, and adds the two outputs. Most of the time of a small step is spent there.

Shapes: N rows, n inputs, m outputs, r the rank.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LowRankLinear(torch.autograd.Function):
    """`x W^T + b + s (x A^T) B^T`, with gradients for x, A and B alone.

    Everything is computed in the precision of autocast, or of x without it; A and B are
    float32, and so are their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        """(..., n) to (..., m)."""
        kind = x.device.type
        if x.is_meta:  # where autocast is unknown; its precision is then that of the base
            dtype, plain = weight.dtype, nullcontext()
        else:
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            plain = torch.autocast(kind, enabled=False)
        with plain:
            rows, frozen, down, up = (part.to(dtype) for part in (x.reshape(-1, x.shape[-1]), weight, down, up))
            inner = rows @ down.T
            result = nn.functional.linear(rows, frozen, None if bias is None else bias.to(dtype))
            result.addmm_(inner, up.T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, inner, weight, down, up = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, len(weight)).to(rows.dtype)
        back = gradient @ up
        if ctx.scale != 1:
            back, inner = back * ctx.scale, inner * ctx.scale
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ weight.to(rows.dtype)).addmm_(back, down).view(ctx.shape).to(ctx.dtype)
        return to_x, None, None, _product(back.T, rows), _product(gradient.T, inner), None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32, which a GPU adds up in anyway."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return (a @ b).float()
    return torch.mm(a, b, out_dtype=torch.float32)


class FusedLinear(lora.Linear):
    """peft's layer, for which one active adapter without dropout is one operation."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = self.active_adapters
        if self.disable_adapters or self.merged or args or kwargs or len(active) != 1:
            return super().forward(x, *args, **kwargs)
        base, down, up = self.base_layer, self.lora_A[active[0]], self.lora_B[active[0]]
        return LowRankLinear.apply(x, base.weight, base.bias, down.weight, up.weight, self.scaling[active[0]])


def fuse(model: nn.Module) -> None:
    """Make all layers of a model that can be fused so."""
    layers: list[Any] = list(model.modules())
    for layer in layers:
        plain = type(layer) is lora.Linear and type(layer.get_base_layer()) is nn.Linear and not layer.lora_variant
        if plain and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()):
            layer.__class__ = FusedLinear
