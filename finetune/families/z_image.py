"""Z-Image: one stream of text and patches through a transformer, conditioned on a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.families.base import Family, Prompt, Tokens, families
from finetune.objectives import Flow


@families.register
class ZImage(Family):
    """Z-Image (2511.22699). Qwen3 reads the caption as a chat message; captions keep their own lengths."""

    pipeline_class = "ZImagePipeline"
    single_files = ("z-image", "z-image-turbo")
    objective_class = Flow
    denoiser_name = "transformer"
    tokenizers = {"text_encoder": "tokenizer"}
    prompt_lengths = {"text_encoder": 512}
    word_keys = {"text_encoder": "qwen3"}
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    heavy = ("text_encoder",)
    text_lora = ()
    size_multiple = 2

    def _write(self, caption: str, tokenizer: Any) -> str:
        message = [{"role": "user", "content": super()._write(caption, tokenizer)}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        ((encoder, encoded),) = self._tokenized(captions)
        return {encoder: encoded.input_ids, "mask": encoded.attention_mask.bool()}

    def encode_prompt(self, tokens: Tokens) -> Prompt:
        encoder = self.pipeline.text_encoder
        ids, mask = tokens["text_encoder"].to(encoder.device), tokens["mask"].to(encoder.device)
        output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return Prompt(output.hidden_states[-2], mask=mask)

    def denoise(self, noised: Tensor, time: Tensor, prompt: Prompt, geometry: Tensor) -> Tensor:
        """The network takes pictures of one frame each, runs time from noise to picture, and predicts x_0 - e."""
        assert prompt.mask is not None
        frames = list(noised.to(self.dtype).unsqueeze(2))
        captions = [embeds[mask] for embeds, mask in zip(prompt.embeds.to(self.dtype), prompt.mask, strict=True)]
        return -torch.stack(self.denoiser(frames, 1 - time, captions).sample).squeeze(2)
