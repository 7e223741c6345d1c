# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: N803
"""GEGLU (2002.05202): one half of a layer's output, gated by the gelu of the other, as one operation.

Torch reads and writes everything five times on the way there and back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024
ROOT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _halves(joined, width, count, BLOCK: tl.constexpr):
    """Where a program's values are in the result and in the two halves."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    left = (at // width) * 2 * width + at % width
    return at, left, left + width, at < count


@triton.jit
def _forward(joined, result, width, count, BLOCK: tl.constexpr):
    at, left, right, mask = _halves(joined, width, count, BLOCK)
    value = tl.load(joined + left, mask=mask).to(tl.float32)
    gate = tl.load(joined + right, mask=mask).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * ROOT_HALF))
    tl.store(result + at, (value * gate * share).to(result.dtype.element_ty), mask=mask)


@triton.jit
def _backward(joined, gradient, to_joined, width, count, BLOCK: tl.constexpr):
    at, left, right, mask = _halves(joined, width, count, BLOCK)
    value = tl.load(joined + left, mask=mask).to(tl.float32)
    gate = tl.load(joined + right, mask=mask).to(tl.float32)
    change = tl.load(gradient + at, mask=mask).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * ROOT_HALF))
    slope = share + gate * DENSITY * tl.exp(-0.5 * gate * gate)
    tl.store(to_joined + left, (change * gate * share).to(to_joined.dtype.element_ty), mask=mask)
    tl.store(to_joined + right, (change * value * slope).to(to_joined.dtype.element_ty), mask=mask)


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        joined, width = joined.contiguous(), joined.shape[-1] // 2
        result = joined.new_empty((*joined.shape[:-1], width))
        _forward[(triton.cdiv(result.numel(), BLOCK),)](joined, result, width, result.numel(), BLOCK=BLOCK)
        ctx.save_for_backward(joined)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (joined,), gradient = ctx.saved_tensors, gradients[0].contiguous()
        to_joined, count = torch.empty_like(joined), gradient.numel()
        _backward[(triton.cdiv(count, BLOCK),)](joined, gradient, to_joined, gradient.shape[-1], count, BLOCK=BLOCK)
        return to_joined


def geglu(joined: Tensor) -> Tensor:
    """(..., 2n) to (..., n): the first half times gelu of the second."""
    return _Geglu.apply(joined)
