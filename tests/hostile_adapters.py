"""Adapter files that lie: about their size, their shapes, their kind, and what they are."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import random
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import hostile
import torch
from safetensors.torch import save
from torch import Tensor

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "unet.mid_block.resnets.0.conv1"
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
KOHYA_CONVOLUTION = "lora_unet_mid_block_resnets_0_conv1"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SIZES |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
SHAPES = ((), (0,), (1,), (16,), (0, 16), (16, 0), (4, 16), (16, 4), (4, 16, 1), (4, 16, 3, 3), (16, 4, 1, 1), (1,) * 7)


def ones(*shape: int) -> Tensor:
    return torch.full(shape, 0.5)


def written(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> bytes:
    return save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, dict(header or {}))


def claimed(header: Any, content: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def lora(name: str = LINEAR, rank: int = 4, m: int = 16, n: int = 16) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"{name}.lora_A.weight": torch.randn(rank, n), f"{name}.lora_B.weight": torch.randn(m, rank)}


def kohya(name: str = KOHYA, alpha: float = 2.0, m: int = 16, n: int = 16) -> dict[str, Tensor]:
    (_, down), (_, up) = lora(m=m, n=n).items()
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}


def hadamard(name: str = KOHYA, rank: int = 2) -> dict[str, Tensor]:
    shapes = {"w1_a": (16, rank), "w1_b": (rank, 16), "w2_a": (16, rank), "w2_b": (rank, 16)}
    return {f"{name}.hada_{role}": ones(*shape) for role, shape in shapes.items()}


def kronecker(name: str = KOHYA) -> dict[str, Tensor]:
    shapes = {"w1": (4, 4), "w2_a": (8, 1), "w2_b": (1, 8)}
    return {f"{name}.lokr_{role}": ones(*shape) for role, shape in shapes.items()} | {f"{name}.alpha": torch.ones(())}


GOOD: dict[str, bytes] = {
    "diffusers": written(lora(), {"trigger": "sks", "architecture": "sd1"}),
    "kohya": written(kohya(), {"ss_base_model_version": "sd_v1"}),
    "dora": written(kohya() | {f"{KOHYA}.dora_scale": ones(16, 1)}),
    "loha": written(hadamard()),
    "lokr": written(kronecker()),
    "flux": written(
        kohya("lora_unet_single_blocks_0_linear1", m=16 * 7) | kohya("lora_unet_double_blocks_0_img_attn_qkv", m=48)
    ),
    "word": written({"<it>": ones(2, 768)}),
    "a1111": written({"emb_params": ones(2, 768)}),
    "comfyui": written({"clip_l": ones(2, 768), "clip_g": ones(2, 1280)}),
    "checkpoint": written({"model.diffusion_model.input_blocks.0.0.weight": ones(4, 4, 3, 3)}),
}


def lies() -> Iterator[tuple[str, bytes]]:
    """Headers that do not fit what follows them."""
    entry = {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]}
    name, data = f"{LINEAR}.lora_A.weight", bytes(512)
    up = {"dtype": "F32", "shape": [16, 4], "data_offsets": [256, 512]}
    for length in (0, 1, 2**20, 100_000_000, 100_000_001, 2**31, 2**32, 2**62, 2**63, 2**64 - 1):
        yield f"a header of {length} bytes", claimed({name: entry}, data, length)
    for shape in (
        [2**62, 2**62],
        [2**63],
        [2**64],
        [2**32, 2**32],
        [-1, 16],
        [-4, -16],
        [4.5, 16],
        ["4", "16"],
        [[4], 16],
        None,
        4,
        "4",
        [4],
        [4, 17],
        [4, 15],
        [0, 2**62],
        [0, 2**63 - 1, 2**63 - 1],
        [1] * 10_000,
        [],
        [4, 16, 0],
        [1e3, 1],
        [True, 64],
    ):
        yield f"a shape of {str(shape)[:40]}", claimed({name: {**entry, "shape": shape}}, data[:256])
    for ends in (
        [0, 255],
        [0, 257],
        [0, 10**12],
        [0, 2**63],
        [256, 0],
        [-256, 0],
        [1, 257],
        [256, 512],
        [0],
        [],
        [0, 256, 512],
        None,
        "0",
        [0.0, 256.0],
        [2**64 - 256, 2**64],
        [0, 2**64 - 1],
    ):
        yield f"a place of {ends}", claimed({name: {**entry, "data_offsets": ends}}, data[:256])
    for kind, size in SIZES.items():
        pair = {
            name: {"dtype": kind, "shape": [4, 16], "data_offsets": [0, 64 * size]},
            f"{LINEAR}.lora_B.weight": {"dtype": kind, "shape": [16, 4], "data_offsets": [64 * size, 128 * size]},
        }
        yield f"numbers of {kind}", claimed(pair, random.Random(0).randbytes(128 * size))
        word = {"<it>": {"dtype": kind, "shape": [1, 64], "data_offsets": [0, 64 * size]}}
        yield f"a word of {kind}", claimed(word, random.Random(1).randbytes(64 * size))
    for kind in ("F4", "F6_E2M3", "F6_E3M2", "F128", "", "f32", "O", None, 3, ["F32"], "F8_E4M3FNUZ"):
        yield f"a type of {kind}", claimed({name: {**entry, "dtype": kind}}, data[:256])
    over = {name: entry, f"{LINEAR}.lora_B.weight": {**up, "data_offsets": [0, 256]}}
    yield "two in one place", claimed(over, data[:256])
    yield (
        "two that overlap",
        claimed({**over, f"{LINEAR}.lora_B.weight": {**up, "data_offsets": [128, 384]}}, data[:384]),
    )
    yield "a gap", claimed({name: entry, f"{LINEAR}.lora_B.weight": {**up, "data_offsets": [300, 556]}}, bytes(556))
    yield "a tail", claimed({name: entry}, data + hostile.zipped({"../../owned": b"x"}))
    yield "a million of nothing", claimed({"dtype": "F32"})
    yield "more keys", claimed({name: {**entry, "code": "__import__('os').system('touch owned')"}}, data[:256])
    texts = {
        "no JSON": b"hello",
        "a list": b"[]",
        "a number": b"3",
        "nothing": b"{}",
        "null": b"null",
        "open": b'{"a": ',
        "not a number": b'{"a": NaN}',
        "latin": b'{"\xff\xfe": {}}',
        "a NUL": b'{"a\\u0000b": {}}',
        "zeros": bytes(64),
        "half a character": b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}\x20' + bytes(4),
        "a key twice": b'{"a": %s, "a": %s}' % ((b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}',) * 2)
        + bytes(4),
        "deep": b'{"a": ' + b"[" * 100_000,
        "deep and closed": b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "deep metadata": b'{"__metadata__": {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}}",
        "blanks": b" " * 100_000,
        "a mark": b"\xef\xbb\xbf{}",
    }
    for what, text in texts.items():
        yield f"a header that is {what}", claimed(text)
    for said in ("a", ["a"], {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": {"b": "c"}}, {"a": True}, None, 3):
        yield f"metadata of {json.dumps(said)}", claimed({"__metadata__": said, name: entry}, data[:256])
    yield "metadata as a tensor", claimed({"__metadata__": entry}, data[:256])


def shapes() -> Iterator[tuple[str, bytes]]:
    """Factors that do not fit each other."""
    for down in SHAPES:
        for up in SHAPES:
            pair = {f"{LINEAR}.lora_A.weight": ones(*down), f"{LINEAR}.lora_B.weight": ones(*up)}
            yield f"down {down} and up {up}", written(pair)
    alphas = {
        "NaN": torch.tensor(float("nan")),
        "infinity": torch.tensor(float("inf")),
        "zero": torch.tensor(0.0),
        "negative": torch.tensor(-1.0),
        "huge": torch.tensor(1e300, dtype=torch.float64),
        "several": ones(3),
        "none": ones(0),
        "nested": ones(1, 1, 1),
        "a truth": torch.tensor(True),
        "whole": torch.tensor(4),
        "many": ones(100_000),
        "complex": torch.tensor(1j),
        "tiny": torch.tensor(5e-324, dtype=torch.float64),
    }
    for what, alpha in alphas.items():
        yield f"alpha that is {what}", written({**kohya(), f"{KOHYA}.alpha": alpha})
    yield from parts()
    yield from values()
    yield from products()
    yield "two ranks", written({**lora(rank=4), **lora(CONVOLUTION, rank=3)})
    yield "a rank larger than its layer", written(lora(rank=500))
    yield "both of its names", written({**lora(), **kohya()})


def parts() -> Iterator[tuple[str, bytes]]:
    """One tensor of many is of another shape."""
    good = {"dora_scale": kohya, "lora_mid.weight": kohya, "lokr_w1": kronecker}
    good |= {f"hada_{role}": hadamard for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1")}
    good |= {f"lokr_{role}": kronecker for role in ("w2_a", "w2_b", "t2", "w2")}
    for shape in [*SHAPES, (16, 1), (1, 16), (1, 16, 1, 1), (17,), (4, 4)]:
        for layer, (role, make) in itertools.product((KOHYA, KOHYA_CONVOLUTION), good.items()):
            bad = {**make(layer), f"{layer}.{role}": ones(*shape)}
            yield f"{role} of {shape} in {layer}", written(bad)
        both = {f"{KOHYA}.hada_t1": ones(*shape), f"{KOHYA}.hada_t2": ones(*shape)}
        yield f"cores of {shape}", written({**hadamard(), **both})
        for word in ("<it>", "emb_params", "clip_l"):
            yield f"{word} of {shape}", written({word: ones(*shape)})


def values() -> Iterator[tuple[str, bytes]]:
    """A tensor is not there, or has no numbers that can be used."""
    for good in (lora(), kohya(), hadamard(), kronecker(), {"<it>": ones(2, 768)}, {"emb_params": ones(2, 768)}):
        for left in good:
            yield f"without {left}", written({name: tensor for name, tensor in good.items() if name != left})
        for value, name in itertools.product((float("nan"), float("inf"), -float("inf"), 3e38, 1e-45), good):
            yield f"{value} in {name}", written({**good, name: torch.full_like(good[name], value)})


def products() -> Iterator[tuple[str, bytes]]:
    """Small factors of what no memory holds."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "8 GB": {"lokr_w1_a": (2000, 1), "lokr_w1_b": (1, 2000), "lokr_w2": (1000, 1000)},
        "16 GB": {f"hada_{part}": (1500, 1500) for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
        "1 TB": {"hada_t1": (1000, 1, 30, 30), "hada_w1_a": (1000, 4), "hada_w1_b": (1, 400_000)},
        "3 TB": {
            "lora_down.weight": (1, 900_000, 1, 1),
            "lora_mid.weight": (900, 1, 30, 30),
            "lora_up.weight": (4, 900),
        },
    }
    for size, tensors in shapes.items():
        base = hadamard() if size == "1 TB" else {}
        yield (
            f"a product of {size}",
            written(base | {f"{KOHYA}.{role}": ones(*shape) for role, shape in tensors.items()}),
        )


NAMES = (
    "",
    ".",
    "..",
    "lora",
    ".lora_A.weight",
    "lora_unet_",
    "lora_te_",
    "lora_te9_x",
    "lycoris_",
    "../../etc/passwd",
    "/etc/passwd",
    "a\nb",
    "\x1b]0;owned\x07",
    "\u202eabc",
    "👩🏽‍🚀",
    "e\u0301",
    "x" * 5000,
    "unet",
    "unet.",
    "unet..",
    "unet.x",
    "text_encoder.x",
    "text_encoder_9.x",
    "transformer.x",
    "base_model.model.x",
    "base_model.model." * 200 + "x",
    "diffusion_model.x",
    "lora_unet_middle_block_9_x",
    "lora_unet_middle_block_2_in_layers_2",
    "lora_unet_input_blocks_0_0_x",
    "lora_unet_out_0",
    "lora_unet_input_blocks_" + "9" * 5000 + "_0_op",
    "lora_unet_output_blocks_-1_0_x",
    "lora_unet_input_blocks_99999999_1_x",
    "unet.mid_block.foo.7.x",
    "unet.mid_block.resnets.9.conv1",
    "unet.up_blocks.99.resnets.9.conv1",
    "unet.mid_block.attentions.1.x",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_double_blocks_x_img_attn_qkv",
    "double_blocks.0.img_attn.qkv.7",
    "double_blocks.0.img_attn.qkv.qkv",
    "double_blocks.0.processor.qkv_lora1",
    "single_blocks.0.linear1",
    "single_blocks.0.linear1.9",
    "lora_unet_joint_blocks_0_x_block_attn_qkv",
    "lora_unet_joint_blocks_0_context_block_adaLN_modulation_1",
    "transformer.norm_out.linear",
    "transformer.transformer_blocks.0.norm1_context.linear",
    "transformer.transformer_blocks.0.attn.to_q",
    "lora_te3_encoder_block_0_x",
    "text_encoders.t5xxl.transformer.encoder.block.0",
    "clip_l.text_model.x",
    "clip_g.x",
    "t5.encoder.block.0.layer",
    "time_embed.0",
    "down_blocks.0.attentions.0.processor.to_q",
    "conv_in",
    "layers.0.attention.qkv",
    "layers.0.attention.out",
    "noise_refiner.0.x",
    "unet.down_blocks.0.attentions.0.to_out",
    "proj_out",
    "all_final_layer.x",
    "lora_unet_single_blocks_0_linear1",
)
CONFIGS = (
    "",
    "null",
    "[]",
    "3",
    '"a"',
    "{",
    "[" * 100_000,
    '{"a":' * 50_000,
    '{"unet.lora_alpha": "x"}',
    '{"unet.lora_alpha": [1]}',
    '{"unet.lora_alpha": NaN}',
    '{"unet.lora_alpha": Infinity}',
    '{"unet.lora_alpha": 1e999}',
    '{"unet.lora_alpha": {"a": 1}}',
    '{"unet.lora_alpha": ' + "9" * 4000 + "}",
    '{"unet.lora_alpha": ' + "9" * 400 + "}",
    '{"unet.lora_alpha": true}',
    '{"unet.alpha_pattern": 3}',
    '{"unet.alpha_pattern": [1]}',
    '{"unet.alpha_pattern": "ab"}',
    '{"unet.alpha_pattern": ["ab"]}',
    '{"unet.alpha_pattern": {"(": 1}}',
    '{"unet.alpha_pattern": {"[": 1}}',
    '{"unet.alpha_pattern": {"*": 1}}',
    '{"unet.alpha_pattern": {"((([a-z_0-9.]+)+)+)+!": 1}}',
    '{"unet.alpha_pattern": {"(a|a)(a|a)(.*)(.*)(.*)(.*)(.*)(.*)!": 1}}',
    '{"unet.alpha_pattern": {".*to_q": null}}',
    '{"unet.alpha_pattern": {".*to_q": "x"}}',
    '{"unet.use_rslora": "x", "unet.lora_alpha": 1}',
    '{"unet.alpha_pattern": {"(?P<a>": 1}}',
    '{"unet.alpha_pattern": {"\\\\": 1}}',
    '{"unet.alpha_pattern": {"' + "(" * 200 + '": 1}}',
)
SAID = (
    "trigger",
    "base",
    "method",
    "architecture",
    "modelspec.architecture",
    "ss_base_model_version",
    "steps",
    "ss_network_dim",
)
WORDS = (
    "",
    " ",
    "a\nb",
    "\x1b[2J",
    "\u202eabc",
    "x" * 100_000,
    "../../owned",
    "$(touch owned)",
    "`touch owned`",
    "\0",
    "9" * 5000,
    "sdxl",
    "z_image",
    "flux-2",
    "NaN",
    "/" + "x" * 300,
)


def names() -> Iterator[tuple[str, bytes]]:
    """Layers and metadata of any name."""
    for name in NAMES:
        yield f"a layer called {name[:60]!r}", written(lora(name))
        yield f"kohya's {name[:60]!r}", written(kohya(name))
        yield f"a LoHa of {name[:60]!r}", written(hadamard(name))
        yield f"a word called {name[:60]!r}", written({name: ones(2, 768)})
        yield f"a stack of {name[:60]!r}", written(kohya(name, m=48), {"architecture": "sdxl"})
        yield f"a number of {name[:60]!r}", written({name: ones()})
    for config in CONFIGS:
        yield f"a configuration of {config[:60]}", written(lora(), {"lora_adapter_metadata": config})
    for key in SAID:
        for word in WORDS:
            yield f"{key} {word[:30]!r} in a LoRA", written(lora(), {key: word})
            yield f"{key} {word[:30]!r} in a word", written({"emb_params": ones(1, 768)}, {key: word})
    yield "five thousand tensors", written({f"x{number}.lora_A.weight": ones(1, 1) for number in range(5000)})
    yield "five thousand words", written({f"x{number}": ones(1) for number in range(5000)})
    yield "ten thousand facts", written(lora(), {f"k{number}": "v" for number in range(10_000)})


def others() -> Iterator[tuple[str, bytes]]:
    """What is no safetensors file at all, and what was one."""
    yield "nothing", b""
    yield "zeros", bytes(100_000)
    yield "noise", random.Random(5).randbytes(100_000)
    yield "a pickle", pickle.dumps(hostile.Owns("owned"))
    yield "a pickle of torch", pickled({"a": hostile.Owns("owned")})
    yield "a zip bomb", hostile.zipped({"a": bytes(10**7)})
    yield "a picture", hostile.png()
    yield "a page", b"<!DOCTYPE html><html>404"
    yield "a pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for seed, (what, content) in enumerate(GOOD.items()):
        for how, bad in hostile.damaged(content, seed):
            yield f"{what} {how}", bad


@cache
def adapters(group: str) -> dict[str, bytes]:
    """What it is -> content of a file that is named as safetensors."""
    return dict(GROUPS[group]())


GROUPS = {"lies": lies, "shapes": shapes, "names": names, "others": others}


class Calls:
    """A pickle that calls something."""

    def __init__(self, function: Any, *arguments: Any):
        self.given = function, arguments

    def __reduce__(self) -> Any:
        return self.given


def pickled(held: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(held, stream)
    return stream.getvalue()


@cache
def pickles() -> dict[str, bytes]:
    """What it is -> content of a file that is named as a pickle of torch."""
    good = pickled({"string_to_param": {"*": ones(2, 768)}, "name": "it"})
    table = pickled(kohya())
    found = {f"an embedding {how}": bad for how, bad in hostile.damaged(good, 20)}
    found |= {f"a LoRA {how}": bad for how, bad in hostile.damaged(table, 21)}
    held: dict[str, Any] = {
        "nothing": None,
        "a list": [ones(1)],
        "a number": 3,
        "a tensor": ones(2, 768),
        "a section": {},
        "texts": {"a": "b"},
        "string_to_param of a list": {"string_to_param": [1]},
        "string_to_param of texts": {"string_to_param": {"*": "a"}},
        "string_to_param of nothing": {"string_to_param": {}},
        "a name of a list": {"string_to_param": {"*": ones(1, 768)}, "name": [1]},
        "numbers as names": {1: ones(1)},
        "a state of a list": {"state_dict": [1]},
        "a state of states": {"state_dict": {"state_dict": {}}},
        "whole numbers": {"string_to_param": {"*": torch.ones(2, 768, dtype=torch.int64)}},
        "itself": itself(),
        "a stretched tensor": {"string_to_param": {"*": ones(1, 1).expand(200_000, 200_000)}},
        "a stretched LoRA": {name: ones().expand(100_000, 100_000) for name in lora()},
        "a sparse tensor": {"string_to_param": {"*": ones(2, 768).to_sparse()}},
        "no tensor": {"emb_params": torch.ones(2, 768, device="meta")},
        "code": {"a": hostile.Owns("owned")},
        "a system call": Calls(__import__("os").system, "touch owned"),
        "an evaluation": Calls(eval, "open('owned', 'w')"),
        "a large tensor": Calls(torch.zeros, 10**12),
        "deep": deep(),
    }
    found |= {f"of {what}": pickled(value) for what, value in held.items()}
    found |= {f"plain, of {what}": pickle.dumps(value) for what, value in held.items() if what != "no tensor"}
    found |= {
        "nothing": b"",
        "zeros": bytes(10_000),
        "noise": random.Random(6).randbytes(10_000),
        "a picture": hostile.png(),
        "a zip": hostile.zipped({"a": b"b"}),
        "a zip bomb": hostile.zipped({"archive/data.pkl": bytes(10**8), "archive/version": b"3"}),
        "a zip upwards": hostile.zipped({"../../owned/data.pkl": pickle.dumps({}), "../../owned/version": b"3"}),
        "safetensors": GOOD["kohya"],
        "a promise": b"\x80\x02\x8e" + struct.pack("<Q", 2**62),
        "a long text": b"\x80\x02X" + b"\xff" * 8,
    }
    return found


def itself() -> dict[str, Any]:
    held: dict[str, Any] = {}
    held["string_to_param"] = held
    return held


def deep() -> Any:
    held: Any = 1
    for _ in range(300):
        held = [held]
    return {"string_to_param": {"*": held}}
