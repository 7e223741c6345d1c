"""Stable Diffusion XL: two CLIP encoders, and the picture's size and crop as conditions."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.families.base import Family, Prompt, Tokens, families
from finetune.families.stable_diffusion import UNET_ATTENTION, UNET_FEED_FORWARD
from finetune.objectives import Diffusion


@families.register
class StableDiffusionXL(Family):
    """SDXL (2307.01952). Its VAE overflows in float16, so pictures are encoded in float32 then."""

    pipeline_class = "StableDiffusionXLPipeline"
    single_files = ("xl_base",)
    without = {"add_watermarker": False}
    objective_class = Diffusion
    denoiser_name = "unet"
    tokenizers = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    word_keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    attention = UNET_ATTENTION
    feed_forward = UNET_FEED_FORWARD
    text_lora = ("text_encoder", "text_encoder_2")
    vae_overflows = True

    def encode_prompt(self, tokens: Tokens) -> Prompt:
        """Both encoders' last hidden states but one, and the second's pooled projection."""
        hidden, pooled = [], None
        for name, ids in tokens.items():
            encoder = getattr(self.pipeline, name)
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        return Prompt(torch.cat(hidden, dim=-1), pooled)

    def denoise(self, noised: Tensor, time: Tensor, prompt: Prompt, geometry: Tensor) -> Tensor:
        assert prompt.pooled is not None
        added = {"text_embeds": prompt.pooled.to(self.dtype), "time_ids": geometry.to(self.dtype)}
        embeds = prompt.embeds.to(self.dtype)
        return self.denoiser(noised.to(self.dtype), time, embeds, added_cond_kwargs=added).sample
