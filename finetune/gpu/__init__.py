"""What is faster on a GPU than in torch. Everything here computes what torch computes."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn


def make_ready(denoiser: nn.Module) -> None:
    """Have a denoiser that is on a GPU train as fast as it can there."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    is_unet = isinstance(denoiser, UNet2DConditionModel)
    # cuDNN's attention is faster, but going back through FLUX's it reads where it may not (seen with cuDNN 9.19).
    torch.backends.cuda.enable_cudnn_sdp(is_unet)
    if is_unet and find_spec("triton") is not None:
        from finetune.gpu.unet import side_by_side

        side_by_side(denoiser)
