"""LoRA as diffusers and peft keep it: `unet.….lora_A.weight`, every scale in the weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.adapter import AdapterWeights, Update, by_layer, is_adapter, to_update
from finetune.architectures import from_header, from_updates
from finetune.errors import UserError, brief
from finetune.files import Header, Tensors
from finetune.formats.base import Format, formats
from finetune.formats.kohya import Kohya
from finetune.originals import clip_name

PARTS = ("unet", "transformer", "text_encoder_3", "text_encoder_2", "text_encoder")
# What the names of older files are today.
RENAMED = {
    r"(^|\.)base_model\.model\.": r"\1",
    r"\.processor\.": ".",
    r"(?<=self_attn\.)to_(q|k|v)$": r"\1_proj",
    r"(?<=self_attn\.)to_out$": "out_proj",
    r"(?<!self_attn)\.to_out$": ".to_out.0",
}
CONFIG = "lora_adapter_metadata"  # diffusers: peft's configuration of every part, as JSON
REPEATS, CHOICES = 3, 12  # that a pattern in it may have
LARGEST = 1e30  # alpha: its square is still a number


@formats.register
class Diffusers(Format):
    """Also reads what came before it: `.lora.down`, attention processors, `lora_linear_layer`, peft's own prefix."""

    kind = AdapterWeights
    ending = ".safetensors"

    @classmethod
    def recognises(cls, names: Mapping[str, Any]) -> bool:
        return is_adapter(names) and not Kohya.recognises(names)

    @classmethod
    def decode(cls, tensors: Tensors, header: Header, path: Path) -> AdapterWeights:
        parts: dict[str, dict[str, Update]] = {}
        for name, roles in by_layer(tensors).items():
            part, layer = _place(name)
            parts.setdefault(part, {})[layer] = to_update(name, roles)
        if CONFIG in header:
            parts = {part: _scaled(layers, part, header[CONFIG]) for part, layers in parts.items()}
        return AdapterWeights(parts, from_header(header) or from_updates(parts), header)

    @classmethod
    def encode(cls, content: AdapterWeights, path: Path) -> tuple[Tensors, Header]:
        tensors: Tensors = {}
        for part, name, update in content.updates():
            if _is_t5(name):
                if update.up.any() and update.down.any():
                    raise UserError(f"{part}.{name}: diffusers has no loader for a LoRA of T5")
                continue
            folded, layer = update.folded(), f"{part}.{name}"
            tensors[f"{layer}.lora_A.weight"] = folded.down
            tensors[f"{layer}.lora_B.weight"] = folded.up
            if update.magnitude is not None:
                shape = (1, -1, 1, 1) if update.up.ndim == 4 else (-1,)
                tensors[f"{layer}.lora_magnitude_vector.weight"] = update.magnitude.reshape(shape)
        return tensors, {}


def _is_t5(name: str) -> bool:
    return name.startswith("encoder.block.")


def _place(name: str) -> tuple[str, str]:
    """The part and the layer, as today's names have them."""
    for pattern, renamed in RENAMED.items():
        name = re.sub(pattern, renamed, name)
    part = next((part for part in PARTS if name.startswith(f"{part}.")), None)
    layer = name.removeprefix(f"{part}.")
    if part is None:
        part = _guess(name)
    return part, clip_name(layer)


def _guess(name: str) -> str:
    """peft's own files name no part."""
    for pattern, part in {
        r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b": "unet",
        r"(single_)?transformer_blocks\b|layers\.\d+\.(attention|feed_forward)": "transformer",
        r"(noise|context)_refiner\b": "transformer",
        r"(proj_out|norm_out|pos_embed|time_text_embed|(x|context|cap|t)_embedder|all_\w+)\b": "transformer",
        r"(text_model\.)?encoder\.layers\b": "text_encoder",
    }.items():
        if re.match(pattern, name):
            return part
    raise UserError(f"{name}: names no part of a pipeline. Known: {', '.join(sorted(PARTS))}.")


def _scaled(layers: Mapping[str, Update], part: str, text: str) -> dict[str, Update]:
    """The scales that a header's configuration gives; scales from `.alpha` tensors stay."""
    try:
        config = {
            key.removeprefix(f"{part}."): value for key, value in json.loads(text).items() if key.startswith(f"{part}.")
        }
        pattern = {_pattern(key): _alpha(value) for key, value in dict(config.get("alpha_pattern") or {}).items()}
        general = _alpha(config.get("lora_alpha"))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        problems = error.problems if isinstance(error, UserError) else ["is no JSON of a configuration"]
        raise UserError(f"the header's {CONFIG} {problem}" for problem in problems) from None
    scaled = {}
    for name, update in layers.items():
        alpha = next((value for key, value in pattern.items() if key.match(name)), general)
        ranks = math.sqrt(update.rank) if config.get("use_rslora") else update.rank
        given = update.scale if alpha is None or update.scale != 1 else alpha / ranks
        scaled[name] = replace(update, scale=given)
    return scaled


def _pattern(text: str) -> re.Pattern[str]:
    """peft takes a pattern for the end of a name, and the first that fits. One from a file must also come to an end.

    Without groups that repeat, the ways to try are few.
    """
    try:
        found = re.compile(rf"(.*\.)?({text})$")
    except (re.error, RecursionError, OverflowError):
        raise UserError(f"has {brief(text)}, which is no regular expression") from None
    endless = re.search(r"\)[*+?{]", text) or len(re.findall(r"[*+?{]", text)) > REPEATS or text.count("|") > CHOICES
    if endless:
        raise UserError(f"has {brief(text)}, which is no pattern of layers' names but could take forever to try")
    return found


def _alpha(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise UserError(f"has the alpha {brief(value)}, which is no number that a LoRA is scaled by")
    return float(value)
