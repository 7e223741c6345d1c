"""A UNet whose pictures keep their channels side by side, in convolutions and between them.

Torch and diffusers move them to one plane for each channel at every normalisation and
after every transformer, and a GPU's convolutions move them back.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from finetune.gpu.geglu import geglu
from finetune.gpu.group_norm import group_norm


class SideBySideNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return group_norm(input, self) if input.is_cuda and input.dim() == 4 else super().forward(input)


class SideBySideResnet(ResnetBlock2D):
    """The usual block: two convolutions of what is normalised, the time between them, and a way around."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not input_tensor.is_cuda:
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden: Tensor = self.conv1(group_norm(input_tensor, self.norm1, silu=True))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(nn.functional.silu(temb))[:, :, None, None]
        hidden = self.conv2(group_norm(hidden, self.norm2, silu=True))
        return hidden + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))


class SideBySideTransformer(Transformer2DModel):
    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        def as_pictures(tokens: Tensor) -> Tensor:
            return tokens.view(batch_size, height, width, -1).permute(0, 3, 1, 2)

        if self.use_linear_projection:
            return as_pictures(self.proj_out(hidden_states)) + residual
        return self.proj_out(as_pictures(hidden_states)) + residual


class FusedGEGLU(GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not hidden_states.is_cuda:
            return super().forward(hidden_states, *args, **kwargs)
        return geglu(self.proj(hidden_states))


def side_by_side(model: nn.Module) -> None:
    """Make a UNet's parts such; what has a form of its own stays as it is."""
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for part in model.modules():
        if type(part) is nn.GroupNorm and part.affine:
            part.__class__ = SideBySideNorm
        elif type(part) is ResnetBlock2D and _is_usual(part):
            part.__class__ = SideBySideResnet
        elif type(part) is Transformer2DModel:
            part.__class__ = SideBySideTransformer
        elif type(part) is GEGLU:
            part.__class__ = FusedGEGLU


def _is_usual(block: Any) -> bool:
    """Whether a block is as in Stable Diffusion."""
    resized, dropped = block.upsample is not None or block.downsample is not None, block.dropout.p
    timed = block.time_emb_proj is None or (block.time_embedding_norm == "default" and not block.skip_time_act)
    silu = isinstance(block.nonlinearity, nn.SiLU)
    return silu and timed and not resized and not dropped and block.output_scale_factor == 1
