"""Adapter files as the world publishes them: lists of their tensors, from public repositories and issues."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from finetune.adapter import AdapterWeights
from finetune.errors import UserError
from finetune.formats.base import describe_unknown, formats, recognise

PUBLIC = json.loads((Path(__file__).parent / "data" / "public_keys.json").read_text())
LISTS: dict[str, dict[str, Any]] = PUBLIC["lists"]
READ = [name for name, listed in LISTS.items() if "refused" not in listed]
NOISE = torch.randn(4_000_037)


def expand(pattern: str) -> list[str]:
    """`to_{q,k}_{0-2}` to its six names."""
    choices: list[list[str]] = []
    for place, text in enumerate(re.split(r"\{(.*?)\}", pattern)):
        choices.append([text] if place % 2 == 0 else [])
        for choice in text.split(",") if place % 2 else []:
            numbers = re.fullmatch(r"(\d+)-(\d+)", choice)
            choices[-1] += map(str, range(int(numbers[1]), int(numbers[2]) + 1)) if numbers else [choice]
    return ["".join(name) for name in product(*choices)]


def expanded(patterns: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: shape for pattern, shape in patterns.items() for name in expand(pattern)}


def shape_of(role: str, rank: int, m: int, n: int, *kernel: int) -> tuple[int, ...]:
    return {
        "down": (rank, n, *kernel),
        "up": (m, rank, *[1] * len(kernel)),
        "alpha": (),
        "left": (m, rank),
        "right": (rank, n * math.prod(kernel)),
        "row": (1, n),
        "bias": (m,),
        "first of 4": (4, 4),
        "second of 4": (m // 4, n // 4),
    }[role]


def shapes_of(listed: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape; the rank is 4 at most, as no name depends on it."""
    rank = min(listed["rank"], 4)
    shapes = {
        layer + ending: shape_of(role, rank, *shape)
        for layer, shape in expanded(listed["layers"]).items()
        for ending, role in listed["endings"].items()
    }
    return {**shapes, **{name: tuple(shape) for name, shape in expanded(listed.get("others", {})).items()}}


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random tensors, cut from one long row of numbers at other places each; scalars are positive, as alphas are."""
    tensors, start = {}, 0
    for name in sorted(shapes):
        size = math.prod(shapes[name])
        start = start + 7 if start + 7 + size < len(NOISE) else 0
        tensors[name] = NOISE[start : start + size].reshape(shapes[name])
        tensors[name] = tensors[name].abs() if size == 1 else tensors[name]
    return tensors


def read(key: str) -> AdapterWeights:
    tensors = filled(shapes_of(LISTS[key]))
    name = recognise(tensors)
    assert name == LISTS[key]["format"]
    content = formats[name].decode(tensors, {}, Path(key))
    assert isinstance(content, AdapterWeights)
    return content


UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {"attention_head_dim": 64, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35 = {**SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}


def clip(config: dict[str, Any]) -> nn.Module:
    return CLIPTextModelWithProjection(CLIPTextConfig(**config, projection_dim=config["hidden_size"]))


def t5() -> nn.Module:
    return T5EncoderModel(T5Config(**T5))


# The real models, at real shape.
BASES: dict[str, dict[str, Any]] = {
    "sd1": {"unet": lambda: UNet2DConditionModel(**UNET), "text_encoder": lambda: clip(CLIP_L)},
    "sd2": {
        "unet": lambda: UNet2DConditionModel(cross_attention_dim=1024, use_linear_projection=True),
        "text_encoder": lambda: clip(CLIP_H),
    },
    "sdxl": {
        "unet": lambda: UNet2DConditionModel(**SDXL, use_linear_projection=True),
        "text_encoder": lambda: clip(CLIP_L),
        "text_encoder_2": lambda: clip(CLIP_G),
    },
    "sd3-medium": {
        "transformer": lambda: SD3Transformer2DModel(**SD3),
        "text_encoder": lambda: clip(CLIP_L),
        "text_encoder_2": lambda: clip(CLIP_G),
        "text_encoder_3": t5,
    },
    "sd3.5-large": {
        "transformer": lambda: SD3Transformer2DModel(**SD35),
        "text_encoder": lambda: clip(CLIP_L),
        "text_encoder_2": lambda: clip(CLIP_G),
        "text_encoder_3": t5,
    },
    "flux": {
        "transformer": lambda: FluxTransformer2DModel(guidance_embeds=True),
        "text_encoder": lambda: clip(CLIP_L),
        "text_encoder_2": t5,
    },
    "z_image": {"transformer": ZImageTransformer2DModel},
}


@cache
def layers_of(base: str, part: str) -> dict[str, tuple[int, ...]]:
    """The layers of a real model, and the shapes of their weights; no weight is made."""
    with torch.device("meta"):
        model = BASES[base][part]()
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


@pytest.mark.parametrize("key", READ)
def test_a_public_file_names_layers_of_the_real_model_and_fits_them(key: str):
    listed, content = LISTS[key], read(key)
    assert content.architecture == listed["architecture"]
    base = listed.get("base", content.architecture)
    for part, name, update in content.updates():
        shape = layers_of(base, part)[name]
        assert (len(update.up), *update.down.shape[1:]) == shape, name
        assert update.up.shape[2:] == (1,) * (len(shape) - 2), name


def energy_of(listed: dict[str, Any], tensors: dict[str, Tensor]) -> float:
    """The squared norm of all products of a LoRA's factors, from its tensors alone."""
    ends = {role: ending for ending, role in listed["endings"].items()}
    total = 0.0
    for layer in expanded(listed["layers"]):
        down, up = (tensors[layer + ends[role]].double().flatten(1) for role in ("down", "up"))
        alpha = float(tensors[layer + ends["alpha"]]) if "alpha" in ends else len(down)
        total += (alpha / len(down)) ** 2 * float(((up.T @ up) * (down @ down.T)).sum())
    return total


@pytest.mark.parametrize("key", [key for key in READ if "left" not in LISTS[key]["endings"].values()])
def test_nothing_of_a_public_lora_is_lost(key: str):
    listed = LISTS[key]
    assert sum(update.energy() for *_, update in read(key).updates()) == pytest.approx(
        energy_of(without_doubles(listed), filled(shapes_of(listed))), rel=1e-5
    )


def without_doubles(listed: dict[str, Any]) -> dict[str, Any]:
    """Without the layers that are there under diffusers' name as well."""
    layers = expanded(listed["layers"])
    twice = {name for name in layers if re.search("(qkv|out)$", name) and re.sub("[a-z]+$", "to_q", name) in layers}
    return {**listed, "layers": {name: shape for name, shape in layers.items() if name not in twice}}


@pytest.mark.parametrize("key", [key for key, listed in LISTS.items() if listed.get("canonical")])
def test_a_public_kohya_file_comes_back_with_the_same_tensors(key: str):
    tensors = filled(shapes_of(LISTS[key]))
    again = formats["kohya"].encode(read(key), Path(key))[0]
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(again[name], value)


@pytest.mark.parametrize("key", [key for key, listed in LISTS.items() if "modules" in listed])
def test_a_public_list_has_as_many_layers_as_its_trainer_counts(key: str):
    names = expanded(LISTS[key]["layers"])
    for beginning, number in LISTS[key]["modules"].items():
        assert sum(name.startswith(beginning) for name in names) == number


@pytest.mark.parametrize("key", [key for key in LISTS if key not in READ])
def test_a_public_file_that_is_no_plain_lora_is_refused_with_the_reason(key: str):
    tensors = filled(shapes_of(LISTS[key]))
    name = recognise(tensors)
    assert name == LISTS[key]["format"]
    if name is None:
        assert LISTS[key]["refused"] in describe_unknown(tensors)
        return
    with pytest.raises(UserError, match=LISTS[key]["refused"]):
        formats[name].decode(tensors, {}, Path(key))


def test_changes_of_biases_and_norms_that_are_zero_are_left_out():
    tensors = filled(shapes_of(LISTS["flux-comfyui-extracted"]))
    tensors |= {name: value * 0 for name, value in tensors.items() if name.endswith((".diff", ".diff_b"))}
    content = formats["kohya"].decode(tensors, {}, Path())
    assert isinstance(content, AdapterWeights) and content.parts.keys() == BASES["flux"].keys()


@pytest.mark.parametrize("architecture", PUBLIC["names"])
def test_originals_stand_for_the_layers_that_public_tables_name(architecture: str):
    for original, expected in PUBLIC["names"][architecture]["pairs"].items():
        part = "unet" if architecture in ("sd1", "sdxl") else "transformer"
        name = f"{part}.{original}.lora_"
        tensors = {f"{name}down.weight": NOISE[:6].reshape(2, 3), f"{name}up.weight": NOISE[:24].reshape(12, 2)}
        header = {"ss_base_model_version": {"sd1": "sd_v1", "sdxl": "sdxl_base"}.get(architecture, architecture)}
        content = formats["kohya"].decode(tensors, header, Path())
        assert isinstance(content, AdapterWeights)
        assert [(part, name) for part, name, _ in content.updates()] == [(part, expected)], original


PAIR = {"down": (2, 4), "up": (4, 2)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.transformer.diffusion_model.layers.2.attention.to_q", "transformer.layers.2.attention.to_q"),
        ("layers.3.attention.out", "transformer.layers.3.attention.to_out.0"),
        ("input_blocks.4.1.proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        ("diffusion_model.single_blocks.3.processor.proj_lora", "transformer.single_transformer_blocks.3.proj_out"),
        (
            "base_model.model.time_text_embed.text_embedder.linear_1",
            "transformer.time_text_embed.text_embedder.linear_1",
        ),
    ],
)
def test_other_beginnings_of_names_are_read(name: str, expected: str):
    end = "." if name.endswith("_lora") else ".lora_"
    tensors = {f"{name}{end}{side}.weight": NOISE[:8].reshape(shape) for side, shape in PAIR.items()}
    content = formats[recognise(tensors) or ""].decode(tensors, {}, Path())
    assert isinstance(content, AdapterWeights)
    assert [f"{part}.{layer}" for part, layer, _ in content.updates()] == [expected]


@pytest.mark.parametrize("order", [1, -1])
def test_a_layer_under_both_of_its_names_is_read_once_under_its_own(order: int):
    names = [f"lora_unet_layers_0_attention_{name}" for name in ("out", "to_out_0")][::order]
    tensors = {
        f"{name}.lora_{side}.weight": torch.full(shape, float("to_out" in name))
        for name in names
        for side, shape in PAIR.items()
    }
    content = formats["kohya"].decode(tensors, {}, Path())
    assert isinstance(content, AdapterWeights)
    ((*_, name, update),) = content.updates()
    assert name == "layers.0.attention.to_out.0" and bool(update.down.all())


def test_a_part_that_an_original_does_not_stack_is_refused():
    name = "transformer.double_blocks.0.img_attn.qkv.7"
    tensors = {f"{name}.lora_{side}.weight": NOISE[:8].reshape(shape) for side, shape in PAIR.items()}
    with pytest.raises(UserError, match="stacks 3 layers"):
        formats["kohya"].decode(tensors, {}, Path())


# Lists that diffusers converts as a whole, by the pipeline that does.
SGM = (StableDiffusionPipeline, StableDiffusionXLPipeline)
CONVERTED = {
    FluxPipeline: (
        *("flux-kohya", "flux-kohya-te1", "flux-onetrainer", "flux-xlabs", "flux-xlabs-single", "flux-hyper-sd"),
        *("flux-diffusers", "flux-diffusers-no-mlp", "flux-diffusers-dotted"),
    ),
    ZImagePipeline: ("z-image-kohya", "z-image-musubi", "z-image-twice", "z-image-ai-toolkit"),
    StableDiffusionPipeline: ("sd1-kohya", "sd1-locon", "sd2-kohya"),
    StableDiffusionXLPipeline: ("sdxl-kohya", "sdxl-locon", "sdxl-slider"),
}


def read_by_diffusers(loader: Any, tensors: dict[str, Tensor]) -> AdapterWeights:
    """What diffusers makes of a file, with the alphas that it keeps apart."""
    config = {"unet_config": SimpleNamespace(layers_per_block=2)} if loader in SGM else {}
    found = loader.lora_state_dict(dict(tensors), return_alphas=True, **config)
    converted, alphas = found if isinstance(found, tuple) else (found, None)
    for name, alpha in (alphas or {}).items():
        layer = re.sub(r"((\.lora_linear_layer|\.lora|_lora)\.down\.weight)?\.alpha$", "", name)
        converted[f"{layer}.alpha"] = torch.tensor(alpha)
    content = formats["diffusers"].decode(converted, {}, Path())
    assert isinstance(content, AdapterWeights)
    return content


@pytest.mark.parametrize(("loader", "key"), [(loader, key) for loader, keys in CONVERTED.items() for key in keys])
def test_diffusers_makes_the_same_of_a_public_file(loader: Any, key: str):
    tensors = filled(shapes_of(LISTS[key]))
    theirs = read_by_diffusers(loader, {name: value.clone() for name, value in tensors.items()})  # it writes into them
    ours = read(key)
    assert {part: layers.keys() for part, layers in theirs.parts.items()} == {
        part: layers.keys() for part, layers in ours.parts.items()
    }
    for part, name, update in ours.updates():
        (up, down), (their_up, their_down) = update.factors(), theirs.parts[part][name].factors()
        torch.testing.assert_close(up[:64] @ down[:, :64], their_up[:64] @ their_down[:, :64], rtol=1e-4, atol=1e-4)
