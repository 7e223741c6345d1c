"""The networks, in the exact Stable Diffusion layout."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from settings import Settings
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 77


def tower_config(width: int, heads: int, layers: int, spread: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": spread,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def new_clip(settings: Settings, tokenizer: CLIPTokenizer, evaluation: bool = False) -> CLIPModel:
    """The conditioning CLIP, or the smaller one that judges."""
    width = settings.text_width * 5 // 8 if evaluation and settings.text_width >= 128 else settings.text_width
    heads, text_layers = max(1, width // 64 if width >= 256 else width // 32), settings.text_layers
    layers = min(3, text_layers) if evaluation else text_layers
    end = tokenizer.eos_token_id
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    text = tower_config(width, heads, layers, width * 5 // 2) | special
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "projection_dim": width}
    image = tower_config(width, heads, settings.image_layers, width * 4)
    image |= {"image_size": settings.clip_size, "patch_size": settings.clip_patch, "projection_dim": width}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=width))


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """The text tower as the model that a pipeline loads."""
    encoder = CLIPTextModel(clip.config.text_config)
    weights = {
        name.removeprefix("text_model."): w for name, w in clip.state_dict().items() if name.startswith("text_model.")
    }
    encoder.load_state_dict({name: weights[name.removeprefix("text_model.")] for name in encoder.state_dict()})
    return encoder


def new_autoencoder(settings: Settings) -> AutoencoderKL:
    """3.9 M parameters, 8 times smaller latents of 4 channels."""
    channels = settings.autoencoder_channels
    return AutoencoderKL(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels), layers_per_block=1, latent_channels=4,
        norm_num_groups=16, sample_size=settings.picture_size,
    )  # fmt: skip


def new_denoiser(settings: Settings) -> UNet2DConditionModel:
    """19.3 M parameters, 5.9 GFLOP a picture: attention at 16 x 16 and 8 x 8 only, for the sake of CPUs.

    `attention_head_dim` counts heads, as in every Stable Diffusion 1 configuration.
    """
    channels = settings.denoiser_channels
    return UNet2DConditionModel(
        sample_size=settings.latent_size, block_out_channels=channels, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=settings.text_width, attention_head_dim=tuple(max(1, c // 32) for c in channels),
    )  # fmt: skip


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
