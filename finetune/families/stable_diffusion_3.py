"""Stable Diffusion 3 and 3.5: a joint transformer of text and patches, trained by flow matching."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.families.base import Family, Prompt, Tokens, families
from finetune.objectives import Flow

JOINT_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
NUM_T5_TOKENS = 256


@families.register
class StableDiffusion3(Family):
    """SD3 (2403.03206): CLIP-L, CLIP-G and, where the checkpoint has it, T5."""

    pipeline_class = "StableDiffusion3Pipeline"
    single_files = ("sd3", "sd35_medium", "sd35_large")
    objective_class = Flow
    denoiser_name = "transformer"
    tokenizers = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
    prompt_lengths = {"text_encoder_3": NUM_T5_TOKENS}
    word_keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}
    attention = JOINT_ATTENTION
    feed_forward = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    heavy = ("text_encoder_3",)
    text_lora = ("text_encoder", "text_encoder_2")
    size_multiple = 2

    def encode_prompt(self, tokens: Tokens) -> Prompt:
        """CLIP's states side by side, padded to T5's width and followed by T5's; the pooled vectors side by side."""
        hidden, pooled = [], []
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(self.pipeline, name)
            output = encoder(tokens[name].to(encoder.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output[0])
        clip = torch.cat(hidden, dim=-1)
        t5 = self._encode_with_t5(tokens, clip)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return Prompt(torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1))

    def _encode_with_t5(self, tokens: Tokens, clip: Tensor) -> Tensor:
        """(B, 256, D); zeros where the checkpoint comes without T5, as its pipeline has it."""
        encoder = self.pipeline.text_encoder_3
        if encoder is None:
            return clip.new_zeros(len(clip), NUM_T5_TOKENS, self.denoiser.config.joint_attention_dim)
        return encoder(tokens["text_encoder_3"].to(encoder.device))[0].to(clip)

    def denoise(self, noised: Tensor, time: Tensor, prompt: Prompt, geometry: Tensor) -> Tensor:
        assert prompt.pooled is not None
        inputs = noised.to(self.dtype), prompt.embeds.to(self.dtype), prompt.pooled.to(self.dtype)
        return self.denoiser(*inputs, time * 1000).sample
