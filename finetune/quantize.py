"""A frozen base in 4 or 8 bits, through which adapters still learn (QLoRA, 2305.14314)."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from finetune.families.base import Family
from finetune.float8 import Float8Linear

REPEATED = re.compile(r"\.\d+\.")  # within the blocks; what leads in and out of them is small, and errs for all


def quantize(family: Family, to: str) -> None:
    """Give the denoiser and the large text encoders linear layers that are quantised when they are moved.

    Args:
        to: nf4 (4.1 bits a weight) or int8, by bitsandbytes; or fp8.
    """
    for name in (family.denoiser_name, *family.heavy):
        model = getattr(family.pipeline, name)
        if model is not None:
            for layer in layers(model):
                parent, _, child = layer.rpartition(".")
                setattr(model.get_submodule(parent), child, _quantized(model.get_submodule(layer), to, family.dtype))


def layers(model: nn.Module) -> list[str]:
    """The names of the linear layers that are quantised."""
    exact = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and REPEATED.search(name) and not set(name.split(".")) & set(exact)
    ]


def _quantized(layer: Any, to: str, dtype: Any) -> nn.Module:
    if to == "fp8":
        return Float8Linear(layer, dtype)
    import bitsandbytes.nn

    from finetune.nf4 import Linear4bit

    if to == "nf4":
        return Linear4bit(layer, dtype)
    bnb: Any = bitsandbytes.nn
    shape = layer.in_features, layer.out_features, layer.bias is not None
    quantized = bnb.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0, device="meta")
    quantized.weight = bnb.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    quantized.bias = layer.bias
    return quantized.train(layer.training)
