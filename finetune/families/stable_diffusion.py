"""Stable Diffusion 1.x and 2.x: a UNet in latent space, conditioned on CLIP's last hidden states."""

from __future__ import annotations

from torch import Tensor

from finetune.families.base import Family, Prompt, Tokens, families
from finetune.objectives import Diffusion

UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


@families.register
class StableDiffusion(Family):
    """Latent diffusion (2112.10752); epsilon or v prediction is read from the checkpoint."""

    pipeline_class = "StableDiffusionPipeline"
    single_files = ("v1", "v2")
    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    objective_class = Diffusion
    denoiser_name = "unet"
    tokenizers = {"text_encoder": "tokenizer"}
    word_keys = {"text_encoder": "clip_l"}
    attention = UNET_ATTENTION
    feed_forward = UNET_FEED_FORWARD
    text_lora = ("text_encoder",)

    def encode_prompt(self, tokens: Tokens) -> Prompt:
        encoder = self.pipeline.text_encoder
        return Prompt(encoder(tokens["text_encoder"].to(encoder.device))[0])

    def denoise(self, noised: Tensor, time: Tensor, prompt: Prompt, geometry: Tensor) -> Tensor:
        return self.denoiser(noised.to(self.dtype), time, prompt.embeds.to(self.dtype)).sample
