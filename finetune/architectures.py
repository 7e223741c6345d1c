"""Which model an adapter is for, told from its header, its names and its widths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.adapter import Update
from finetune.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Architecture:
    """What files and users call it."""

    title: str
    modelspec: str  # https://github.com/Stability-AI/ModelSpec
    implementation: str
    resolution: int
    kohya: str | None  # kohya's `ss_base_model_version`
    pipeline: str  # of diffusers


SGM, DIFFUSERS = "https://github.com/Stability-AI/generative-models", "diffusers"
ARCHITECTURES = {
    "sd1": Architecture(
        "Stable Diffusion 1", "stable-diffusion-v1", DIFFUSERS, 512, "sd_v1", "StableDiffusionPipeline"
    ),
    "sd2": Architecture(
        "Stable Diffusion 2", "stable-diffusion-v2", DIFFUSERS, 768, "sd_v2", "StableDiffusionPipeline"
    ),
    "sdxl": Architecture(
        "Stable Diffusion XL", "stable-diffusion-xl-v1-base", SGM, 1024, "sdxl_base_v1-0", "StableDiffusionXLPipeline"
    ),
    "sd3": Architecture("Stable Diffusion 3", "stable-diffusion-3", DIFFUSERS, 1024, "sd3", "StableDiffusion3Pipeline"),
    "flux": Architecture(
        "FLUX.1", "flux-1", "https://github.com/black-forest-labs/flux", 1024, "flux1", "FluxPipeline"
    ),
    "z_image": Architecture("Z-Image", "z-image", DIFFUSERS, 1024, None, "ZImagePipeline"),
}
# The beginnings of `architecture` (ours), `modelspec.architecture` and kohya's `ss_base_model_version`.
SPELLINGS = {
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-v1": "sd1",
    "stable-diffusion-v2": "sd2",
    "stable-diffusion-3": "sd3",
    "sdxl": "sdxl",
    "sd_v1": "sd1",
    "sd_1": "sd1",
    "sd_v2": "sd2",
    "sd_2": "sd2",
    "sd3": "sd3",
    "flux-2": None,
    "flux2": None,
    "flux": "flux",
    "z-image": "z_image",
    "zimage": "z_image",
    **{name: name for name in ARCHITECTURES},
}
# Where a UNet reads the prompt, by the prompt's width.
PROMPT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
# An embedding of one encoder, by the width of its vectors; of several, by their names.
WORD_WIDTHS = {768: "sd1", 1024: "sd2"}
WORD_ENCODERS = {
    ("clip_g", "clip_l"): "sdxl",
    ("clip_g", "clip_l", "t5"): "sd3",
    ("clip_l", "t5"): "flux",
    ("qwen3",): "z_image",
}


def check_known(name: str) -> str:
    """Raises: UserError when no architecture has this name."""
    if name not in ARCHITECTURES:
        raise UserError(f"--architecture: unknown {name!r}. {did_you_mean(name, ARCHITECTURES)}")
    return name


def from_header(header: Mapping[str, str]) -> str | None:
    for key in ("architecture", "modelspec.architecture", "ss_base_model_version"):
        value = header.get(key, "").lower()
        for spelling, architecture in SPELLINGS.items():
            if value.startswith(spelling):
                return architecture
    return None


def from_pipeline(pipeline: Any) -> str | None:
    """By the class of a pipeline of diffusers and, where several models share one, by the prompt's width."""
    fitting = [name for name, known in ARCHITECTURES.items() if known.pipeline == type(pipeline).__name__]
    if len(fitting) > 1:
        return PROMPT_WIDTHS.get(pipeline.unet.config.cross_attention_dim, fitting[0])
    return fitting[0] if fitting else None


def from_names(names: Iterable[str]) -> str | None:
    """By the blocks' names, where one model alone has such blocks. Dots may be underscores."""
    text = "\n".join(names)
    for pattern, architecture in {
        r"double_blocks|single_blocks|single_transformer_blocks": "flux",
        r"joint_blocks|context_block": "sd3",
        r"(noise|context)_refiner|(^|[._])layers[._]\d+[._](attention|feed_forward)[._]": "z_image",
    }.items():
        if re.search(pattern, text, re.MULTILINE):
            return architecture
    return None


def from_updates(parts: Mapping[str, Mapping[str, Update]], unet_default: str = "sd1") -> str | None:
    """By the parts that are adapted, and the widths of the layers."""
    unet, transformer = parts.get("unet", {}), parts.get("transformer", {})
    if found := from_names(transformer):
        return found
    if transformer:
        second = parts.get("text_encoder_2", {})
        clip = any(name.startswith("text_model.") for name in second)
        widths = {update.down.shape[1] for name, update in transformer.items() if name.endswith((".to_q", ".to_k"))}
        if "text_encoder_3" in parts or clip or any(".attn2." in name for name in transformer):
            return "sd3"
        return "flux" if widths == {3072} else "sd3" if widths else None
    for name, update in unet.items():
        if re.search(r"attn2\.to_[kv]$", name) and (found := PROMPT_WIDTHS.get(update.down.shape[1])):
            return found
    if "text_encoder_2" in parts or any(re.search(r"transformer_blocks\.[1-9]", name) for name in unet):
        return "sdxl"
    widths = {update.down.shape[1] for name, update in parts.get("text_encoder", {}).items() if "_proj" in name}
    known = WORD_WIDTHS.get(widths.pop()) if len(widths) == 1 else None
    return known or (unet_default if unet else None)


def from_vectors(widths: Mapping[str, int]) -> str | None:
    """By the encoders (and the width of a single one's vectors) of an embedding."""
    if len(widths) == 1 and "clip_l" in widths:
        return WORD_WIDTHS.get(widths["clip_l"])
    return WORD_ENCODERS.get(tuple(sorted(widths)))
