"""Stable Diffusion 1.x and 2.x: a UNet in latent space, conditioned on CLIP's last hidden states."""

from __future__ import annotations

from torch import Tensor

from finetune.families.base import Family, Prompt, Source, Tokens, families
from finetune.objectives import Diffusion


@families.register
class StableDiffusion(Family):
    """Latent diffusion (2112.10752); epsilon or v prediction is read from the checkpoint."""

    pipeline_classes = ("StableDiffusionPipeline",)
    denoiser_name = "unet"
    text_encoders = {"text_encoder": "tokenizer"}
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward = ("ff.net.0.proj", "ff.net.2")
    text_attention = ("q_proj", "k_proj", "v_proj", "out_proj")

    @classmethod
    def load(cls, source: Source, *, min_snr_gamma: float | None, zero_terminal_snr: bool) -> StableDiffusion:
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(
            source.path,
            revision=source.revision,
            dtype=source.dtype,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        objective = Diffusion.from_scheduler(
            pipeline.scheduler.config, min_snr_gamma=min_snr_gamma, zero_terminal_snr=zero_terminal_snr
        )
        return cls(pipeline, objective, source)

    def encode_prompt(self, tokens: Tokens) -> Prompt:
        encoder = self.pipeline.text_encoder
        return Prompt(encoder(tokens["text_encoder"].to(encoder.device))[0])

    def denoise(self, noised: Tensor, time: Tensor, prompt: Prompt) -> Tensor:
        return self.denoiser(noised.to(self.dtype), time, prompt.embeds.to(self.dtype)).sample
