"""Bases in one file under their authors' names: `finetune.originals` the other way round.

What diffusers makes of such a file proves the names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.originals import clip_name, in_original, swap, swapped

UNET, CLIP, OPEN_CLIP = "model.diffusion_model.", "cond_stage_model.transformer.", "cond_stage_model.model."
# Architecture -> part of the pipeline -> the beginning of its names, and whose names they are.
LAYOUTS: dict[str, dict[str, tuple[str, str]]] = {
    "sd1": {"unet": (UNET, "sdxl"), "text_encoder": (CLIP, "transformers")},
    "sd2": {"unet": (UNET, "sdxl"), "text_encoder": (OPEN_CLIP, "open_clip")},
    "sdxl": {
        "unet": (UNET, "sdxl"),
        "text_encoder": ("conditioner.embedders.0.transformer.", "transformers"),
        "text_encoder_2": ("conditioner.embedders.1.model.", "open_clip"),
    },
    "sd3": {
        "transformer": (UNET, "sd3"),
        "text_encoder": ("text_encoders.clip_l.transformer.", "transformers"),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", "transformers"),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", "transformers"),
    },
    "flux": {
        "transformer": (UNET, "flux"),
        "text_encoder": ("text_encoders.clip_l.transformer.", "transformers"),
        "text_encoder_2": ("text_encoders.t5xxl.transformer.", "transformers"),
    },
    "z_image": {"transformer": (UNET, "z_image")},
}
SPELLINGS = {
    "open_clip": {r"in_proj\.": "in_proj_", r"^(positional_embedding|text_projection)\.weight$": r"\1"},
    "sd3": {r"^pos_embed\.pos_embed$": "pos_embed"},
    "flux": {r"_norm\.weight$": "_norm.scale"},
}
VAE = {
    r"conv_norm_out": "norm_out",
    r"encoder\.down_blocks\.(\d)": r"encoder.down.\1",
    r"(down\.\d|up\.\d)\.resnets": r"\1.block",
    r"(down|up)samplers\.0": r"\1sample",
    r"conv_shortcut": "nin_shortcut",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"group_norm": "norm",
    r"to_(q|k|v)\b": r"\1",
    r"to_out\.0": "proj_out",
}


def write_single_file(pipeline: Any, architecture: str, file: Path, prefix: str = UNET) -> Path:
    """The whole pipeline; `prefix` is that of the denoiser's names."""
    tensors: dict[str, Tensor] = {}
    for part, (start, names) in LAYOUTS[architecture].items():
        held = {clip_name(name): value for name, value in getattr(pipeline, part).state_dict().items()}
        found = held if names == "transformers" else renamed(held, names)
        tensors |= {(prefix if start == UNET else start) + name: value for name, value in found.items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in vae(pipeline.vae.state_dict()).items()}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, file)
    return file


def renamed(state: dict[str, Tensor], names: str) -> dict[str, Tensor]:
    found = {}
    for weight in state:
        layer, _, kind = weight.rpartition(".")
        original, layers = in_original(layer, names) if layer and kind in ("weight", "bias") else (layer, (layer,))
        value = torch.cat([state[f"{name}.{kind}" if name else kind] for name in layers])
        inputs = state.get(f"{layer}.weight", value).shape[-1]
        value = swap(value) if swapped(layers[0], len(value), inputs) else value
        value = value.T if names == "open_clip" and layer == "text_projection" else value
        up = re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", layer)
        if up and not any(name.startswith(f"up_blocks.{up[1]}.attentions") for name in state):
            original = original.replace(".2.conv", ".1.conv")  # it follows what else the block has
        stored = f"{original}.{kind}".removeprefix(".")
        for pattern, spelling in SPELLINGS.get(names, {}).items():
            stored = re.sub(pattern, spelling, stored)
        found[stored] = value
    return found


def vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    last = max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))
    found = {}
    for name, value in state.items():
        original = re.sub(r"decoder\.up_blocks\.(\d)", lambda level: f"decoder.up.{last - int(level[1])}", name)
        for pattern, spelling in VAE.items():
            original = re.sub(pattern, spelling, original)
        projects = "mid.attn_1" in original and value.ndim == 2
        found[original] = value[..., None, None] if projects else value
    return found
