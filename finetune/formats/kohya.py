"""LoRA as kohya, ComfyUI and A1111 keep it: `lora_unet_….lora_down.weight`, and alpha of each layer."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from finetune.adapter import AdapterWeights, Update, by_layer, is_adapter, to_update
from finetune.architectures import ARCHITECTURES, from_header, from_names, from_updates
from finetune.errors import UserError
from finetune.files import MOST_TENSORS, Header, Tensors
from finetune.formats.base import Format, formats
from finetune.originals import FLUX, SD3, TABLES, Z_IMAGE, dotted, in_diffusers, originals, split

DENOISERS = ("unet", "transformer")
# Other writers' names for the same tensors.
RENAMED = {
    r"^(base_model\.model\.|transformer\.(?=diffusion_model\.))+": "",
    r"^lora_unet__": "lora_unet_",
    r"\bimg_in\.proj\.": "img_in.",
    # XLabs number a block's two streams; in a block of one stream they train q, k and v without the MLP beside them.
    r"(\bdouble_blocks\.\d+)\.processor\.(qkv|proj)_lora1\.": r"\1.img_attn.\2.lora_",
    r"(\bdouble_blocks\.\d+)\.processor\.(qkv|proj)_lora2\.": r"\1.txt_attn.\2.lora_",
    r"(\bsingle_blocks\.\d+)\.processor\.qkv_lora\.": r"\1.linear1.qkv.lora_",
    r"(\bsingle_blocks\.\d+)\.processor\.proj_lora\.": r"\1.linear2.lora_",
    r"\.processor\.": ".",
}
# The beginnings of a denoiser's layers under their original names.
ORIGINALS = {name.partition(".")[0] for table in (FLUX, SD3, Z_IMAGE) for name in table}
ORIGINALS |= {"input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"}
DENOISER = r"lora_unet_|lora_transformer_|lycoris_|diffusion_model\.|transformer\.|unet\."
# The beginnings of names, and the part that is meant; None is the denoiser under its original or diffusers' names.
PREFIXES = {
    rf"{DENOISER}|(?=({'|'.join(sorted(ORIGINALS))})(\.|$))": None,
    r"lora_te1?_|text_encoders\.clip_[lh]\.transformer\.|clip_l\.": "text_encoder",
    r"lora_te2_|text_encoders\.clip_g\.transformer\.|clip_g\.": "text_encoder_2",
    r"lora_te3_|text_encoders\.t5xxl\.transformer\.|t5\.": "text_encoder_3",
}
# What no name of diffusers begins with.
MARKS = (
    r"lora_(unet|transformer|te\d?)_|lycoris_|diffusion_model\.|text_encoders\.|clip_[lg]\.text_|t5\.encoder\.|"
    r"((transformer|unet)\.)?((double|single|joint|input|output)_blocks\.|middle_block\.|"
    r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(qkv|out)\.)"
)
UNET = r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block|conv|time|out|label|add)[._]"
# Convolutions of UNets, which LyCORIS keeps flat, and the side of their kernels.
KERNELS = {r"(\bconv[12]|\.conv|^conv_(in|out))$": 3, r"conv_shortcut$": 1}


@formats.register
class Kohya(Format):
    """SDXL, SD3, FLUX and Z-Image under their original names, fused where those are.

    The dotted names of ComfyUI, ai-toolkit, OneTrainer (OMI) and XLabs are read.
    ComfyUI (2026-11) divides a DoRA of the outputs by the length of the base's rows, and LyCORIS
    and peft by that of the sum, which the file means; the pictures differ slightly there.
    """

    kind = AdapterWeights
    ending = ".kohya.safetensors"

    @classmethod
    def recognises(cls, names: Mapping[str, Any]) -> bool:
        renamed = _renamed(names)
        return is_adapter(renamed) and any(re.match(MARKS, name) for name in renamed)

    @classmethod
    def decode(cls, tensors: Tensors, header: Header, path: Path) -> AdapterWeights:
        layers = by_layer(_renamed(tensors))
        architecture = from_header(header) or from_names(layers)
        parts: dict[str, dict[str, Update]] = {}
        for name, roles in layers.items():
            part, rest = _place(name, architecture)
            names = _names(part, rest, architecture)
            kernel = next((side for pattern, side in KERNELS.items() if re.search(pattern, names[0])), 0)
            update = to_update(name, roles, kernel if part == "unet" else 0)
            held, own = parts.setdefault(part, {}), names == (_dotted(rest),)
            # A layer that is there under both of its names is meant once, and diffusers takes its own.
            held.update({layer: new for layer, new in split(update, rest, names).items() if own or layer not in held})
        sgm = any(re.search(r"(^|[_.])(input|output)_blocks", name) for name in layers)
        architecture = architecture or from_updates(parts, "sdxl" if sgm else "sd1")
        if architecture == "sd1" and "unet" in parts:
            parts["unet"] = {name: _pointwise(name, update) for name, update in parts["unet"].items()}
        return AdapterWeights(parts, architecture, header)

    @classmethod
    def encode(cls, content: AdapterWeights, path: Path) -> tuple[Tensors, Header]:
        if content.architecture is None:
            raise UserError(
                f"--to kohya: nothing in the file tells which model it is for. Name it with --architecture: "
                f"{', '.join(ARCHITECTURES)}."
            )
        tensors: Tensors = {}
        for part, layers in content.parts.items():
            denoiser = part in DENOISERS
            prefix = "lora_unet_" if denoiser else _encoder_prefix(part, layers, content.architecture)
            for name, update in (originals(layers, content.architecture) if denoiser else layers).items():
                layer = prefix + name.replace(".", "_")
                tensors[f"{layer}.lora_down.weight"] = update.down
                tensors[f"{layer}.lora_up.weight"] = update.up
                tensors[f"{layer}.alpha"] = torch.tensor(update.alpha)
                if update.magnitude is not None:
                    shape = (-1, *[1] * (update.up.ndim - 1))
                    tensors[f"{layer}.dora_scale"] = update.magnitude.reshape(shape)
        return tensors, _header(content, path.stem)

    @classmethod
    def seal(cls, tensors: Tensors) -> Header:
        """The hashes of the finished tensors: kohya's, by which A1111 finds a file, and the model specification's."""
        from safetensors.torch import save

        data = save({name: value.contiguous() for name, value in tensors.items()})
        digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        return {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}


def _renamed(names: Mapping[str, Any]) -> dict[str, Any]:
    """The same under the names that this module knows."""
    return {_rename(name): value for name, value in names.items()}


@lru_cache(MOST_TENSORS)
def _rename(name: str) -> str:
    for pattern, other in RENAMED.items():
        name = re.sub(pattern, other, name)
    return name


def _dotted(rest: str) -> str:
    return rest if "." in rest else dotted(rest)


def _place(name: str, architecture: str | None) -> tuple[str, str]:
    """The part of the pipeline, and the rest of the name."""
    for pattern, part in PREFIXES.items():
        found = re.match(pattern, name)
        if found is None:
            continue
        rest = name[found.end() :]
        if part is None:
            return ("unet" if architecture not in TABLES and re.match(UNET, rest) else "transformer"), rest
        if re.match(r"encoder[._]block", rest):  # T5 is the second encoder of FLUX and the third of SD3
            return ("text_encoder_2" if architecture == "flux" else "text_encoder_3"), rest
        return part, rest
    raise UserError(f"{name}: no layer of a LoRA is called so")


def _names(part: str, rest: str, architecture: str | None) -> tuple[str, ...]:
    """The layers of diffusers or transformers that a name stands for.

    OneTrainer numbers those that an original stacks, and XLabs' `qkv` are the first three.
    """
    if part not in DENOISERS:
        return (_dotted(rest),)
    one = re.fullmatch(r"(.+\b(?:qkv|linear1))\.(\d|qkv)", rest)
    if one is None:
        return in_diffusers(rest, architecture)
    names = in_diffusers(one[1], architecture)
    chosen = names[:3] if one[2] == "qkv" else names[int(one[2]) :][:1]
    if not chosen:
        raise UserError(f"{rest}: {one[1]} stacks {len(names)} layers")
    return chosen


def _pointwise(name: str, update: Update) -> Update:
    """Stable Diffusion 1 projects with 1 x 1 convolutions, which LyCORIS keeps flat, and later models with matrices."""
    if update.down.ndim == 2 and update.kind != "LoRA" and re.search(r"attentions\.\d+\.proj_(in|out)$", name):
        return replace(update, up=update.up[..., None, None], down=update.down[..., None, None])
    return update


def _encoder_prefix(part: str, layers: Mapping[str, Update], architecture: str) -> str:
    """kohya numbers the encoders from 1 where there are several, and T5 is the third wherever it is."""
    if any(name.startswith("encoder.block.") for name in layers):
        return "lora_te3_"
    if architecture in ("sd1", "sd2", "z_image"):
        return "lora_te_"
    return {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}[part]


def _header(content: AdapterWeights, name: str) -> Header:
    """kohya's `ss_` fields, and those of the model specification 1.0.1 that are known."""
    architecture = ARCHITECTURES[content.architecture or ""]
    given = content.header
    fields = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common([update.rank for *_, update in content.updates()]),
        "ss_network_alpha": _common([update.alpha for *_, update in content.updates()]),
        "ss_base_model_version": architecture.kohya,
        "ss_output_name": name,
        "ss_sd_model_name": given.get("base"),
        "ss_steps": given.get("steps"),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture.modelspec}/lora",
        "modelspec.implementation": architecture.implementation,
        "modelspec.title": given.get("modelspec.title", name),
        "modelspec.resolution": given.get(
            "modelspec.resolution", f"{architecture.resolution}x{architecture.resolution}"
        ),
        "modelspec.date": given.get("modelspec.date", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")),
        "modelspec.trigger_phrase": given.get("modelspec.trigger_phrase", given.get("trigger")),
    }
    return {key: value for key, value in fields.items() if value}


def _common(values: Sequence[float]) -> str:
    """The one value, or `Dynamic`, as kohya says it where layers differ."""
    counted = Counter(round(value, 6) for value in values)
    return f"{next(iter(counted)):g}" if len(counted) == 1 else "Dynamic"
