"""What is faster on a GPU than in torch. Everything here computes what torch computes."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import reason, warn
from finetune.exact import is_exact

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself understands it


def make_ready(denoiser: nn.Module) -> None:
    """Have a denoiser that is on a GPU train as fast as it can there."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    is_unet, is_flux = (isinstance(denoiser, kind) for kind in (UNet2DConditionModel, FluxTransformer2DModel))
    if is_unet and has_kernels():
        from finetune.gpu.unet import side_by_side

        side_by_side(denoiser)
    if is_flux and has_kernels():
        from finetune.gpu.flux import lean

        lean(denoiser)
    torch.backends.cuda.enable_cudnn_sdp(is_unet)  # for others see flux.py


def runs(x: Tensor) -> bool:
    """Whether kernels run where a tensor is: on a GPU, and anywhere in Triton's interpreter.

    Not for the few float32 predictions of a comparison, which would have to wait until they are compiled.
    """
    return (x.is_cuda or INTERPRETED) and not is_exact()


def kernels_for(x: Tensor) -> Any:
    """Those that unpack weights where a tensor is; None where none run."""
    if not runs(x) or not has_kernels():
        return None
    from finetune.gpu import unpack

    return unpack


@cache
def has_kernels() -> bool:
    """Whether Triton is there and works, for which it wants a compiler; a process asks it once."""
    if find_spec("triton") is None:
        return False
    if torch.cuda.is_available() and not INTERPRETED:
        from finetune.gpu.geglu import geglu

        try:
            geglu(torch.zeros(1, 2, device="cuda"))
        except Exception as error:  # it fails in as many ways as there are compilers
            warn(f"the GPU's own kernels are left out, as Triton does not work here: {reason(error)}")
            return False
    return True
