"""FLUX's blocks with fewer passes over their tokens: what stands between two products of matrices is one operation.

Shapes: B pictures, T tokens of text, L of the picture, n channels in heads of D.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune.gpu import runs
from finetune.gpu.layer_norm import add_and_normalise
from finetune.gpu.rotary import rotary_norm

MOST = 65504.0  # in float16
# cuDNN's is twice as fast as the others. It is not used elsewhere in FLUX: going back through what diffusers gives it,
# it read where it may not (seen with cuDNN 9.19); what lies whole in memory it was always right with.
KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class LeanDoubleBlock(FluxTransformerBlock):
    """Text and picture attend to each other, and each goes its own way for the rest."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _can(self.attn, hidden_states, image_rotary_emb, joint_attention_kwargs):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        picture, text = hidden_states, encoder_hidden_states
        normed, gate, *after = _modulated(picture, self.norm1, temb)
        text_normed, text_gate, *text_after = _modulated(text, self.norm1_context, temb)
        attn = self.attn
        # Layers that read the same are asked one after another, so that one operation can answer for all.
        asked = [attn.to_q(normed), attn.to_k(normed), attn.to_v(normed)]
        text_asked = [attn.add_q_proj(text_normed), attn.add_k_proj(text_normed), attn.add_v_proj(text_normed)]
        norms = (attn.norm_added_q, attn.norm_q), (attn.norm_added_k, attn.norm_k)
        query, key = (
            rotary_norm(pair, norm, image_rotary_emb)
            for pair, norm in zip(zip(text_asked[:2], asked[:2], strict=True), norms, strict=True)
        )
        found = _attend(query, key, torch.cat([text_asked[2], asked[2]], dim=1))
        text_found, found = found.split([text.shape[1], picture.shape[1]], dim=1)
        found, text_found = attn.to_out[0](found.contiguous()), attn.to_add_out(text_found.contiguous())
        picture = _go_on(picture, found, gate, after, self.norm2.eps, self.ff)
        text = _go_on(text, text_found, text_gate, text_after, self.norm2_context.eps, self.ff_context)
        return text.clip(-MOST, MOST) if text.dtype == torch.float16 else text, picture


class LeanSingleBlock(FluxSingleTransformerBlock):
    """Text and picture in one, and the feed-forward layer beside the attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _can(self.attn, hidden_states, image_rotary_emb, joint_attention_kwargs):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        length, joint, attn = encoder_hidden_states.shape[1], _joined(encoder_hidden_states, hidden_states), self.attn
        normed, gate = _modulated(joint, self.norm, temb)
        query, key, value = attn.to_q(normed), attn.to_k(normed), attn.to_v(normed)
        query, key = (
            rotary_norm([x], [norm], image_rotary_emb) for x, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )
        found = _of_both(self.proj_out, _attend(query, key, value), self.act_mlp(self.proj_mlp(normed)))
        joint = torch.addcmul(joint, gate[:, None], found)
        joint = joint.clip(-MOST, MOST) if joint.dtype == torch.float16 else joint
        return joint[:, :length], joint[:, length:]


def _can(attn: FluxAttention, x: Tensor, rotary: Any, more: dict[str, Any] | None) -> bool:
    """Whether a block is asked for what is usual, where kernels run."""
    depth = attn.head_dim
    frozen = not any(part.requires_grad for norm in _norms(attn) for part in norm.parameters())
    usual = type(attn.processor) is FluxAttnProcessor and rotary is not None and not more and not attn.fused_projections
    return runs(x) and not torch.is_autocast_enabled("cuda") and usual and frozen and depth & (depth - 1) == 0


def _norms(attn: FluxAttention) -> list[nn.RMSNorm]:
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    return [norm for name in names if (norm := getattr(attn, name, None)) is not None]


def _modulated(x: Tensor, norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """x normalised, scaled and shifted, and what is left of the modulation: (B, n) each."""
    shift, scale, *rest = norm.linear(norm.silu(temb)).chunk(6 if isinstance(norm, AdaLayerNormZero) else 3, dim=1)
    return add_and_normalise(x, 1 + scale, shift, norm.norm.eps)[1], *rest


def _go_on(x: Tensor, found: Tensor, gate: Tensor, after: list[Tensor], eps: float, feed_forward: nn.Module) -> Tensor:
    """What attention found is added, and what the feed-forward layer makes of the sum."""
    shift, scale, last = after
    x, normed = add_and_normalise(x, 1 + scale, shift, eps, added=found, gate=gate)
    return torch.addcmul(x, last[:, None], feed_forward(normed))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, T + L, H, D) twice and (B, T + L, n) to (B, T + L, n)."""
    value = value.unflatten(-1, query.shape[2:])
    query, key, value = (part.transpose(1, 2) for part in (query, key, value.contiguous()))
    with sdpa_kernel(KERNELS):
        found = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    if found.requires_grad:
        found.register_hook(Tensor.contiguous)  # of what is laid beside something else the gradient is not whole
    return found


def _joined(text: Tensor, picture: Tensor) -> Tensor:
    """(B, T, n) and (B, L, n) to (B, T + L, n): what the block before has parted is still there whole."""
    whole, length = text._base, text.shape[1]
    if whole is None or whole is not picture._base or not whole.is_contiguous():
        return torch.cat([text, picture], dim=1)
    starts = whole.data_ptr(), whole.data_ptr() + length * text.shape[-1] * whole.itemsize
    alike = whole.shape == (len(text), length + picture.shape[1], text.shape[-1])
    if alike and starts == (text.data_ptr(), picture.data_ptr()):
        return whole
    return torch.cat([text, picture], dim=1)


def _of_both(layer: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """The answer to both, one beside the other, without laying them so."""
    if type(layer) is not nn.Linear or layer.weight.requires_grad or layer.weight.dtype != first.dtype:
        return layer(torch.cat([first, second], dim=-1))
    own, other = layer.weight.split([first.shape[-1], second.shape[-1]], dim=1)
    found = nn.functional.linear(first, own, layer.bias)
    return torch.addmm(found.flatten(0, -2), second.flatten(0, -2), other.T).view_as(found)


def lean(model: nn.Module) -> None:
    """Make a transformer's blocks such."""
    for part in model.modules():
        if type(part) is FluxTransformerBlock:
            part.__class__ = LeanDoubleBlock
        elif type(part) is FluxSingleTransformerBlock:
            part.__class__ = LeanSingleBlock
