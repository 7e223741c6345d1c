# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: N803
"""Queries or keys of FLUX: RMS normalisation (1910.07467) and then rotary positions (2104.09864), as one operation.

Torch does it in a dozen, half of them in float32.

Shapes: B pictures, T tokens of text and L of the picture, H heads of D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@triton.jit
def _own(batch_stride, token_stride, length, heads, HEADS: tl.constexpr, DEPTH: tl.constexpr):
    """A program's token and picture, and where its values are from there on: (HEADS, DEPTH)."""
    token, picture = tl.program_id(0), tl.program_id(1)
    head, channel = tl.arange(0, HEADS), tl.arange(0, DEPTH)
    start = picture.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    inside = head[:, None] * DEPTH + channel[None, :]
    return token, picture, start + inside, inside, (head < heads)[:, None] & (channel < DEPTH)[None, :], channel


@triton.jit
def _turn(value, cosines, sines, first, token, HEADS: tl.constexpr, DEPTH: tl.constexpr, BACK: tl.constexpr):
    """Pairs of channels turned by the angle of their token, or back: (HEADS, DEPTH)."""
    pair = (first + token).to(tl.int64) * DEPTH + 2 * tl.arange(0, DEPTH // 2)
    cosine, sine = tl.load(cosines + pair), tl.load(sines + pair)
    if BACK:
        sine = -sine
    even, odd = tl.split(tl.reshape(value, (HEADS, DEPTH // 2, 2)))
    return tl.interleave(even * cosine[None, :] - odd * sine[None, :], odd * cosine[None, :] + even * sine[None, :])


@triton.jit
def _forward(x, weight, cosines, sines, y, batch_stride, token_stride, length, heads, first, total, eps,
             HEADS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    token, picture, at, inside, mask, channel = _own(batch_stride, token_stride, length, heads, HEADS, DEPTH)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 1) / DEPTH + eps)
    value = value * inverse[:, None] * tl.load(weight + channel).to(tl.float32)[None, :]
    value = _turn(value, cosines, sines, first, token, HEADS, DEPTH, False)
    line = (picture.to(tl.int64) * total + first + token) * heads * DEPTH
    tl.store(y + line + inside, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(x, weight, cosines, sines, gradient, to_x, batch_stride, token_stride, length, heads, first, total,
              eps, HEADS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """r (g - x r^2 mean(g x)): g the gradient, turned back and times the weight; r the inverse of the root."""
    token, picture, at, inside, mask, channel = _own(batch_stride, token_stride, length, heads, HEADS, DEPTH)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 1) / DEPTH + eps)
    line = (picture.to(tl.int64) * total + first + token) * heads * DEPTH
    change = tl.load(gradient + line + inside, mask=mask, other=0.0).to(tl.float32)
    change = _turn(change, cosines, sines, first, token, HEADS, DEPTH, True)
    change *= tl.load(weight + channel).to(tl.float32)[None, :]
    along = tl.sum(change * value, 1) / DEPTH * inverse * inverse
    result = (change - value * along[:, None]) * inverse[:, None]
    own = (picture.to(tl.int64) * length + token) * heads * DEPTH
    tl.store(to_x + own + inside, result.to(to_x.dtype.element_ty), mask=mask)


class _RotaryNorm(torch.autograd.Function):
    """Parts one after another, with gradients for them alone."""

    @staticmethod
    def forward(ctx: Any, cosines: Tensor, sines: Tensor, eps: float, num_heads: int, *given: Tensor) -> Tensor:
        """`given` are the parts, each with its weight after it."""
        parts, weights = given[::2], given[1::2]
        total, depth = cosines.shape
        y = parts[0].new_empty((len(parts[0]), total, num_heads, depth))
        for x, weight, sizes in _each(parts, weights, total, num_heads):
            _forward[(x.shape[1], len(x))](x, weight, cosines, sines, y, *sizes, eps, **_shape(num_heads, depth))
        ctx.save_for_backward(cosines, sines, *given)
        ctx.settings = eps, num_heads
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cosines, sines, *given = ctx.saved_tensors
        (eps, num_heads), gradient = ctx.settings, gradients[0].contiguous()
        total, depth = cosines.shape
        found: list[Tensor | None] = []
        for x, weight, sizes in _each(given[::2], given[1::2], total, num_heads):
            to_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            known = x, weight, cosines, sines, gradient, to_x
            _backward[(x.shape[1], len(x))](*known, *sizes, eps, **_shape(num_heads, depth))
            found += [to_x, None]
        return None, None, None, None, *found


def _each(parts: Sequence[Tensor], weights: Sequence[Tensor], total: int, num_heads: int) -> Iterator[tuple[Any, ...]]:
    """Each part with its weight, and the sizes that a kernel is told."""
    first = 0
    for x, weight in zip(parts, weights, strict=True):
        yield x, weight, (x.stride(0), x.stride(1), x.shape[1], num_heads, first, total)
        first += x.shape[1]


def _shape(num_heads: int, depth: int) -> dict[str, int]:
    return {"HEADS": triton.next_power_of_2(num_heads), "DEPTH": depth}


def rotary_norm(parts: Sequence[Tensor], norms: Sequence[nn.RMSNorm], rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Text and picture, each normalised by its own layer, one after the other at their places: (B, T + L, H, D).

    Args:
        parts: (B, T, HD) and (B, L, HD), whose channels lie side by side; D is a power of two.
        rotary: the cosines and sines of their angles, (T + L, D) each, where pairs of channels have the same.
    """
    depth = rotary[0].shape[1]
    given = [each for x, norm in zip(parts, norms, strict=True) for each in (x, norm.weight)]
    return _RotaryNorm.apply(*rotary, norms[0].eps, parts[0].shape[-1] // depth, *given)
