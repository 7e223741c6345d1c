"""Bases of every family, built from the real classes at toy size with random weights, and pictures to teach them.

`deep` bases have blocks as deep as the real ones' where names depend on it: a UNet's original names count two layers
in each level, and diffusers tells SDXL by the tenth layer of CLIP-G.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
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
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIZE = 32  # pixels; latents are half of it on a side


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *string.digits, *",.<>-_"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def clip_text_model(vocabulary: int, projection: bool = False, width: int = 32, layers: int = 2) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=layers,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in string.ascii_lowercase)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5(vocabulary: int) -> T5EncoderModel:
    """Its table is padded beyond the tokenizer's words, as the real one is."""
    return T5EncoderModel(T5Config(vocab_size=vocabulary + 5, d_model=64, d_kv=8, d_ff=37, num_layers=1, num_heads=4))


def vae(latent_channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=SIZE,
        shift_factor=shift,
    )


def ddim(prediction: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def unet(cross_attention_dim: int, deep: bool = False, attends: Sequence[bool] = (False, True), **settings: Any) -> Any:
    """Which levels read the prompt: the last ones in SDXL, all but the last before it."""
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=2 if deep else 1,
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=4,
        down_block_types=tuple("CrossAttnDownBlock2D" if attending else "DownBlock2D" for attending in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if attending else "UpBlock2D" for attending in attends[::-1]),
        attention_head_dim=4,
        **settings,
    )


def stable_diffusion(prediction: str = "epsilon", deep: bool = False) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text_model(len(tokenizer)),
        tokenizer=tokenizer,
        unet=unet(32, deep, (True, False) if deep else (False, True)),
        scheduler=ddim(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(deep: bool = False) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    conditions: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    if deep:
        conditions |= {"transformer_layers_per_block": (1, 2), "use_linear_projection": True}
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_text_model(len(tokenizer)),
        text_encoder_2=clip_text_model(len(tokenizer), projection=True, width=40, layers=10 if deep else 2),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet(72, deep, projection_class_embeddings_input_dim=6 * 8 + 40, **conditions),
        scheduler=ddim(),
        add_watermarker=False,
    )


def stable_diffusion_3(deep: bool = False) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=72,
        pos_embed_max_size=16,
        **({"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if deep else {}),  # as 3.5 has them
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, 0.06),
        text_encoder=clip_text_model(len(tokenizer), projection=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_text_model(len(tokenizer), projection=True, width=40),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(len(tokenizer_3)),
        tokenizer_3=tokenizer_3,
    )


def flux(guidance: bool = True) -> FluxPipeline:
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(4, 0.06),
        text_encoder=clip_text_model(len(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=t5(len(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def z_image() -> ZImagePipeline:
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *string.printable])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}user: {{ message['content'] }}{% endfor %}"
    config = Qwen3Config(
        vocab_size=len(vocabulary) + 5,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[600, 32, 32],
    )
    with torch.no_grad():
        for pad in (transformer.x_pad_token, transformer.cap_pad_token):
            pad.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, 0.06),
        text_encoder=Qwen3Model(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )


# Family -> its bases; a new family is under test once it stands here.
BASES: dict[str, dict[str, Callable[[], Any]]] = {
    "stable_diffusion": {
        "epsilon": stable_diffusion,
        "v_prediction": lambda: stable_diffusion("v_prediction"),
    },
    "stable_diffusion_xl": {"sdxl": stable_diffusion_xl},
    "stable_diffusion_3": {"sd3": stable_diffusion_3},
    "flux": {"dev": flux, "schnell": lambda: flux(guidance=False)},
    "z_image": {"base": z_image},
}
# What files call an architecture -> its family, and a deep base.
DEEP: dict[str, tuple[str, Callable[[], Any]]] = {
    "sd1": ("stable_diffusion", lambda: stable_diffusion(deep=True)),
    "sdxl": ("stable_diffusion_xl", lambda: stable_diffusion_xl(deep=True)),
    "sd3": ("stable_diffusion_3", lambda: stable_diffusion_3(deep=True)),
    "flux": ("flux", flux),
    "z_image": ("z_image", z_image),
}


@torch.no_grad()
def predict(pipeline: Any) -> torch.Tensor:
    """The denoiser's prediction and the text encoders' hidden states on fixed inputs, in one vector."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    time, ids = torch.tensor([500.0]), torch.arange(5)[None]
    if hasattr(pipeline, "unet"):
        config = pipeline.unet.config
        added = {
            "time_ids": draw(1, 6),
            "text_embeds": draw(1, (config.projection_class_embeddings_input_dim or 48) - 48),
        }
        inputs = draw(1, 4, 8, 8), time, draw(1, 5, config.cross_attention_dim)
        found = [pipeline.unet(*inputs, added_cond_kwargs=added).sample]
    elif isinstance(pipeline, ZImagePipeline):
        found = pipeline.transformer([draw(4, 1, 8, 8)], time / 1000, [draw(5, 16)], return_dict=False)[0]
    else:
        config = pipeline.transformer.config
        prompt = {
            "encoder_hidden_states": draw(1, 5, config.joint_attention_dim),
            "pooled_projections": draw(1, config.pooled_projection_dim),
        }
        if isinstance(pipeline, FluxPipeline):
            places = {
                "txt_ids": torch.zeros(5, 3),
                "img_ids": torch.arange(12.0).reshape(4, 3),
                "guidance": torch.ones(1),
            }
            found = [pipeline.transformer(draw(1, 4, 16), timestep=time / 1000, **prompt, **places).sample]
        else:
            found = [pipeline.transformer(draw(1, 16, 8, 8), timestep=time, **prompt).sample]
    encoders = [getattr(pipeline, f"text_encoder{end}", None) for end in ("", "_2", "_3")]
    # T5 drops units out until it is told not to.
    found = [*found, *(part.eval()(ids).last_hidden_state for part in encoders if part is not None)]
    return torch.cat([part.flatten() for part in found])


def assert_as_said(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Predictions by the same weights: where those lie in memory can decide the last bit (seen on an AMD EPYC)."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def assert_same_weights(found: Any, wanted: Any) -> None:
    """Of two models, bit by bit."""
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def save_pictures(folder: Path, count: int = 5, size: int = SIZE, caption: str | None = "a {} thing") -> Path:
    """Distinct pictures of smooth noise, with a caption file each unless `caption` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        if caption is not None:
            (folder / f"{index}.txt").write_text(caption)
    return folder
