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

# What kernels are compiled for is the same for nearly all layers: each compilation takes half a second of a first run.
CHANNELS = 64  # that a program takes where groups are smaller, so that it does not read in shreds
PLACES = tl.constexpr(128)  # that it takes at a time
PROGRAMS = 1024  # that keep a GPU busy
FEW, ENOUGH = 256, 128  # places that a program works through alone where there are so many programs
MOST = tl.constexpr(64)  # shares


@triton.jit
def _own(num_channels, size, BLOCK: tl.constexpr, TAKEN: tl.constexpr):
    """A program's channels, which of them there are, and their groups: (BLOCK,) each."""
    offset = tl.arange(0, BLOCK)
    channels = tl.program_id(2) * TAKEN + offset
    return channels, (offset < TAKEN) & (channels < num_channels), channels // size


@triton.jit
def _share(places, length):
    """The first of a program's places, and the one after its last."""
    start = tl.program_id(0) * length
    return start, tl.minimum(start + length, places)


@triton.jit
def _at(row, end, places, num_channels, channels, present):
    """Where the next places are in (B, P, C), and which there are: (PLACES, BLOCK)."""
    rows = row + tl.arange(0, PLACES)
    first = tl.program_id(1).to(tl.int64) * places
    return (first + rows[:, None]) * num_channels + channels[None, :], (rows < end)[:, None] & present[None, :]


@triton.jit
def _of_channels(values, channels, present):
    """(C,)"""
    return tl.load(values + channels, mask=present, other=0.0).to(tl.float32)


@triton.jit
def _of_picture(values, num_channels, channels, present):
    """A picture's part of (B, C)."""
    return tl.load(values + tl.program_id(1) * num_channels + channels, mask=present, other=0.0).to(tl.float32)


@triton.jit
def _keep(sums, values, num_channels, channels, present):
    """Write a share's sums into (B, S, C)."""
    line = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + line * num_channels + channels, values, mask=present)


@triton.jit
def _total(sums, num_channels, channels, present):
    """Over the shares of (B, S, C)."""
    share = tl.arange(0, MOST)
    lines = tl.program_id(1) * tl.num_programs(0) + share
    mask = (share < tl.num_programs(0))[:, None] & present[None, :]
    return tl.sum(tl.load(sums + lines[:, None] * num_channels + channels[None, :], mask=mask, other=0.0), 0)


@triton.jit
def _over_groups(values, group):
    """Each channel's value becomes the sum over its group."""
    return tl.sum(tl.where(group[:, None] == group[None, :], values[None, :], 0.0), 1)


@triton.jit
def _pivot(x, shift, num_channels, places, group, size, present, shifted):
    """A value near each group's mean: squares of what is left lose nothing to rounding."""
    first = tl.program_id(1).to(tl.int64) * places * num_channels
    value = tl.load(x + first + group * size, mask=present, other=0.0).to(tl.float32)
    return value + _of_picture(shift, num_channels, group * size, present & shifted)


@triton.jit
def _moment_sums(x, below, num_channels, places, length, channels, present, BLOCK: tl.constexpr):
    """Of x less what is `below` it in each channel, and of its square."""
    start, end = _share(places, length)
    total, square = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(start, end, PLACES):
        at, mask = _at(row, end, places, num_channels, channels, present)
        value = tl.where(mask, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - below[None, :], 0.0)
        total += tl.sum(value, 0)
        square += tl.sum(value * value, 0)
    return total, square


@triton.jit
def _moments(x, shift, sums, squares, shifted, num_channels, places, size, length,
             BLOCK: tl.constexpr, TAKEN: tl.constexpr):  # fmt: skip
    """Of x less its group's pivot."""
    channels, present, group = _own(num_channels, size, BLOCK, TAKEN)
    below = _pivot(x, shift, num_channels, places, group, size, present, shifted)
    below -= _of_picture(shift, num_channels, channels, present & shifted)
    total, square = _moment_sums(x, below, num_channels, places, length, channels, present, BLOCK)
    _keep(sums, total, num_channels, channels, present)
    _keep(squares, square, num_channels, channels, present)


@triton.jit
def _forward(x, shift, weight, bias, sums, squares, y, mean, rstd, shifted, silu,
             num_channels, places, size, length, eps,
             BLOCK: tl.constexpr, TAKEN: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """y = (x + shift - mean) rstd weight + bias; mean less shift, and rstd, are kept for each channel: (B, C)."""
    channels, present, group = _own(num_channels, size, BLOCK, TAKEN)
    count = (places * size).to(tl.float32)
    pivot = _pivot(x, shift, num_channels, places, group, size, present, shifted)
    own = _of_picture(shift, num_channels, channels, present & shifted)
    if ALONE:  # and so nobody has summed anything up yet
        total, square = _moment_sums(x, pivot - own, num_channels, places, length, channels, present, BLOCK)
    else:
        total = _total(sums, num_channels, channels, present)
        square = _total(squares, num_channels, channels, present)
    off = _over_groups(total, group) / count
    middle = pivot + off - own
    inverse = 1.0 / tl.sqrt(tl.maximum(_over_groups(square, group) / count - off * off, 0.0) + eps)
    if tl.program_id(0) == 0:
        line = tl.program_id(1) * num_channels
        tl.store(mean + line + channels, middle, mask=present)
        tl.store(rstd + line + channels, inverse, mask=present)
    factor, base = inverse * _of_channels(weight, channels, present), _of_channels(bias, channels, present)
    start, end = _share(places, length)
    for row in range(start, end, PLACES):
        at, mask = _at(row, end, places, num_channels, channels, present)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - middle[None, :]
        value = value * factor[None, :] + base[None, :]
        if silu:
            value = value * tl.sigmoid(value)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _normal_and_change(x, gradient, at, mask, middle, inverse, factor, base, silu):
    """The normalised x, and the gradient of what silu is given: (PLACES, BLOCK) each."""
    normal = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - middle[None, :]) * inverse[None, :]
    change = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    if silu:
        z = normal * factor[None, :] + base[None, :]
        gate = tl.sigmoid(z)
        change = change * gate * (1.0 + z * (1.0 - gate))
    return normal, change


@triton.jit
def _change_sums(x, gradient, middle, inverse, factor, base, silu, num_channels, places, length, channels, present,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Of the gradient g, and of g times the normalised x."""
    start, end = _share(places, length)
    total, product = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(start, end, PLACES):
        at, mask = _at(row, end, places, num_channels, channels, present)
        normal, change = _normal_and_change(x, gradient, at, mask, middle, inverse, factor, base, silu)
        total += tl.sum(change, 0)
        product += tl.sum(change * normal, 0)
    return total, product


@triton.jit
def _gradient_sums(x, gradient, weight, bias, mean, rstd, sums, products, silu, num_channels, places, size, length,
                   BLOCK: tl.constexpr, TAKEN: tl.constexpr):  # fmt: skip
    channels, present, _ = _own(num_channels, size, BLOCK, TAKEN)
    middle = _of_picture(mean, num_channels, channels, present)
    inverse = _of_picture(rstd, num_channels, channels, present)
    factor, base = _of_channels(weight, channels, present), _of_channels(bias, channels, present)
    total, product = _change_sums(x, gradient, middle, inverse, factor, base, silu, num_channels, places, length,
                                  channels, present, BLOCK)  # fmt: skip
    _keep(sums, total, num_channels, channels, present)
    _keep(products, product, num_channels, channels, present)


@triton.jit
def _backward(x, gradient, weight, bias, mean, rstd, sums, products, to_x, silu, num_channels, places, size, length,
              BLOCK: tl.constexpr, TAKEN: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """rstd (w g - mean(w g) - n mean(w g n)): means over a group, n the normalised x, w the weight."""
    channels, present, group = _own(num_channels, size, BLOCK, TAKEN)
    count = (places * size).to(tl.float32)
    middle = _of_picture(mean, num_channels, channels, present)
    inverse = _of_picture(rstd, num_channels, channels, present)
    factor, base = _of_channels(weight, channels, present), _of_channels(bias, channels, present)
    if ALONE:  # and so nobody has summed anything up yet, for weight and bias neither
        total, product = _change_sums(x, gradient, middle, inverse, factor, base, silu, num_channels, places, length,
                                      channels, present, BLOCK)  # fmt: skip
        _keep(sums, total, num_channels, channels, present)
        _keep(products, product, num_channels, channels, present)
    else:
        total = _total(sums, num_channels, channels, present)
        product = _total(products, num_channels, channels, present)
    even, along = _over_groups(factor * total, group) / count, _over_groups(factor * product, group) / count
    start, end = _share(places, length)
    for row in range(start, end, PLACES):
        at, mask = _at(row, end, places, num_channels, channels, present)
        normal, change = _normal_and_change(x, gradient, at, mask, middle, inverse, factor, base, silu)
        result = (change * factor[None, :] - even[None, :] - normal * along[None, :]) * inverse[None, :]
        tl.store(to_x + at, result.to(to_x.dtype.element_ty), mask=mask)


class _Plan:
    """How (B, P, C) is shared out."""

    def __init__(self, x: Tensor, num_groups: int):
        batch, channels, height, width = x.shape
        places, size = height * width, channels // num_groups
        taken = size * max(1, CHANNELS // size)
        blocks, parts = triton.cdiv(channels, taken), triton.cdiv(places, PLACES.value)
        shares = min(MOST.value, parts, triton.cdiv(PROGRAMS, batch * blocks))
        if places <= FEW and batch * blocks >= ENOUGH:  # a second one would take longer to start
            shares = 1
        length = triton.cdiv(parts, shares) * PLACES.value
        self.grid = (triton.cdiv(places, length), batch, blocks)
        self.sums = x.new_empty((2, batch, self.grid[0], channels), dtype=torch.float32)
        self.sizes = (channels, places, size, length)
        self.alone = self.grid[0] == 1
        self.block = {"BLOCK": triton.next_power_of_2(taken), "TAKEN": taken}


class _GroupNorm(torch.autograd.Function):
    """(B, C, H, W) to the same; the statistics are float32, whatever x is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        plan, y = _Plan(x, num_groups), torch.empty_like(x)
        mean, rstd = x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
        shifted = shift is not None
        known = x, shift.contiguous() if shifted else x
        if not plan.alone:
            _moments[plan.grid](*known, *plan.sums, shifted, *plan.sizes, **plan.block)
        found = *plan.sums, y, mean, rstd
        _forward[plan.grid](
            *known, weight, bias, *found, shifted, silu, *plan.sizes, eps, **plan.block, ALONE=plan.alone
        )
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
        if not plan.alone:
            _gradient_sums[plan.grid](*known, silu, *plan.sizes, **plan.block)
        _backward[plan.grid](*known, to_x, silu, *plan.sizes, **plan.block, ALONE=plan.alone)
        to_bias, to_weight = plan.sums.sum((1, 2)).to(weight.dtype) if ctx.needs_input_grad[2] else (None, None)
        return to_x, None, to_weight, to_bias, None, None, None


def group_norm(x: Tensor, layer: nn.GroupNorm, *, silu: bool = False, shift: Tensor | None = None) -> Tensor:
    """What the layer makes of pictures (B, C, H, W), in their own precision, and silu of that if asked for.

    Args:
        shift: (B, C), added to the pictures before; it gets no gradient.
    """
    return _GroupNorm.apply(x, shift, layer.weight, layer.bias, layer.num_groups, layer.eps, silu)
