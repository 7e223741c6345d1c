# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: N803
"""Group normalisation (1803.08494) of pictures whose channels lie side by side, as a GPU's convolutions want them.

Torch's own moves each picture to one plane for each channel and back: a quarter of a
small step of Stable Diffusion. What mostly follows it, silu(z) = z sigmoid(z), is done on the way.

Shapes: B pictures, C channels in groups of `size`, P places (height times width), S shares in which
the places are worked through. A program of a kernel sees one share of whole groups of one picture.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHANNELS = 64  # that a program takes where groups are smaller, so that it does not read in shreds
PLACES = tl.constexpr(32)  # that it takes at a time
PROGRAMS = 512  # that keep a GPU busy
MOST = 64  # shares


@triton.jit
def _own(num_channels, size, BLOCK: tl.constexpr, TAKEN: tl.constexpr):
    """A program's channels, which of them there are, and their groups: (BLOCK,) each."""
    offset = tl.arange(0, BLOCK)
    channels = tl.program_id(2) * TAKEN + offset
    return channels, (offset < TAKEN) & (channels < num_channels), channels // size


@triton.jit
def _at(row, end, places, num_channels, channels, present):
    """Where the next places are in (B, P, C), and which there are: (PLACES, BLOCK)."""
    rows = row + tl.arange(0, PLACES)
    first = tl.program_id(1).to(tl.int64) * places
    return (first + rows[:, None]) * num_channels + channels[None, :], (rows < end)[:, None] & present[None, :]


@triton.jit
def _keep(sums, values, num_channels, channels, present):
    """Write a share's sums into (B, S, C)."""
    line = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + line * num_channels + channels, values, mask=present)


@triton.jit
def _total(sums, num_channels, channels, present, SHARES: tl.constexpr):
    """Over the shares of (B, S, C)."""
    share = tl.arange(0, SHARES)
    lines = tl.program_id(1) * tl.num_programs(0) + share
    mask = (share < tl.num_programs(0))[:, None] & present[None, :]
    return tl.sum(tl.load(sums + lines[:, None] * num_channels + channels[None, :], mask=mask, other=0.0), 0)


@triton.jit
def _over_groups(values, group):
    """Each channel's value becomes the sum over its group."""
    return tl.sum(tl.where(group[:, None] == group[None, :], values[None, :], 0.0), 1)


@triton.jit
def _pivot(x, places, num_channels, group, size, present):
    """A value near each group's mean: squares of what is left lose nothing to rounding."""
    first = tl.program_id(1).to(tl.int64) * places * num_channels
    return tl.load(x + first + group * size, mask=present, other=0.0).to(tl.float32)


@triton.jit
def _moments(x, sums, squares, num_channels, places, size, length,
             BLOCK: tl.constexpr, TAKEN: tl.constexpr):  # fmt: skip
    """Of x less its group's pivot."""
    channels, present, group = _own(num_channels, size, BLOCK, TAKEN)
    pivot = _pivot(x, places, num_channels, group, size, present)
    start = tl.program_id(0) * length
    end = tl.minimum(start + length, places)
    total, square = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(start, end, PLACES):
        at, mask = _at(row, end, places, num_channels, channels, present)
        value = tl.where(mask, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - pivot[None, :], 0.0)
        total += tl.sum(value, 0)
        square += tl.sum(value * value, 0)
    _keep(sums, total, num_channels, channels, present)
    _keep(squares, square, num_channels, channels, present)


@triton.jit
def _forward(x, weight, bias, sums, squares, y, mean, rstd, num_channels, places, size, length, eps,
             BLOCK: tl.constexpr, TAKEN: tl.constexpr, SHARES: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """y = (x - mean) rstd weight + bias; mean and rstd are kept for each channel: (B, C)."""
    channels, present, group = _own(num_channels, size, BLOCK, TAKEN)
    count = (places * size).to(tl.float32)
    off = _over_groups(_total(sums, num_channels, channels, present, SHARES), group) / count
    square = _over_groups(_total(squares, num_channels, channels, present, SHARES), group) / count
    middle = _pivot(x, places, num_channels, group, size, present) + off
    inverse = 1.0 / tl.sqrt(tl.maximum(square - off * off, 0.0) + eps)
    if tl.program_id(0) == 0:
        line = tl.program_id(1) * num_channels
        tl.store(mean + line + channels, middle, mask=present)
        tl.store(rstd + line + channels, inverse, mask=present)
    factor = inverse * tl.load(weight + channels, mask=present, other=0.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=present, other=0.0).to(tl.float32)
    start = tl.program_id(0) * length
    end = tl.minimum(start + length, places)
    for row in range(start, end, PLACES):
        at, mask = _at(row, end, places, num_channels, channels, present)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - middle[None, :]
        value = value * factor[None, :] + shift[None, :]
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _before_silu(change, z):
    """The gradient of z from that of silu(z)."""
    gate = tl.sigmoid(z)
    return change * gate * (1.0 + z * (1.0 - gate))


@triton.jit
def _gradient_sums(x, gradient, weight, bias, mean, rstd, sums, products, num_channels, places, size, length,
                   BLOCK: tl.constexpr, TAKEN: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Of the gradient g, and of g times the normalised x."""
    channels, present, _ = _own(num_channels, size, BLOCK, TAKEN)
    line = tl.program_id(1) * num_channels
    middle = tl.load(mean + line + channels, mask=present, other=0.0)
    inverse = tl.load(rstd + line + channels, mask=present, other=0.0)
    factor = tl.load(weight + channels, mask=present, other=0.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=present, other=0.0).to(tl.float32)
    start = tl.program_id(0) * length
    end = tl.minimum(start + length, places)
    total, product = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(start, end, PLACES):
        at, mask = _at(row, end, places, num_channels, channels, present)
        normal = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - middle[None, :]) * inverse[None, :]
        change = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            change = _before_silu(change, normal * factor[None, :] + shift[None, :])
        total += tl.sum(change, 0)
        product += tl.sum(change * normal, 0)
    _keep(sums, total, num_channels, channels, present)
    _keep(products, product, num_channels, channels, present)


@triton.jit
def _backward(x, gradient, weight, bias, mean, rstd, sums, products, to_x, num_channels, places, size, length,
              BLOCK: tl.constexpr, TAKEN: tl.constexpr, SHARES: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """rstd (w g - mean(w g) - n mean(w g n)): means over a group, n the normalised x, w the weight."""
    channels, present, group = _own(num_channels, size, BLOCK, TAKEN)
    count = (places * size).to(tl.float32)
    factor = tl.load(weight + channels, mask=present, other=0.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=present, other=0.0).to(tl.float32)
    even = _over_groups(factor * _total(sums, num_channels, channels, present, SHARES), group) / count
    along = _over_groups(factor * _total(products, num_channels, channels, present, SHARES), group) / count
    line = tl.program_id(1) * num_channels
    middle = tl.load(mean + line + channels, mask=present, other=0.0)
    inverse = tl.load(rstd + line + channels, mask=present, other=0.0)
    start = tl.program_id(0) * length
    end = tl.minimum(start + length, places)
    for row in range(start, end, PLACES):
        at, mask = _at(row, end, places, num_channels, channels, present)
        normal = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - middle[None, :]) * inverse[None, :]
        change = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            change = _before_silu(change, normal * factor[None, :] + shift[None, :])
        result = (change * factor[None, :] - even[None, :] - normal * along[None, :]) * inverse[None, :]
        tl.store(to_x + at, result.to(to_x.dtype.element_ty), mask=mask)


class _Plan:
    """How (B, P, C) is shared out."""

    def __init__(self, x: Tensor, num_groups: int):
        batch, channels, height, width = x.shape
        places, size = height * width, channels // num_groups
        taken = size * max(1, CHANNELS // size)
        blocks = triton.cdiv(channels, taken)
        shares = min(MOST, triton.cdiv(places, PLACES.value), triton.cdiv(PROGRAMS, batch * blocks))
        length = triton.cdiv(triton.cdiv(places, shares), PLACES.value) * PLACES.value
        self.grid = (triton.cdiv(places, length), batch, blocks)
        self.sums = x.new_empty((2, batch, self.grid[0], channels), dtype=torch.float32)
        self.sizes = (channels, places, size, length)
        self.block = {"BLOCK": triton.next_power_of_2(taken), "TAKEN": taken}
        self.shares = {"SHARES": triton.next_power_of_2(self.grid[0])}


class _GroupNorm(torch.autograd.Function):
    """(B, C, H, W) to the same; the statistics are float32, whatever x is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        plan, y = _Plan(x, num_groups), torch.empty_like(x)
        mean, rstd = x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
        _moments[plan.grid](x, *plan.sums, *plan.sizes, **plan.block)
        known = x, weight, bias, *plan.sums, y, mean, rstd
        _forward[plan.grid](*known, *plan.sizes, eps, **plan.block, **plan.shares, SILU=silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.settings = num_groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        num_groups, silu = ctx.settings
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        plan, to_x = _Plan(x, num_groups), torch.empty_like(x)
        known = x, gradient, weight, bias, mean, rstd, *plan.sums
        _gradient_sums[plan.grid](*known, *plan.sizes, **plan.block, SILU=silu)
        _backward[plan.grid](*known, to_x, *plan.sizes, **plan.block, **plan.shares, SILU=silu)
        if not ctx.needs_input_grad[1]:
            return to_x, None, None, None, None, None
        to_bias, to_weight = plan.sums.sum((1, 2)).to(weight.dtype)
        return to_x, to_weight, to_bias, None, None, None


def group_norm(x: Tensor, layer: nn.GroupNorm, *, silu: bool = False) -> Tensor:
    """What the layer makes of pictures (B, C, H, W), in their own precision, and silu of that if asked for."""
    return _GroupNorm.apply(x, layer.weight, layer.bias, layer.num_groups, layer.eps, silu)
