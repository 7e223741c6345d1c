"""A frozen linear layer and its trained low-rank update as one operation.

peft computes them apart, in the update's own precision: it copies each layer's input to
float32 and back, and adds the two outputs. Most of the time of a small step is spent there.
A model whose trained layers are all fused so computes in the precision that it is kept in.

Shapes: N rows, n inputs, m outputs, r the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HALF = {torch.float16, torch.bfloat16}


class LowRankLinear(torch.autograd.Function):
    """`x W^T + b + s (x A^T) B^T`, with gradients for x, A and B alone.

    Everything is computed in the precision of autocast, or of x without it; A and B are
    float32, and so are their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        cast: Sequence[Tensor],
    ) -> Tensor:
        """(..., n) to (..., m).

        Args:
            cast: A and B in the precision of the base, where they are known.
        """
        kind = x.device.type
        if x.is_meta:  # where autocast is unknown; its precision is then that of the base
            dtype, plain = weight.dtype, nullcontext()
        else:
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            plain = torch.autocast(kind, enabled=False)
        with plain:
            down, up = cast if cast and cast[0].dtype == dtype else (down, up)
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
        return to_x, None, None, _product(back.T, rows), _product(gradient.T, inner), None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32, which a GPU adds up in anyway."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return (a @ b).float()
    return torch.mm(a, b, out_dtype=torch.float32)


class FusedLinear(lora.Linear):
    """peft's layer, for which one active adapter without dropout is one operation."""

    cast: Sequence[Tensor] = ()  # the factors in the base's precision, while a model is at work

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = self.active_adapters
        if self.disable_adapters or self.merged or args or kwargs or len(active) != 1:
            return super().forward(x, *args, **kwargs)
        base, down, up = self.base_layer, self.lora_A[active[0]], self.lora_B[active[0]]
        factors = down.weight, up.weight
        return LowRankLinear.apply(x, base.weight, base.bias, *factors, self.scaling[active[0]], self.cast)


def fuse(model: nn.Module) -> None:
    """Make all layers of a model that can be fused so."""
    layers: list[Any] = list(model.modules())
    for layer in layers:
        plain = type(layer) is lora.Linear and type(layer.get_base_layer()) is nn.Linear and not layer.lora_variant
        if plain and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()):
            layer.__class__ = FusedLinear
    fused = [layer for layer in layers if isinstance(layer, FusedLinear)]
    model.register_forward_pre_hook(partial(_cast, fused))
    model.register_forward_hook(partial(_drop, fused), always_call=True)


@torch.no_grad()
def _cast(layers: Sequence[FusedLinear], *_: Any) -> None:
    """All factors to half precision by one operation instead of two for each layer, where a GPU works in it."""
    if not layers or not layers[0].weight.is_cuda or layers[0].weight.dtype not in HALF:
        return
    pairs: list[Any] = [pair for layer in layers for pair in (layer.lora_A, layer.lora_B)]
    exact = [pair[layers[0].active_adapters[0]].weight for pair in pairs]
    cast = [torch.empty_like(factor, dtype=layers[0].weight.dtype) for factor in exact]
    torch._foreach_copy_(cast, exact)  # pyright: ignore[reportPrivateImportUsage]
    for place, layer in enumerate(layers):
        layer.cast = cast[2 * place : 2 * place + 2]


def _drop(layers: Sequence[FusedLinear], *_: Any) -> None:
    for layer in layers:
        layer.cast = ()


def as_kept(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, where a model needs none: it would copy what a norm reads to float32, and back."""
    kind = "cuda" if device.type == "meta" else device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    trained = {id(part) for layer in model.modules() if isinstance(layer, FusedLinear) for part in _factors(layer)}
    others = {part.dtype for part in model.parameters() if part.is_floating_point() and id(part) not in trained}
    alone = len(others) == 1 and others <= HALF
    return torch.autocast(kind, enabled=False) if alone else nullcontext()


def _factors(layer: FusedLinear) -> list[nn.Parameter]:
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
