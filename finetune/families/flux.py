"""FLUX.1: a transformer over 2x2 patches of latents, trained by flow matching and distilled for guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.families.base import Family, Prompt, Tokens, families
from finetune.families.stable_diffusion_3 import JOINT_ATTENTION
from finetune.objectives import Flow

GUIDANCE = 1.0  # [dev] takes guidance as an input; its makers and users fine-tune it at 1
NUM_T5_TOKENS = 512


@families.register
class Flux(Family):
    """FLUX.1 [dev] and [schnell]: T5 conditions the patches, CLIP gives one vector."""

    pipeline_class = "FluxPipeline"
    single_files = ("flux-dev", "flux-schnell")
    objective_class = Flow
    denoiser_name = "transformer"
    tokenizers = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    prompt_lengths = {"text_encoder_2": NUM_T5_TOKENS}
    word_keys = {"text_encoder": "clip_l", "text_encoder_2": "t5"}
    attention = JOINT_ATTENTION
    feed_forward = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
    heavy = ("text_encoder_2",)
    text_lora = ("text_encoder",)
    size_multiple = 2

    def encode_prompt(self, tokens: Tokens) -> Prompt:
        clip, t5 = self.pipeline.text_encoder, self.pipeline.text_encoder_2
        pooled = clip(tokens["text_encoder"].to(clip.device)).pooler_output
        return Prompt(t5(tokens["text_encoder_2"].to(t5.device))[0], pooled)

    def denoise(self, noised: Tensor, time: Tensor, prompt: Prompt, geometry: Tensor) -> Tensor:
        assert prompt.pooled is not None
        height, width = noised.shape[-2:]
        embeds = prompt.embeds.to(self.dtype)
        packed = self.denoiser(
            pack(noised.to(self.dtype)),
            encoder_hidden_states=embeds,
            pooled_projections=prompt.pooled.to(self.dtype),
            timestep=time.to(self.dtype),
            img_ids=patch_positions(height, width, noised.device).to(embeds),
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            guidance=torch.full_like(time, GUIDANCE) if self.denoiser.config.guidance_embeds else None,
        ).sample
        return unpack(packed, height, width)


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) to a sequence of 2x2 patches: (B, H/2 * W/2, 4C)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack`: (B, H/2 * W/2, 4C) to (B, C, H, W)."""
    b, _, depth = patches.shape
    grid = patches.view(b, height // 2, width // 2, depth // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, depth // 4, height, width)


def patch_positions(height: int, width: int, device: torch.device) -> Tensor:
    """(H/2 * W/2, 3): an unused axis, then each patch's row and column."""
    sides = (torch.arange(side // 2, device=device) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)
