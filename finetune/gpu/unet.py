"""A UNet whose pictures keep their channels side by side, in convolutions and between them.

Torch and diffusers move them to one plane for each channel at every normalisation and
after every transformer, and a GPU's convolutions move them back. What stands between
two products is one operation where the weights of it are frozen.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from finetune.gpu import runs
from finetune.gpu.geglu import geglu
from finetune.gpu.group_norm import group_norm
from finetune.gpu.layer_norm import add_and_normalise
from finetune.gpu.residual import add


class SideBySideNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return group_norm(input, self) if runs(input) and input.dim() == 4 else super().forward(input)


class SideBySideResnet(ResnetBlock2D):
    """The usual block: two convolutions of what is normalised, the time between them, and a way around.

    Biases of frozen convolutions are added by what reads the result.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not runs(input_tensor):
            return super().forward(input_tensor, temb, *args, **kwargs)
        first, second, around = cast(Any, (self.conv1, self.conv2, self.conv_shortcut))
        hidden = group_norm(input_tensor, self.norm1, silu=True)
        time = None if self.time_emb_proj is None else self.time_emb_proj(nn.functional.silu(temb))
        if _is_bare(first, hidden) and (time is None or not time.requires_grad):
            shift = first.bias.expand(len(hidden), -1) if time is None else time + first.bias
            hidden = group_norm(_without_bias(first, hidden), self.norm2, silu=True, shift=shift)
        else:
            hidden = first(hidden) if time is None else first(hidden) + time[:, :, None, None]
            hidden = group_norm(hidden, self.norm2, silu=True)
        if not _is_bare(second, hidden) or not (around is None or _is_bare(around, hidden)):
            return second(hidden) + (input_tensor if around is None else around(input_tensor))
        bias = second.bias if around is None else second.bias + around.bias
        other = input_tensor if around is None else _without_bias(around, input_tensor)
        return add(_without_bias(second, hidden), other, bias)


def _is_bare(layer: nn.Module, x: Tensor) -> bool:
    """Whether a convolution has nothing around it, and a bias that nobody trains; hooks change its precision."""
    if type(layer) is not nn.Conv2d or layer.bias is None or layer.bias.requires_grad:
        return False
    return layer.weight.dtype == x.dtype


def _without_bias(layer: Any, x: Tensor) -> Tensor:
    return nn.functional.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


class SideBySideTransformer(Transformer2DModel):
    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        height = hidden_states.shape[2]
        tokens = _project(self.proj_in, self.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2), height)
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        tokens = _project(self.proj_out, hidden_states, height)
        return tokens.view(batch_size, height, width, -1).permute(0, 3, 1, 2) + residual


def _project(layer: nn.Module, tokens: Tensor, height: int) -> Tensor:
    """(B, HW, n) to (B, HW, m): a convolution of single places is a product of matrices, which adds the bias."""
    if type(layer) is nn.Conv2d and layer.weight.dtype == tokens.dtype:
        return nn.functional.linear(tokens, layer.weight.flatten(1), layer.bias)
    if isinstance(layer, nn.Linear):
        return layer(tokens)
    pictures = tokens.unflatten(1, (height, -1)).permute(0, 3, 1, 2)
    return layer(pictures).permute(0, 2, 3, 1).flatten(1, 2)


class SideBySideBlock(BasicTransformerBlock):
    """Attention to the picture, attention to the text, and the feed-forward layer, each of what is normalised."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if not runs(hidden_states) or cross_attention_kwargs:
            given = hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep
            return super().forward(*given, cross_attention_kwargs, *args, **kwargs)
        x, normed = _add_and_normalise(hidden_states, None, self.norm1)
        x, normed = _add_and_normalise(x, self.attn1(normed, attention_mask=attention_mask), self.norm2)
        second: Any = self.attn2
        found = second(normed, encoder_hidden_states, attention_mask=encoder_attention_mask)
        x, normed = _add_and_normalise(x, found, self.norm3)
        return self.ff(normed) + x


def _add_and_normalise(x: Tensor, added: Tensor | None, layer: Any) -> tuple[Tensor, Tensor]:
    return add_and_normalise(x, layer.weight, layer.bias, layer.eps, added=added)


class PlainAttention(AttnProcessor2_0):
    """diffusers' own without what a UNet's attention does not do: it divides each answer by 1."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None or not runs(hidden_states):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        asked = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in asked)
        found = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](found))


class FusedGEGLU(GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not runs(hidden_states):
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
        elif type(part) is Transformer2DModel and part.is_input_continuous:
            part.__class__ = SideBySideTransformer
        elif type(part) is BasicTransformerBlock and _is_of_three(part):
            part.__class__ = SideBySideBlock
        elif type(part) is Attention and _is_plain(part):
            part.set_processor(cast(Any, PlainAttention()))
        elif type(part) is GEGLU:
            part.__class__ = FusedGEGLU


def _is_usual(block: Any) -> bool:
    """Whether a block is as in Stable Diffusion."""
    resized, dropped = block.upsample is not None or block.downsample is not None, block.dropout.p
    timed = block.time_emb_proj is None or (block.time_embedding_norm == "default" and not block.skip_time_act)
    silu = isinstance(block.nonlinearity, nn.SiLU)
    return silu and timed and not resized and not dropped and block.output_scale_factor == 1


def _is_of_three(block: Any) -> bool:
    norms = (block.norm1, block.norm2, block.norm3)
    usual = all(type(norm) is nn.LayerNorm and norm.elementwise_affine for norm in norms)
    only = block.pos_embed is not None or block.only_cross_attention or block._chunk_size is not None
    return block.norm_type == "layer_norm" and usual and not only and not hasattr(block, "fuser")


def _is_plain(attn: Any) -> bool:
    normed = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    same = attn.rescale_output_factor == 1 and not attn.residual_connection
    return type(attn.processor) is AttnProcessor2_0 and same and not any(normed)
