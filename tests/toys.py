"""Pipelines of the real classes at toy size, as far as a LoRA reaches into them, and what their denoisers predict.

Blocks are as deep as in the real models where names depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTH = 32


def encoder(projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=1,
        projection_dim=WIDTH,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1)


def unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        **settings,
    )


def sd1() -> StableDiffusionPipeline:
    denoiser = unet(
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae=None, text_encoder=encoder(), tokenizer=None, unet=denoiser, scheduler=ddim(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> StableDiffusionXLPipeline:
    denoiser = unet(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 48,
    )
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=encoder(), text_encoder_2=encoder(True), tokenizer=None, tokenizer_2=None,
        unet=denoiser, scheduler=ddim(),
    )  # fmt: skip


def sd3() -> StableDiffusion3Pipeline:
    denoiser = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=encoder(True), text_encoder_2=encoder(True), text_encoder_3=None,
        tokenizer=None, tokenizer_2=None, tokenizer_3=None,
    )  # fmt: skip


def flux() -> FluxPipeline:
    denoiser = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=encoder(), tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=denoiser,
    )  # fmt: skip


def z_image() -> ZImagePipeline:
    denoiser = ZImageTransformer2DModel(
        in_channels=4, dim=WIDTH, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[64, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=denoiser
    )


@torch.no_grad()
def predict(pipeline: Any) -> torch.Tensor:
    """The denoiser's prediction and the text encoders' hidden states on fixed inputs, in one vector."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    time, prompt, pooled = torch.tensor([500.0]), draw(1, 5, WIDTH), draw(1, WIDTH)
    if isinstance(pipeline, StableDiffusionPipeline):
        found = [pipeline.unet(draw(1, 4, 16, 16), time, prompt).sample]
    elif isinstance(pipeline, StableDiffusionXLPipeline):
        added = {"text_embeds": pooled, "time_ids": draw(1, 6)}
        found = [pipeline.unet(draw(1, 4, 16, 16), time, prompt, added_cond_kwargs=added).sample]
    elif isinstance(pipeline, StableDiffusion3Pipeline):
        found = [pipeline.transformer(draw(1, 4, 8, 8), prompt, pooled, time).sample]
    elif isinstance(pipeline, FluxPipeline):
        ids = torch.zeros(5, 3), torch.arange(12.0).reshape(4, 3)
        found = [pipeline.transformer(draw(1, 4, 4), prompt, pooled, time / 1000, ids[1], ids[0], torch.ones(1)).sample]
    else:
        found = pipeline.transformer([draw(4, 1, 8, 8)], time / 1000, [draw(5, 16)], return_dict=False)[0]
    ids = torch.arange(5)[None]
    encoders = [getattr(pipeline, f"text_encoder{end}", None) for end in ("", "_2")]
    found = [*found, *(part(ids).last_hidden_state for part in encoders if part is not None)]
    return torch.cat([part.flatten() for part in found])


@dataclass(frozen=True)
class Toy:
    build: Callable[[], Any]
    denoiser: str
    encoders: tuple[str, ...] = ()


TOYS = {
    "sd1": Toy(sd1, "unet", ("text_encoder",)),
    "sdxl": Toy(sdxl, "unet", ("text_encoder", "text_encoder_2")),
    "sd3": Toy(sd3, "transformer", ("text_encoder", "text_encoder_2")),
    "flux": Toy(flux, "transformer", ("text_encoder",)),
    "z_image": Toy(z_image, "transformer"),
}
