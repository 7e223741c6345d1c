# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: N803
"""Packed weights as numbers by one kernel each, as fast as memory gives and takes them.

Shapes: m outputs, n inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
SHIFT = 2.0**8  # between the exponents of e4m3 and of float16


@triton.jit
def _float8(packed, scales, result, width, count, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    byte = tl.load(packed + at, mask=mask, other=0).to(tl.int32)
    # The bits of a float16, which every GPU knows; its subnormals are e4m3's.
    half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    scale = tl.load(scales + at // width, mask=mask, other=0.0) * shift
    tl.store(result + at, (half.to(tl.float32) * scale).to(result.dtype.element_ty), mask=mask)


def unpack_float8(packed: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Bytes of e4m3 (m, n), each row times its scale (m, 1), into `out`."""
    count = packed.numel()
    grid = (triton.cdiv(count, 2 * BLOCK),)
    _float8[grid](packed, scales, out, packed.shape[1], count, SHIFT, BLOCK=2 * BLOCK)
    return out


@triton.jit
def _nf4(
    packed, code, absmax, absmax_code, absmax_scale, offset, result, count, KEPT: tl.constexpr, SCALED: tl.constexpr,
    NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    byte = tl.load(packed + at, mask=mask, other=0).to(tl.int32)
    group = 2 * at // SCALED
    scale = tl.load(absmax_code + tl.load(absmax + group, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0)
    scale = scale * tl.load(absmax_scale + group // NESTED, mask=mask, other=0.0) + tl.load(offset)
    first = (tl.load(code + (byte >> 4)) * scale).to(KEPT)
    second = (tl.load(code + (byte & 0xF)) * scale).to(KEPT)
    both = tl.interleave(first, second).to(result.dtype.element_ty)
    places = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(result + places, both, mask=places < 2 * count)


def unpack_nf4(packed: Tensor, state: Any, out: Tensor) -> Tensor:
    """Pairs of NF4's numbers, scaled in groups whose scales are packed too, into `out`: (m, n).

    Args:
        state: bitsandbytes' `QuantState`.
    """
    scales = state.state2
    kept = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[state.dtype]
    _nf4[(triton.cdiv(packed.numel(), BLOCK),)](
        packed, state.code, state.absmax, scales.code, scales.absmax, state.offset, out, packed.numel(), KEPT=kept,
        SCALED=state.blocksize, NESTED=scales.blocksize, BLOCK=BLOCK,
    )  # fmt: skip
    return out
