"""Frozen linear layers in 4 bits, a quarter as large as in 16: bitsandbytes' NF4 (2305.14314), scales packed too."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import modules
from torch import Tensor, nn

from finetune.gpu import kernels_for
from finetune.packed import Packed


class Linear4bit(Packed, modules.Linear4bit):  # by this name peft knows layers that it has to copy for DoRA
    """A layer that is packed when it is moved for the first time.

    Args:
        layer: what it stands for.
        dtype: what it computes in.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        shape = layer.in_features, layer.out_features, layer.bias is not None
        modules.Linear4bit.__init__(self, *shape, compute_dtype=dtype, quant_type="nf4", device="meta")
        parameter: Any = modules.Params4bit
        self.weight = parameter(layer.weight.data, requires_grad=False, quant_type="nf4", module=self)
        self.support_avx512bf16_for_cpu = False  # repacks the weight in place, and then nothing learns through it
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 # pyright: ignore[reportIncompatibleMethodOverride]
        """(..., n) to (..., m), in the layer's precision."""
        if input.is_cuda and input.numel() == input.shape[-1] and not input.requires_grad:
            return modules.Linear4bit.forward(self, input)  # of one row a product reads the weight as it is
        return Packed.forward(self, input)

    def unpacked(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        packed: Any = self.weight
        state = packed.quant_state
        kernels = kernels_for(packed.data) if state.nested else None
        if kernels is None:
            found = functional.dequantize_4bit(packed.data, state)
            return found.to(dtype) if out is None else out.copy_(found)
        out = torch.empty(state.shape, dtype=dtype, device=packed.device) if out is None else out
        return kernels.unpack_nf4(packed.data, state, out)
