"""Adapter files: every format x every architecture, there and back, at alpha not equal to rank."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.adapter import AdapterWeights, Update, WordVectors
from finetune.errors import UserError
from finetune.export import save_lora
from finetune.families.base import families
from finetune.files import read_shapes
from finetune.formats import formats, read, to_diffusers, write
from finetune.originals import in_diffusers, originals
from finetune.variants import adapter_weights

TOLERANCE = 1e-4
ATTENTION = r"(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|ff\.net\.2|feed_forward\.w1|(q|k|v|out)_proj|fc1)$"
KEYS = json.loads((Path(__file__).parent / "data" / "kohya_keys.json").read_text())
LORA_FORMATS = [name for name in formats.names() if formats[name].kind is AdapterWeights]
EMBEDDING_FORMATS = [name for name in formats.names() if formats[name].kind is WordVectors]
VECTORS = {
    "sd1": {"clip_l": torch.randn(2, 768)},
    "sd2": {"clip_l": torch.randn(1, 1024)},
    "sdxl": {"clip_l": torch.randn(3, 768), "clip_g": torch.randn(3, 1280)},
    "sd3": {"clip_l": torch.randn(1, 768), "clip_g": torch.randn(1, 1280), "t5": torch.randn(1, 4096)},
    "flux": {"clip_l": torch.randn(2, 768), "t5": torch.randn(2, 4096)},
    "z_image": {"qwen3": torch.randn(2, 2560)},
}


def layers(model: nn.Module, pattern: str = "") -> list[str]:
    kinds = nn.Linear | nn.Conv2d
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and re.search(pattern, name)]


@dataclass(frozen=True)
class Taught:
    """A plain pipeline, the same with random LoRAs of peft at alpha 2 and rank 4, and what both predict."""

    plain: Any
    pipeline: Any
    before: Tensor
    after: Tensor

    def error(self, adapter: Any) -> float:
        """Of the prediction with a state dict or a file that diffusers loads, relative to what the LoRAs change."""
        given = {"weight_name": adapter.name} if isinstance(adapter, Path) else {}
        self.plain.load_lora_weights(adapter.parent if isinstance(adapter, Path) else adapter, **given)
        reloaded = tiny.predict(self.plain)
        self.plain.unload_lora_weights()
        change = float((self.after - self.before).norm())
        assert change > 0.003 * float(self.before.norm())
        return float((reloaded - self.after).norm()) / change


def parts_of(architecture: str) -> tuple[str, ...]:
    """The denoiser, and the text encoders that a LoRA reaches."""
    family = families[tiny.DEEP[architecture][0]]
    return (family.denoiser_name, *family.text_lora)


def teach(architecture: str, pattern: str = "", encoders: bool = True, **settings: Any) -> Taught:
    plain, pipeline = (tiny.DEEP[architecture][1]() for _ in range(2))
    denoiser, *others = parts_of(architecture)
    for name in (denoiser, *others) if encoders else (denoiser,):
        part = getattr(pipeline, name)
        targets = layers(part, pattern if name == denoiser else ATTENTION)
        part.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=targets, **settings))
        for key, parameter in part.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.2)
            if "magnitude" in key:
                parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    return Taught(plain, pipeline, tiny.predict(plain), tiny.predict(pipeline))


def export(taught: Taught, architecture: str, folder: Path) -> Path:
    """As a run exports it: every scale is 1."""
    parts = {part: adapter_weights(getattr(taught.pipeline, part)) for part in parts_of(architecture)}
    return save_lora(parts, folder, torch.float32, {"trigger": "sks", "base": "toy", "architecture": architecture})


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Architecture -> LoRAs in all of its layers, and the file of our export."""
    made: dict[str, tuple[Taught, Path]] = {}

    def make(name: str) -> tuple[Taught, Path]:
        if name not in made:
            lora = teach(name)
            made[name] = lora, export(lora, name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def at_another_scale(weights: AdapterWeights) -> AdapterWeights:
    """The same updates, in larger weights at a scale of 0.3."""
    parts = {
        part: {name: replace(update, up=update.up / 0.3, scale=0.3) for name, update in layers.items()}
        for part, layers in weights.parts.items()
    }
    return replace(weights, parts=parts)


def read_lora(file: Path, **settings: Any) -> AdapterWeights:
    content = read(file, **settings)
    assert isinstance(content, AdapterWeights)
    return content


@pytest.mark.parametrize("architecture", tiny.DEEP)
@pytest.mark.parametrize("to", LORA_FORMATS)
def test_a_lora_predicts_the_same_through_every_format(architecture: str, to: str, taught: Any, tmp_path: Path):
    lora, file = taught(architecture)
    assert lora.error(file) < TOLERANCE
    there = read_lora(write(at_another_scale(read_lora(file)), tmp_path / "there.safetensors", to))
    assert there.architecture == architecture and there.header["trigger"] == "sks"
    assert lora.error(to_diffusers(there)) < TOLERANCE
    back = write(there, tmp_path / "back.safetensors", "diffusers")
    assert lora.error(back) < TOLERANCE
    assert read_shapes(back)[0].keys() == read_shapes(file)[0].keys()


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "flux", "z_image"])
def test_diffusers_own_conversion_of_a_kohya_file_predicts_the_same(architecture: str, tmp_path: Path):
    # diffusers has no loader for kohya's SD3, and expects the width of the real FLUX in its single blocks.
    lora = teach(architecture, f"^transformer_blocks.*{ATTENTION}" if architecture == "flux" else ATTENTION)
    weights = at_another_scale(read_lora(export(lora, architecture, tmp_path)))
    assert lora.error(write(weights, tmp_path / "lora.kohya.safetensors", "kohya")) < TOLERANCE


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "flux", "z_image"])
def test_a_dora_keeps_its_magnitudes_through_every_format(architecture: str, tmp_path: Path):
    denoiser, *_ = parts_of(architecture)
    # Fused layers can only be DoRAs when all of their parts are.
    lora = teach(architecture, ATTENTION.replace("fc1", "proj_mlp"), encoders=False, use_dora=True)
    tensors = {}
    for name, value in getattr(lora.pipeline, denoiser).state_dict().items():
        if "lora_" in name:
            plain = name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
            tensors[f"{denoiser}.{plain}"] = (value * 0.5 if "lora_B" in name else value).contiguous()
    save_file(tensors, tmp_path / "dora.safetensors", metadata={"architecture": architecture})
    content = read_lora(tmp_path / "dora.safetensors")
    assert content.kind == "DoRA" and lora.error(to_diffusers(content)) < TOLERANCE
    kohya = read_lora(write(at_another_scale(content), tmp_path / "kohya.safetensors", "kohya"))
    assert lora.error(to_diffusers(kohya)) < TOLERANCE


@pytest.mark.parametrize("architecture", VECTORS)
@pytest.mark.parametrize("to", EMBEDDING_FORMATS)
def test_an_embedding_is_the_same_through_every_format(architecture: str, to: str, tmp_path: Path):
    word = WordVectors("<it>", VECTORS[architecture], architecture, {"base": "toy"})
    if len(word.vectors) > 1 and to != "embedding_comfyui":
        with pytest.raises(UserError, match="one text encoder"):
            write(word, tmp_path / "word.safetensors", to)
        return
    back = read(write(word, tmp_path / "word.safetensors", to))
    assert isinstance(back, WordVectors)
    assert (back.word, back.architecture, back.header["base"]) == ("<it>", architecture, "toy")
    assert all(torch.equal(back.vectors[name], vectors) for name, vectors in word.vectors.items())


def test_a_pickle_is_read_and_written_only_when_asked(tmp_path: Path):
    word = WordVectors("it", VECTORS["sd1"], "sd1")
    file = write(word, tmp_path / "it.pt", "embedding_a1111")
    with pytest.raises(UserError, match="--allow-pickle"):
        read(file)
    back = read(file, allow_pickle=True)
    assert isinstance(back, WordVectors) and back.word == "it"
    assert torch.equal(back.vectors["clip_l"], word.vectors["clip_l"])
    with pytest.raises(UserError, match=r"written as \.safetensors"):
        write(word, tmp_path / "it.bin.pt", "embedding")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"string_to_param": {"*": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="running code"):
        read(tmp_path / "evil.pt", allow_pickle=True)
    assert "code ran" not in capsys.readouterr().out


REAL = {
    "sd1": lambda: UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
    "sdxl": lambda: UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "sd3": lambda: SD3Transformer2DModel(dual_attention_layers=tuple(range(13)), num_layers=24, qk_norm="rms_norm"),
    "flux": lambda: FluxTransformer2DModel(guidance_embeds=True),
    "z_image": lambda: ZImageTransformer2DModel(n_layers=3),
}


@pytest.mark.parametrize("architecture", REAL)
def test_every_layer_of_the_real_model_has_an_original_and_public_files_name_it_so(architecture: str):
    with torch.device("meta"):
        model = REAL[architecture]()
    shapes = {name: model.get_submodule(name).weight.shape for name in layers(model)}
    updates = {
        name: Update(torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *[1] * (len(shape) - 2)))
        for name, shape in shapes.items()
    }
    names = originals(updates, architecture)
    written = {f"lora_unet_{name.replace('.', '_')}" for name in names}
    public = {key.partition(".")[0] for key in KEYS[architecture] if key.startswith("lora_unet_")}
    assert public and not public - written
    back = {layer for name in written for layer in in_diffusers(name.removeprefix("lora_unet_"), architecture)}
    assert back == set(shapes)


@pytest.mark.parametrize("architecture", KEYS)
def test_public_key_lists_are_read_as_what_they_are(architecture: str, tmp_path: Path):
    tensors = {}
    for key, (out, into, *kernel) in KEYS[architecture].items():
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, into, *kernel)
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, 4, *[1 for _ in kernel])
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "public.safetensors")
    content = read_lora(tmp_path / "public.safetensors")
    assert content.architecture == architecture
    written = write(content, tmp_path / "again.safetensors", "kohya")
    assert read_shapes(written)[0].keys() == tensors.keys()
    if architecture not in TABLES_FUSED:
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(written).items())


TABLES_FUSED = ("flux", "sd3", "z_image")


def test_what_kohya_fused_comes_back_exactly_with_as_few_ranks(tmp_path: Path):
    down, up = torch.randn(4, 32), torch.randn(96, 4)
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "dense.safetensors")
    content = read_lora(tmp_path / "dense.safetensors")
    for index, name in enumerate(("to_q", "to_k", "to_v")):
        update = content.parts["transformer"][f"transformer_blocks.0.attn.{name}"]
        assert torch.equal(update.up, up[index * 32 : index * 32 + 32]) and update.scale == 0.25
    again = load_file(write(content, tmp_path / "again.safetensors", "kohya"))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_zero_blocks_are_dropped_when_a_fused_layer_is_split(tmp_path: Path):
    parts = {f"transformer_blocks.0.attn.{name}": Update(torch.randn(rank, 32), torch.randn(32, rank))
             for name, rank in (("to_q", 3), ("to_v", 5))}  # fmt: skip
    file = write(AdapterWeights({"transformer": parts}, "flux"), tmp_path / "lora.safetensors", "kohya")
    back = read_lora(file).parts["transformer"]
    assert back.keys() == parts.keys()
    assert all(torch.equal(back[name].up, update.up) and torch.equal(back[name].down, update.down)
               for name, update in parts.items())  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{}.weight", "attn1.to_q"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{}.weight", "to_out.0"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora.{}.weight", "attn1.to_k"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.{}.weight", "self_attn.q_proj"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.{}.weight", "mlp.fc1"),
        (
            "text_encoder.encoder.layers.0.self_attn.q_proj.lora.{}.weight",
            "text_model.encoder.layers.0.self_attn.q_proj",
        ),
        ("base_model.model.transformer_blocks.0.attn.to_q.lora.{}.weight", "transformer_blocks.0.attn.to_q"),
        ("unet.base_model.model.up_blocks.0.resnets.0.conv1.lora.{}.weight", "up_blocks.0.resnets.0.conv1"),
    ],
)
def test_older_layouts_of_diffusers_and_peft_are_read(old: str, new: str, tmp_path: Path):
    save_file({old.format("down"): torch.ones(2, 8), old.format("up"): torch.ones(8, 2)}, tmp_path / "old.safetensors")
    ((part, name, update),) = read_lora(tmp_path / "old.safetensors").updates()
    assert f"{part}.{name}".endswith(new) and update.rank == 2
    assert part == ("transformer" if old.startswith("base") else old.partition(".")[0])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("diffusion_model.double_blocks.1.img_attn.proj", "transformer.transformer_blocks.1.attn.to_out.0"),
        ("single_blocks.3.linear2", "transformer.single_transformer_blocks.3.proj_out"),
        ("diffusion_model.layers.2.attention.to_q", "transformer.layers.2.attention.to_q"),
        ("diffusion_model.layers.2.attention.out", "transformer.layers.2.attention.to_out.0"),
        ("diffusion_model.input_blocks.4.1.proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1",
         "text_encoder.text_model.encoder.layers.3.mlp.fc1"),
        ("lora_transformer_single_transformer_blocks_3_attn_to_q",
         "transformer.single_transformer_blocks.3.attn.to_q"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pair", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_names_of_comfyui_and_onetrainer_are_read(key: str, expected: str, pair: tuple[str, str], tmp_path: Path):
    tensors = dict(zip((f"{key}.{name}.weight" for name in pair), (torch.ones(2, 8), torch.ones(8, 2)), strict=True))
    save_file(tensors, tmp_path / "lora.safetensors")
    ((part, name, _),) = read_lora(tmp_path / "lora.safetensors").updates()
    assert f"{part}.{name}" == expected


def test_alphas_in_the_header_of_diffusers_are_heeded(taught: Any, tmp_path: Path):
    config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 8}, "unet.rank_pattern": {}}
    tensors = {
        f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.{name}.lora_{side}.weight": torch.ones(shape)
        for name in ("to_q", "to_k")
        for side, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    content = read_lora(tmp_path / "a.safetensors")
    assert {name[-4:]: update.alpha for *_, name, update in content.updates()} == {"to_q": 8, "to_k": 2}
    written = write(content, tmp_path / "b.safetensors", "diffusers")
    assert "lora_adapter_metadata" not in read_shapes(written)[1]
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    both = load_file(written)
    product = both[f"{layer}.lora_B.weight"] @ both[f"{layer}.lora_A.weight"]
    assert torch.equal(product, torch.full((8, 8), 8.0))


def test_half_precision_is_kept_and_alpha_is_exact(tmp_path: Path):
    update = Update(torch.randn(96, 32).half(), torch.randn(32, 96).half(), scale=1 / 96)
    weights = AdapterWeights({"unet": {"mid_block.attentions.0.proj_in": update}}, "sd1")
    file = write(weights, tmp_path / "lora.safetensors", "kohya")
    ((*_, back),) = read_lora(file).updates()
    assert torch.equal(back.up, update.up) and back.up.dtype == torch.float16 and back.alpha == 1.0
    folded = to_diffusers(read_lora(file))
    product = folded["unet.mid_block.attentions.0.proj_in.lora_B.weight"].half().float() @ (
        folded["unet.mid_block.attentions.0.proj_in.lora_A.weight"].half().float()
    )
    exact = update.up.float() @ update.down.float() / 96
    assert float((product - exact).norm() / exact.norm()) < 1e-3


def test_a_kohya_file_says_what_it_is_by_the_public_fields(taught: Any, tmp_path: Path):
    *_, file = taught("sdxl")
    written = write(at_another_scale(read_lora(file)), tmp_path / "fox.safetensors", "kohya")
    with safe_open(written, "pt") as opened:
        said = opened.metadata()
    assert said["ss_network_dim"] == "4" and said["ss_network_alpha"] == "1.2"
    assert said["ss_base_model_version"] == "sdxl_base_v1-0" and said["ss_output_name"] == "fox"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.trigger_phrase"] == "sks" and said["modelspec.title"] == "fox"
    import hashlib

    data = written.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert said["sshs_model_hash"] == digest and said["modelspec.hash_sha256"] == f"0x{digest}"


def product_of(update: Update) -> Tensor:
    up, down = update.factors()
    return up @ down


@pytest.mark.parametrize("convolution", [False, True])
def test_a_loha_becomes_the_lora_of_its_product(convolution: bool, tmp_path: Path):
    name, kernel = ("resnets_0_conv1", 3) if convolution else ("attentions_0_proj_in", 1)  # of Stable Diffusion 1
    a1, a2 = torch.randn(2, 8, 2)
    b1, b2 = torch.randn(2, 2, 6 * kernel**2)
    layer = f"lora_unet_mid_block_{name}"
    tensors = {
        f"{layer}.hada_{role}": value.clone()
        for role, value in {"w1_a": a1, "w1_b": b1, "w2_a": a2, "w2_b": b2}.items()
    }
    save_file({**tensors, f"{layer}.alpha": torch.tensor(1.0)}, tmp_path / "loha.safetensors")
    content = read_lora(tmp_path / "loha.safetensors")
    ((*_, update),) = content.updates()
    assert content.kind == "LoHa" and update.rank == 4 and update.down.shape == (4, 6, kernel, kernel)
    torch.testing.assert_close(product_of(update), (a1 @ b1) * (a2 @ b2) / 2, atol=1e-5, rtol=1e-4)


def test_tucker_cores_of_loha_and_locon_are_multiplied_in(tmp_path: Path):
    core1, core2, a, b = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3), torch.randn(2, 8), torch.randn(2, 6)
    layer = "lora_unet_mid_block_resnets_0_conv1"
    halves = {"w1_a": a, "w1_b": b, "t1": core1, "w2_a": a.flip(0).contiguous(), "w2_b": b * 2, "t2": core2}
    save_file({f"{layer}.hada_{role}": value for role, value in halves.items()}, tmp_path / "loha.safetensors")
    ((*_, update),) = read_lora(tmp_path / "loha.safetensors").updates()
    first = torch.einsum("ijkl,jr,ip->prkl", core1, b, a)
    second = torch.einsum("ijkl,jr,ip->prkl", core2, b * 2, a.flip(0))
    torch.testing.assert_close(product_of(update), (first * second).flatten(1), atol=1e-4, rtol=1e-4)
    locon = {"lora_up": torch.randn(8, 2, 1, 1), "lora_down": torch.randn(2, 6, 1, 1), "lora_mid": core1}
    save_file({f"{layer}.{role}.weight": value for role, value in locon.items()}, tmp_path / "locon.safetensors")
    ((*_, update),) = read_lora(tmp_path / "locon.safetensors").updates()
    expected = torch.einsum("pi,ijkl,jr->prkl", locon["lora_up"][..., 0, 0], core1, locon["lora_down"][..., 0, 0])
    torch.testing.assert_close(product_of(update), expected.flatten(1), atol=1e-5, rtol=1e-4)


def test_a_small_lokr_becomes_the_lora_of_its_product_and_a_large_one_is_refused(tmp_path: Path):
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    one, a, b = torch.randn(2, 2), torch.randn(8, 1), torch.randn(1, 8)
    small = {"lokr_w1": one, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(0.5)}
    save_file({f"{layer}.{role}": value for role, value in small.items()}, tmp_path / "lokr.safetensors")
    content = read_lora(tmp_path / "lokr.safetensors")
    ((*_, update),) = content.updates()
    assert content.kind == "LoKr"
    torch.testing.assert_close(product_of(update), torch.kron(one, a @ b) * 0.5, atol=1e-5, rtol=1e-4)
    save_file({f"{layer}.lokr_w1": one, f"{layer}.lokr_w2": torch.randn(8, 8)}, tmp_path / "full.safetensors")
    with pytest.raises(UserError, match="larger than the layer"):
        read(tmp_path / "full.safetensors")


def test_what_diffusers_cannot_load_is_refused_with_the_reason(tmp_path: Path):
    layer = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "t5.safetensors", metadata={"ss_base_model_version": "sd3"})
    content = read_lora(tmp_path / "t5.safetensors")
    assert list(content.parts) == ["text_encoder_3"]
    with pytest.raises(UserError, match="no loader for a LoRA of T5"):
        to_diffusers(content)


PAIR = {"unet.x.lora_A.weight": torch.ones(2, 8), "unet.x.lora_B.weight": torch.ones(8, 2)}
HOSTILE = {
    "empty": ({}, "holds no tensors"),
    "no-adapter": ({"decoder.weight": torch.ones(2), "encoder.weight": torch.ones(3)}, "neither a LoRA nor"),
    "no-up": ({"unet.x.lora_A.weight": torch.ones(2, 8)}, "up is missing"),
    "no-down": ({"lora_unet_x.lora_up.weight": torch.ones(2, 8)}, "down is missing"),
    "no-half-of-loha": ({"lora_unet_x.hada_w1_a": torch.ones(2, 8)}, "hada_w1_b is missing"),
    "ranks": ({**PAIR, "unet.x.lora_B.weight": torch.ones(8, 3)}, "do not fit each other"),
    "dimensions": ({**PAIR, "unet.x.lora_B.weight": torch.ones(8)}, "do not fit each other"),
    "alpha": ({**PAIR, "unet.x.alpha": torch.ones(2)}, "alpha is not one number"),
    "alpha-is-nan": ({**PAIR, "unet.x.alpha": torch.tensor(float("nan"))}, "alpha is not"),
    "nan": ({**PAIR, "unet.x.lora_B.weight": torch.full((8, 2), float("nan"))}, "NaN or infinity"),
    "stranger": ({**PAIR, "unet.x.diff": torch.ones(8)}, "no part of a low-rank adapter"),
    "dora-of-inputs": ({**PAIR, "unet.x.dora_scale": torch.ones(1, 8, 1)}, "magnitude"),
    "no-part": ({"foo.lora_A.weight": torch.ones(2, 8), "foo.lora_B.weight": torch.ones(8, 2)}, "names no part"),
    "counts": ({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(3, 8)}, "as many vectors"),
    "word-of-three-axes": ({"<it>": torch.ones(2, 3, 4)}, r"\(K, D\)"),
    "word-of-integers": ({"<it>": torch.ones(2, 3, dtype=torch.int64)}, r"\(K, D\)"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_wrong_is_refused_with_words(case: str, tmp_path: Path):
    tensors, problem = HOSTILE[case]
    file = tmp_path / "hostile.safetensors"
    save_file(tensors, file)
    with pytest.raises(UserError, match=problem) as caught:
        read(file)
    assert str(file) in str(caught.value)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path):
    save_file(PAIR, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    for length in (0, 5, 40, len(data) - 10):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(UserError, match="cut short"):
            read(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nowhere.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)


def test_a_file_is_replaced_only_when_asked_and_stays_whole_when_writing_fails(tmp_path: Path):
    save_file(PAIR, tmp_path / "lora.safetensors")
    content, before = read(tmp_path / "lora.safetensors"), (tmp_path / "lora.safetensors").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        write(content, tmp_path / "lora.safetensors", "diffusers")
    with pytest.raises(UserError, match="--architecture"):
        write(
            replace(read_lora(tmp_path / "lora.safetensors"), architecture=None),
            tmp_path / "other.safetensors",
            "kohya",
        )
    assert (tmp_path / "lora.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    write(content, tmp_path / "lora.safetensors", "diffusers", overwrite=True)
    assert len(list(tmp_path.iterdir())) == 1
