"""Bases of the published shapes as configs alone: no weights, and toy tokenizers, whose words cost no memory.

Sources are the config.json files of the models that each function names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from diffusers import FlowMatchEulerDiscreteScheduler

Part = tuple[str, str, dict[str, Any]]  # library, class, its config.json

LETTERS = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
CLIP_L = {
    **LETTERS,
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
CLIP_G = {
    **LETTERS,
    "model_type": "clip_text_model",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def clip_l(projection: bool = False) -> Part:
    return ("transformers", "CLIPTextModelWithProjection" if projection else "CLIPTextModel", CLIP_L)


def clip_g() -> Part:
    return ("transformers", "CLIPTextModelWithProjection", CLIP_G)


def t5_xxl() -> Part:
    return ("transformers", "T5EncoderModel", T5_XXL)


def vae(channels: int, scale: float, shift: float | None = None) -> Part:
    """Of 16 channels and more they come without the convolutions around the latents."""
    config = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "scaling_factor": scale,
        "shift_factor": shift,
        "use_quant_conv": channels == 4,
        "use_post_quant_conv": channels == 4,
    }
    return ("diffusers", "AutoencoderKL", config)


def save(folder: Path, pipeline: str, parts: dict[str, Part], others: dict[str, Any]) -> Path:
    """A folder in diffusers' layout; `others` are tokenizers and the scheduler."""
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, (library, kind, config) in parts.items():
        index[name] = [library, kind]
        said = {"_class_name": kind} if library == "diffusers" else {"architectures": [kind]}
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({**said, **config}))
    for name, other in others.items():
        index[name] = ["diffusers" if name == "scheduler" else "transformers", type(other).__name__]
        other.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def stable_diffusion(folder: Path) -> Path:
    """stable-diffusion-v1-5/stable-diffusion-v1-5"""
    parts = {
        "unet": ("diffusers", "UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
        "text_encoder": clip_l(),
        "vae": vae(4, 0.18215),
    }
    return save(
        folder, "StableDiffusionPipeline", parts, {"tokenizer": tiny.clip_tokenizer(), "scheduler": tiny.ddim()}
    )


def stable_diffusion_xl(folder: Path) -> Path:
    """stabilityai/stable-diffusion-xl-base-1.0"""
    unet = {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    parts = {
        "unet": ("diffusers", "UNet2DConditionModel", unet),
        "text_encoder": clip_l(),
        "text_encoder_2": clip_g(),
        "vae": vae(4, 0.13025),
    }
    tokenizers = {"tokenizer": tiny.clip_tokenizer(), "tokenizer_2": tiny.clip_tokenizer()}
    return save(folder, "StableDiffusionXLPipeline", parts, {**tokenizers, "scheduler": tiny.ddim()})


def stable_diffusion_3(folder: Path, large: bool = False) -> Path:
    """stabilityai/stable-diffusion-3.5-medium, or -large"""
    depth = 38 if large else 24  # which is also the number of heads, of 64 each
    transformer = {
        "sample_size": 128,
        "num_layers": depth,
        "num_attention_heads": depth,
        "caption_projection_dim": 64 * depth,
        "pos_embed_max_size": 192 if large else 384,
        "dual_attention_layers": [] if large else list(range(13)),
        "qk_norm": "rms_norm",
    }
    parts = {
        "transformer": ("diffusers", "SD3Transformer2DModel", transformer),
        "text_encoder": clip_l(projection=True),
        "text_encoder_2": clip_g(),
        "text_encoder_3": t5_xxl(),
        "vae": vae(16, 1.5305, 0.0609),
    }
    others = {
        "tokenizer": tiny.clip_tokenizer(),
        "tokenizer_2": tiny.clip_tokenizer(),
        "tokenizer_3": tiny.t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return save(folder, "StableDiffusion3Pipeline", parts, others)


def flux(folder: Path) -> Path:
    """black-forest-labs/FLUX.1-dev"""
    parts = {
        "transformer": ("diffusers", "FluxTransformer2DModel", {"guidance_embeds": True}),
        "text_encoder": clip_l(),
        "text_encoder_2": t5_xxl(),
        "vae": vae(16, 0.3611, 0.1159),
    }
    others = {
        "tokenizer": tiny.clip_tokenizer(),
        "tokenizer_2": tiny.t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }
    return save(folder, "FluxPipeline", parts, others)


def z_image(folder: Path) -> Path:
    """Tongyi-MAI/Z-Image-Turbo"""
    parts = {
        "transformer": ("diffusers", "ZImageTransformer2DModel", {"axes_lens": [1536, 512, 512]}),
        "text_encoder": ("transformers", "Qwen3Model", QWEN3_4B),
        "vae": vae(16, 0.3611, 0.1159),
    }
    others = {"tokenizer": tiny.z_image().tokenizer, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return save(folder, "ZImagePipeline", parts, others)


# Family -> its best-known base; a new family's memory is under test once it stands here.
BASES: dict[str, Callable[[Path], Path]] = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": flux,
    "z_image": z_image,
}
