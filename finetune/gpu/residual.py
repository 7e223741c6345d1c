# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: N803
"""Two pictures and a convolution's bias added up as one operation, where channels lie side by side."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _sum(a, b, bias, result, width, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    value = tl.load(a + at, mask=mask).to(tl.float32) + tl.load(b + at, mask=mask).to(tl.float32)
    value += tl.load(bias + at % width, mask=mask).to(tl.float32)
    tl.store(result + at, value.to(result.dtype.element_ty), mask=mask)


class _Add(torch.autograd.Function):
    """(B, C, H, W) twice, and (C,), to (B, C, H, W); the bias gets no gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        a, b = (each.contiguous(memory_format=torch.channels_last) for each in (a, b))
        result = torch.empty_like(a)
        _sum[(triton.cdiv(a.numel(), BLOCK),)](a, b, bias, result, a.shape[1], a.numel(), BLOCK=BLOCK)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0], gradients[0], None


def add(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """`a + b + bias`: pictures (B, C, H, W) of one precision, and the frozen bias (C,)."""
    return _Add.apply(a, b, bias)
