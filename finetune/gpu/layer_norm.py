# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: N803
"""Layer normalisation (1607.06450) of a sum, as one operation with it.

A transformer adds what a layer answers to what it was asked, and normalises that for the next
layer; some scale and shift what is normalised for each picture (DiT, 2212.09748), and gate what is added.
Torch reads and writes everything once for each of these, there and back.

Shapes: B pictures, L tokens, n channels. A program of a kernel sees whole tokens, ROWS of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.gpu import runs

VALUES = 4096  # that a program takes, but for a longer token


@triton.jit
def _own(tokens, length, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's values, which of them there are, its tokens and their pictures, and the channels."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * width + channel[None, :]
    return at, (row < tokens)[:, None] & (channel < width)[None, :], row, row // length, channel


@triton.jit
def _of_pictures(values, stride, picture, channel, mask):
    """(ROWS, BLOCK) of (B, n), or of (n,) where the stride is 0."""
    at = picture.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(values + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward(x, added, gate, weight, bias, total, y, mean, rstd, tokens, length, width,
             gate_stride, weight_stride, bias_stride, eps,
             ROWS: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    at, mask, row, picture, channel = _own(tokens, length, width, ROWS, BLOCK)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADDED:
        more = tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            more *= _of_pictures(gate, gate_stride, picture, channel, mask)
        value = (value + more).to(total.dtype.element_ty)
        tl.store(total + at, value, mask=mask)
        value = value.to(tl.float32)
    middle = tl.sum(value, 1) / width
    off = tl.where(mask, value - middle[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(off * off, 1) / width + eps)
    tl.store(mean + row, middle, mask=row < tokens)
    tl.store(rstd + row, inverse, mask=row < tokens)
    factor = _of_pictures(weight, weight_stride, picture, channel, mask)
    result = off * inverse[:, None] * factor + _of_pictures(bias, bias_stride, picture, channel, mask)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(total, change, to_y, gate, weight, mean, rstd, to_x, to_added, tokens, length, width,
              gate_stride, weight_stride,
              ROWS: tl.constexpr, BLOCK: tl.constexpr, CHANGED: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """rstd (w g - mean(w g) - n mean(w g n)) + change: n the normalised sum, g its gradient, w the weight."""
    at, mask, row, picture, channel = _own(tokens, length, width, ROWS, BLOCK)
    middle = tl.load(mean + row, mask=row < tokens, other=0.0)
    inverse = tl.load(rstd + row, mask=row < tokens, other=0.0)
    value = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
    normal = tl.where(mask, (value - middle[:, None]) * inverse[:, None], 0.0)
    weighed = tl.load(to_y + at, mask=mask, other=0.0).to(tl.float32)
    weighed *= _of_pictures(weight, weight_stride, picture, channel, mask)
    even, along = tl.sum(weighed, 1) / width, tl.sum(weighed * normal, 1) / width
    result = (weighed - even[:, None] - normal * along[:, None]) * inverse[:, None]
    if CHANGED:
        result += tl.load(change + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(to_x + at, result.to(to_x.dtype.element_ty), mask=mask)
    if GATED:
        result *= _of_pictures(gate, gate_stride, picture, channel, mask)
        tl.store(to_added + at, result.to(to_added.dtype.element_ty), mask=mask)


def _stride(values: Tensor | None) -> int:
    return 0 if values is None or values.dim() == 1 else values.stride(0)


class _Plan:
    """How (B, L, n) is shared out."""

    def __init__(self, x: Tensor):
        length, width = x.shape[-2:]
        tokens, block = x.numel() // width, triton.next_power_of_2(width)
        rows = max(1, VALUES // block)
        self.grid = (triton.cdiv(tokens, rows),)
        self.sizes = (tokens, length, width)
        self.block = {"ROWS": rows, "BLOCK": block, "num_warps": 4 if rows * block <= VALUES else 8}


class _AddAndNormalise(torch.autograd.Function):
    """The sum and what is normalised of it, with gradients for the two that are added alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        plan, y = _Plan(x), torch.empty_like(x)
        mean, rstd = x.new_empty((2, plan.sizes[0]), dtype=torch.float32)
        total = x if added is None else torch.empty_like(x)
        parts = x, x if added is None else added.contiguous(), weight if gate is None else gate, weight, bias
        strides = _stride(gate), _stride(weight), _stride(bias)
        how = {**plan.block, "ADDED": added is not None, "GATED": gate is not None}
        _forward[plan.grid](*parts, total, y, mean, rstd, *plan.sizes, *strides, eps, **how)
        ctx.save_for_backward(total, gate, weight, mean, rstd)
        ctx.adds = added is not None
        ctx.set_materialize_grads(False)  # to know whether the sum itself goes on
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total, gate, weight, mean, rstd = ctx.saved_tensors
        change, to_y = (None if each is None else each.contiguous() for each in gradients)
        if to_y is None:
            to_added = change if gate is None or change is None else change * gate[:, None]
            return change, to_added if ctx.adds else None, None, None, None, None
        plan, to_x = _Plan(total), torch.empty_like(total)
        to_added = torch.empty_like(total) if gate is not None else to_x
        known = total, to_y if change is None else change, to_y, weight if gate is None else gate, weight, mean, rstd
        how = {**plan.block, "CHANGED": change is not None, "GATED": gate is not None}
        _backward[plan.grid](*known, to_x, to_added, *plan.sizes, _stride(gate), _stride(weight), **how)
        return to_x, to_added if ctx.adds else None, None, None, None, None


def add_and_normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, added: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x + gate * added`, and that normalised, times `weight` and plus `bias`: (B, L, n) each.

    Args:
        weight, bias: (n,), or (B, n) for each picture.
        gate: (B, n); default: 1.
    """
    given: Any = (gate, weight, bias)
    frozen = not any(each is not None and each.requires_grad for each in given)
    if runs(x) and frozen and (added is None or added.dtype == x.dtype):
        total, y = _AddAndNormalise.apply(x, added, gate, weight, bias, eps)
        return x if added is None else total, y
    given = [each[:, None] if each is not None and each.dim() == 2 else each for each in given]
    if added is not None:
        x = x + (added if gate is None else given[0] * added)
    return x, torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * given[1] + given[2]
