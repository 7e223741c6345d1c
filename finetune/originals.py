"""Layers under the names of the checkpoints that their authors published, which kohya and ComfyUI use,
and under diffusers' names. Some originals are several layers of diffusers in one, stacked.

Sources: diffusers' `single_file_utils.py` and `lora_conversion_utils.py`, ComfyUI's `lora.py`, and the public
code of SDXL (`sgm`), SD3 (`mmdit`), FLUX and Z-Image.

Shapes: m outputs and n inputs of a layer, r the rank of an update.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finetune.adapter import Update
from finetune.errors import UserError

QKV = "{to_q,to_k,to_v}"
ADDED_QKV = "{add_q_proj,add_k_proj,add_v_proj}"
# Original -> diffusers. `*` is the block's number; `{a,b}` are several layers stacked in the original.
FLUX = {
    "double_blocks.*.img_attn.qkv": f"transformer_blocks.*.attn.{QKV}",
    "double_blocks.*.txt_attn.qkv": f"transformer_blocks.*.attn.{ADDED_QKV}",
    "double_blocks.*.img_attn.proj": "transformer_blocks.*.attn.to_out.0",
    "double_blocks.*.txt_attn.proj": "transformer_blocks.*.attn.to_add_out",
    "double_blocks.*.img_mlp.0": "transformer_blocks.*.ff.net.0.proj",
    "double_blocks.*.img_mlp.2": "transformer_blocks.*.ff.net.2",
    "double_blocks.*.txt_mlp.0": "transformer_blocks.*.ff_context.net.0.proj",
    "double_blocks.*.txt_mlp.2": "transformer_blocks.*.ff_context.net.2",
    "double_blocks.*.img_attn.norm.query_norm": "transformer_blocks.*.attn.norm_q",
    "double_blocks.*.img_attn.norm.key_norm": "transformer_blocks.*.attn.norm_k",
    "double_blocks.*.txt_attn.norm.query_norm": "transformer_blocks.*.attn.norm_added_q",
    "double_blocks.*.txt_attn.norm.key_norm": "transformer_blocks.*.attn.norm_added_k",
    "double_blocks.*.img_mod.lin": "transformer_blocks.*.norm1.linear",
    "double_blocks.*.txt_mod.lin": "transformer_blocks.*.norm1_context.linear",
    "single_blocks.*.linear1": "single_transformer_blocks.*.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}",
    "single_blocks.*.linear2": "single_transformer_blocks.*.proj_out",
    "single_blocks.*.norm.query_norm": "single_transformer_blocks.*.attn.norm_q",
    "single_blocks.*.norm.key_norm": "single_transformer_blocks.*.attn.norm_k",
    "single_blocks.*.modulation.lin": "single_transformer_blocks.*.norm.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
SD3 = {
    "joint_blocks.*.x_block.attn.qkv": f"transformer_blocks.*.attn.{QKV}",
    "joint_blocks.*.x_block.attn2.qkv": f"transformer_blocks.*.attn2.{QKV}",
    "joint_blocks.*.context_block.attn.qkv": f"transformer_blocks.*.attn.{ADDED_QKV}",
    "joint_blocks.*.x_block.attn.ln_q": "transformer_blocks.*.attn.norm_q",
    "joint_blocks.*.x_block.attn.ln_k": "transformer_blocks.*.attn.norm_k",
    "joint_blocks.*.x_block.attn2.ln_q": "transformer_blocks.*.attn2.norm_q",
    "joint_blocks.*.x_block.attn2.ln_k": "transformer_blocks.*.attn2.norm_k",
    "joint_blocks.*.context_block.attn.ln_q": "transformer_blocks.*.attn.norm_added_q",
    "joint_blocks.*.context_block.attn.ln_k": "transformer_blocks.*.attn.norm_added_k",
    "joint_blocks.*.x_block.attn.proj": "transformer_blocks.*.attn.to_out.0",
    "joint_blocks.*.x_block.attn2.proj": "transformer_blocks.*.attn2.to_out.0",
    "joint_blocks.*.context_block.attn.proj": "transformer_blocks.*.attn.to_add_out",
    "joint_blocks.*.x_block.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "joint_blocks.*.x_block.mlp.fc2": "transformer_blocks.*.ff.net.2",
    "joint_blocks.*.context_block.mlp.fc1": "transformer_blocks.*.ff_context.net.0.proj",
    "joint_blocks.*.context_block.mlp.fc2": "transformer_blocks.*.ff_context.net.2",
    "joint_blocks.*.x_block.adaLN_modulation.1": "transformer_blocks.*.norm1.linear",
    "joint_blocks.*.context_block.adaLN_modulation.1": "transformer_blocks.*.norm1_context.linear",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
Z_IMAGE = {
    f"{block}.*.{original}": f"{block}.*.{name}"
    for block in ("layers", "noise_refiner", "context_refiner")
    for original, name in {
        "attention.qkv": f"attention.{QKV}",
        "attention.out": "attention.to_out.0",
        "attention.q_norm": "attention.norm_q",
        "attention.k_norm": "attention.norm_k",
        **{same: same for same in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
        **{same: same for same in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
    }.items()
} | {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{same: same for same in ("cap_embedder.0", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
}
# CLIP as OpenCLIP has it: the encoder of Stable Diffusion 2 and the second of SDXL.
OPEN_CLIP = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection",
    **{
        f"transformer.resblocks.*.{original}": f"text_model.encoder.layers.*.{name}"
        for original, name in {
            "attn.in_proj": "self_attn.{q_proj,k_proj,v_proj}",
            "attn.out_proj": "self_attn.out_proj",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
            "ln_1": "layer_norm1",
            "ln_2": "layer_norm2",
        }.items()
    },
}
TABLES = {"flux": FLUX, "sd3": SD3, "z_image": Z_IMAGE, "open_clip": OPEN_CLIP}

# UNets: Stable Diffusion's original blocks, of SDXL above all. Every level of diffusers is three of them.
LEVEL = 3
UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
MIDDLE = ("resnets.0", "attentions.0", "resnets.1")

# Names of diffusers and transformers that have an underscore of their own.
COMPOUNDS = re.compile(
    r"(?<![a-zA-Z0-9])("
    r"(single_)?transformer_blocks|(down|up)_blocks|mid_block|to_add_out|to_(q|k|v|out)|add_(q|k|v)_proj|"
    r"proj_(in|out|mlp)|conv_(in|out|shortcut)|time_emb_proj|time_text_embed|(timestep|text|guidance)_embedder|"
    r"(x|t|y|cap|context)_embedder|all_(x_embedder|final_layer)|(time|add)_embedding|linear_[12]|norm_out|"
    r"norm1_context|ff_context|pos_embed|text_(model|projection)|self_attn|(q|k|v|out)_proj|wi_[01]|"
    r"(noise|context)_refiner|feed_forward|adaLN_modulation"
    r")(?![a-zA-Z0-9])"
)


def dotted(name: str) -> str:
    """`down_blocks_0_attentions_0_proj_in` to `down_blocks.0.attentions.0.proj_in`."""
    return COMPOUNDS.sub(lambda found: found[0].replace("_", "\0"), name).replace("_", ".").replace("\0", "_")


def clip_name(name: str) -> str:
    """transformers 5.6 dropped `text_model.` from the names in CLIP; files and every other tool still have it."""
    return f"text_model.{name}" if name.startswith(("encoder.layers.", "embeddings.", "final_layer_norm.")) else name


def in_diffusers(name: str, architecture: str | None) -> tuple[str, ...]:
    """An original or a diffusers name, its dots underscores or not, to the names of diffusers that it stands for."""
    flat = name.replace(".", "_")
    starred, number = _starred(flat)
    for original, names in TABLES.get(architecture or "", {}).items():
        if original.replace(".", "_") == starred:
            return tuple(layer.replace("*", number) for layer in _expand(names))
    if re.match(r"(input|output|middle)_block|(time|label)_emb(ed)?_\d|out_[02]$", flat):
        return (_unet_in_diffusers(flat),)
    return (name if "." in name else dotted(flat),)


def in_original(name: str, architecture: str) -> tuple[str, tuple[str, ...]]:
    """A layer of diffusers under its original name, and all the layers of diffusers that lie there.

    Raises:
        UserError: it has no original.
    """
    if architecture == "sdxl":
        return unet_original(name), (name,)
    if architecture not in TABLES:
        return name, (name,)
    starred, number = _starred(name)
    for original, names in TABLES[architecture].items():
        if starred in (layers := _expand(names)):
            return original.replace("*", number), tuple(layer.replace("*", number) for layer in layers)
    raise UserError(f"{name}: the original {architecture} has no such layer")


def _starred(name: str) -> tuple[str, str]:
    """A name with a star for its block's number, and the number, or a star where it has none."""
    number = re.search(r"(?<=[._])\d+(?=[._])", name)
    return (name, "*") if number is None else (f"{name[: number.start()]}*{name[number.end() :]}", number[0])


def _expand(names: str) -> list[str]:
    """`attn.{to_q,to_k}` to `attn.to_q` and `attn.to_k`."""
    head, brace, rest = names.partition("{")
    return [head + name for name in rest.rstrip("}").split(",")] if brace else [names]


def _unet_in_diffusers(flat: str) -> str:
    for name, original in UNET_TOP.items():
        if original.replace(".", "_") == flat:
            return name
    found = re.fullmatch(r"(?:(input|output)_blocks_(\d{1,3})|middle_block)_([012])_(.+)", flat)
    if found is None:
        raise UserError(f"{flat}: no layer of a Stable Diffusion UNet has this name")
    side, index, inner, rest = found[1], int(found[2] or 0), int(found[3]), found[4]
    if side is None:
        return f"mid_block.{MIDDLE[inner]}.{_inner(rest)}"
    level, place = divmod(index - (side == "input"), LEVEL)
    if rest == "op":
        return f"down_blocks.{level}.downsamplers.0.conv"
    if rest == "conv":
        return f"up_blocks.{level}.upsamplers.0.conv"
    kind = "attentions" if inner else "resnets"
    return f"{'down' if side == 'input' else 'up'}_blocks.{level}.{kind}.{place}.{_inner(rest)}"


def _inner(flat: str) -> str:
    for name, original in UNET_RESNET.items():
        if original.replace(".", "_") == flat:
            return name
    return dotted(flat)


def unet_original(name: str) -> str:
    """A layer of diffusers' SDXL UNet under its original name."""
    if name in UNET_TOP:
        return UNET_TOP[name]
    if sampler := re.fullmatch(r"(down|up)_blocks\.(\d{1,3})\.(?:down|up)samplers\.0\.conv", name):
        level = int(sampler[2])
        down = sampler[1] == "down"
        return f"input_blocks.{LEVEL * (level + 1)}.0.op" if down else f"output_blocks.{LEVEL * level + 2}.2.conv"
    middle = re.fullmatch(r"mid_block\.(\w+\.\d)\.(.+)", name)
    if middle and middle[1] in MIDDLE:
        return f"middle_block.{MIDDLE.index(middle[1])}.{UNET_RESNET.get(middle[2], middle[2])}"
    block = re.fullmatch(r"(down|up)_blocks\.(\d{1,3})\.(resnets|attentions)\.(\d)\.(.+)", name)
    if block is None:
        raise UserError(f"{name}: no layer of SDXL's UNet has this name")
    index = LEVEL * int(block[2]) + int(block[4])
    side = f"input_blocks.{index + 1}" if block[1] == "down" else f"output_blocks.{index}"
    return f"{side}.{int(block[3] == 'attentions')}.{UNET_RESNET.get(block[5], block[5])}"


def split(update: Update, original: str, names: Sequence[str]) -> dict[str, Update]:
    """An original layer's update for each of the layers of diffusers that it stacks.

    A layer gets the columns that reach it: of factors that were fused as blocks, its own block,
    and of columns that are shared, all. One that nothing reaches is left out. The scale stays
    what it was: it belongs to each column, however many are kept.
    """
    if swapped(names[0], *_shape(update)):
        update = _swap(update)
    if len(names) == 1:
        return {names[0]: update}
    heights = stacked(original, names, *_shape(update))
    magnitudes = [None] * len(names) if update.magnitude is None else update.magnitude.split(heights)
    parts = {}
    for name, up, magnitude in zip(names, update.up.split(heights), magnitudes, strict=True):
        reaching = up.flatten(2).any(2).any(0) if up.ndim > 2 else up.any(0)
        if not reaching.any() and magnitude is None:
            continue
        if not reaching.any():
            reaching[0] = True
        parts[name] = replace(update, down=update.down[reaching], up=up[:, reaching], magnitude=magnitude)
    return parts


def stacked(original: str, names: Sequence[str], num_outputs: int, num_inputs: int) -> list[int]:
    """How many of an original layer's outputs belong to each of the layers of diffusers that it stacks.

    Raises:
        UserError: they cannot be shared out.
    """
    heights = [num_outputs // len(names)] * len(names)
    if len(names) == 4:  # beside q, k and v lies the MLP, which is wider
        heights = [num_inputs] * 3 + [num_outputs - 3 * num_inputs]
    if sum(heights) != num_outputs or min(heights) <= 0:
        raise UserError(
            f"{original}: {num_outputs} outputs cannot be those of {len(names)} layers of {num_inputs} inputs"
        )
    return heights


def fuse(parts: Mapping[str, Update], original: str, names: Sequence[str]) -> Update:
    """The reverse: exact, with factors that are blocks, or with one `down` where all parts share it.

    Raises:
        UserError: only some parts are DoRA, or have a magnitude at all.
    """
    given = [parts[name] for name in names if name in parts]
    if len(names) == 1:
        return _swap(given[0]) if swapped(names[0], *_shape(given[0])) else given[0]
    magnitudes = [update.magnitude for update in given if update.magnitude is not None]
    if magnitudes and len(magnitudes) < len(names):
        raise UserError(f"{original}: its parts can only be fused as DoRA when all of {', '.join(names)} have one")
    first = given[0]
    scales = {update.scale for update in given}
    if len(scales) > 1:
        given = [update.folded() for update in given]
    width = first.down[0].numel()
    heights = [len(parts[name].up) if name in parts else width * (4 if "mlp" in name else 1) for name in names]
    shared = (
        all(update.down.shape == first.down.shape and torch.equal(update.down, first.down) for update in given[1:])
        and len(scales) == 1
    )
    down = first.down if shared else torch.cat([update.down for update in given])
    up = torch.zeros(sum(heights), len(down), dtype=down.dtype)
    column = row = 0
    for name, height in zip(names, heights, strict=True):
        if name in parts:
            block = given.pop(0).up
            up[row : row + height, column : column + block.shape[1]] = block
            column += 0 if shared else block.shape[1]
        row += height
    scale = first.scale if len(scales) == 1 else 1.0
    return Update(down, up, scale, torch.cat(magnitudes) if magnitudes else None, first.kind)


def swapped(name: str, num_outputs: int, num_inputs: int) -> bool:
    """diffusers has scale and shift of a last norm in the other order; SD3's last block has such a norm, too."""
    return name == "norm_out.linear" or (name.endswith("norm1_context.linear") and num_outputs == 2 * num_inputs)


def swap(tensor: Tensor) -> Tensor:
    """The halves in the other order."""
    return torch.cat(tensor.chunk(2)[::-1])


def _shape(update: Update) -> tuple[int, int]:
    return len(update.up), update.down[0].numel()


def _swap(update: Update) -> Update:
    return replace(update, up=swap(update.up), magnitude=None if update.magnitude is None else swap(update.magnitude))


def originals(layers: Mapping[str, Update], architecture: str) -> dict[str, Update]:
    """The denoiser's updates under its original names, fused where those are.

    Raises:
        UserError: a layer has no original.
    """
    found = dict(in_original(name, architecture) for name in layers)
    return {original: fuse(layers, original, names) for original, names in found.items()}
