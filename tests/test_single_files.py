"""Bases in one file under their authors' names: loaded, taught, merged into, and compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lessons
import pytest
import single_files
import tiny
import torch
from diffusers import FluxTransformer2DModel, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from finetune import run
from finetune.adapter import AdapterWeights, Update
from finetune.config import build
from finetune.detection import detect
from finetune.errors import UserError
from finetune.extract import extract
from finetune.families.base import Source, families
from finetune.files import read_shapes
from finetune.formats import write
from finetune.generate import generate
from finetune.load import Adapter
from finetune.merge import merge_into_base
from finetune.originals import clip_name
from finetune.single_file import pieces

BASES = {**tiny.DEEP, "sd2": tiny.DEEP["sd1"]}  # the encoder of Stable Diffusion 2 has other names


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Architecture -> the pipeline, its folder in diffusers' layout, and its file."""
    made: dict[str, tuple[Any, Path, Path]] = {}

    def publish(architecture: str) -> tuple[Any, Path, Path]:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            pipeline = BASES[architecture][1]()
            if architecture == "sd3":  # whose CLIP-L has no projection, which diffusers takes for the identity
                torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
            pipeline.save_pretrained(folder / "folder")
            file = single_files.write_single_file(pipeline, architecture, folder / "base.safetensors")
            made[architecture] = pipeline, folder / "folder", file
        return made[architecture]

    return publish


def load(architecture: str, file: Path, config: Path | None) -> Any:
    source = Source(str(file), config=config and str(config))
    return families[BASES[architecture][0]].load(source, min_snr_gamma=None, zero_terminal_snr=False).pipeline


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl", "sd3", "z_image"])
def test_a_base_in_one_file_is_the_folder_that_it_was_made_from(architecture: str, published: Any):
    pipeline, folder, file = published(architecture)
    loaded = load(architecture, file, folder)
    tiny.assert_as_said(tiny.predict(loaded), tiny.predict(pipeline))
    tiny.assert_same_weights(loaded.vae, pipeline.vae)
    pixels = torch.rand(1, 3, tiny.SIZE, tiny.SIZE)
    with torch.no_grad():
        means = [base.vae.encode(pixels).latent_dist.mean for base in (loaded, pipeline)]
        tiny.assert_as_said(*means)
        tiny.assert_as_said(*(base.vae.decode(means[0]).sample for base in (loaded, pipeline)))


# A base's names; diffusers knows FLUX of the real width alone by them, and a UNet without a prefix not at all.
PUBLISHED = [("sd1", single_files.UNET), ("sdxl", single_files.UNET), *(("sd3", p) for p in ("", single_files.UNET))]
PUBLISHED += [("z_image", ""), ("z_image", single_files.UNET)]


def write_denoiser(published: Any, architecture: str, file: Path, prefix: str | None, **others: torch.Tensor) -> Path:
    """The denoiser alone under its original names, or diffusers' own where `prefix` is None."""
    pipeline, _, whole = published(architecture)
    part = next(iter(single_files.LAYOUTS[architecture]))
    state = getattr(pipeline, part).state_dict()
    if prefix is not None:
        held = {name: value for name, value in load_file(whole).items() if name.startswith(single_files.UNET)}
        state = {prefix + name.removeprefix(single_files.UNET): value for name, value in held.items()}
    save_file({**state, **others}, file)
    return file


def assert_same(loaded: Any, pipeline: Any) -> None:
    tiny.assert_as_said(tiny.predict(loaded), tiny.predict(pipeline))
    tiny.assert_same_weights(loaded.vae, pipeline.vae)


@pytest.mark.parametrize(("architecture", "prefix"), [*PUBLISHED, *((name, None) for name in tiny.DEEP)])
def test_a_denoiser_alone_gets_all_other_parts_from_the_config(
    architecture: str, prefix: str | None, published: Any, tmp_path: Path
):
    pipeline, folder, _ = published(architecture)
    file = write_denoiser(published, architecture, tmp_path / "denoiser.safetensors", prefix)
    assert detect(Source(str(file), config=str(folder))) == BASES[architecture][0]
    assert_same(load(architecture, file, folder), pipeline)


@pytest.mark.parametrize(
    ("architecture", "lacks", "part"),
    [
        ("sd1", "first_stage_model.", "vae"),
        ("sdxl", "first_stage_model.", "vae"),
        ("sdxl", "conditioner.", "text_encoder"),
        ("sd3", "text_encoders.t5", "text_encoder_3"),
    ],
)
def test_the_file_is_read_for_all_that_it_has_and_the_config_for_the_rest(
    architecture: str, lacks: str, part: str, published: Any, tmp_path: Path
):
    pipeline, _, whole = published(architecture)
    held = {name: value for name, value in load_file(whole).items() if not name.startswith(lacks)}
    save_file(held, tmp_path / "most.safetensors")
    other = BASES[architecture][1]()
    with torch.no_grad():
        for name in single_files.LAYOUTS[architecture]:
            if not name.startswith(part):
                next(getattr(other, name).parameters()).fill_(9.0)  # what must not be read
    other.save_pretrained(tmp_path / "config")
    assert_same(load(architecture, tmp_path / "most.safetensors", tmp_path / "config"), pipeline)


def test_a_denoiser_alone_is_refused_without_the_weights_of_the_other_parts(published: Any, tmp_path: Path):
    _, folder, whole = published("z_image")
    file = write_denoiser(published, "z_image", tmp_path / "denoiser.safetensors", "")
    configs = shutil.copytree(folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    for config, problem in {
        None: "lacks the text_encoder, vae. Name a folder in diffusers' layout",
        configs: "lacks the text_encoder, vae, and .*configs does not have their weights: .* no file named",
        tmp_path / "nowhere": "nowhere does not have their weights",
    }.items():
        with pytest.raises(UserError, match=problem):
            load("z_image", file, config)
    with pytest.raises(UserError, match=r"cannot be loaded: .*denoiser\.safetensors lacks the text_encoder, vae\."):
        generate(str(file), "a", size=tiny.SIZE, steps=1)
    with pytest.raises(UserError, match="lacks the text_encoder, and"):  # which diffusers reads from no file
        load("z_image", whole, configs)


def test_pictures_are_drawn_with_a_denoiser_alone(published: Any, tmp_path: Path):
    _, folder, _ = published("z_image")
    file = write_denoiser(published, "z_image", tmp_path / "denoiser.safetensors", "")
    small: dict[str, Any] = {"size": tiny.SIZE, "steps": 2}
    (one,), (other,) = generate(str(folder), "a", **small), generate(str(file), "a", config=str(folder), **small)
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("architecture", ["sd3", "z_image"])
def test_weights_that_were_rounded_to_8_bits_are_read(architecture: str, published: Any, tmp_path: Path):
    pipeline, folder, _ = published(architecture)
    tensors = load_file(write_denoiser(published, architecture, tmp_path / "denoiser.safetensors", ""))
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}, tmp_path / "fp8.safetensors")
    loaded = load(architecture, tmp_path / "fp8.safetensors", folder).transformer.state_dict()
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(loaded[name], value.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("beside", ["scale_weight", "weight_scale", "comfy_quant", "weight.absmax"])
def test_weights_that_are_scaled_or_packed_are_refused(beside: str, published: Any, tmp_path: Path):
    _, folder, _ = published("z_image")
    scale = {f"layers.0.attention.qkv.{beside}": torch.ones(1)}
    file = write_denoiser(published, "z_image", tmp_path / "denoiser.safetensors", "", **scale)
    with pytest.raises(UserError, match=rf"packed into fewer bits \(beside them is .*{beside}\)"):
        load("z_image", file, folder)
    with pytest.raises(UserError, match="packed into fewer bits"):
        detect(Source(str(file)))


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "flux", "z_image"])  # of SD3, diffusers reads the real width
def test_the_family_of_a_single_file_is_found_by_its_names(architecture: str, published: Any):
    assert detect(Source(str(published(architecture)[2]))) == BASES[architecture][0]


@pytest.mark.parametrize(
    ("architecture", "family"),
    [("sd1", "auto"), ("sdxl", "auto"), ("sd3", "stable_diffusion_3"), ("z_image", "auto")],
)
def test_a_lora_learns_the_same_on_a_base_in_one_file(architecture: str, family: str, published: Any, tmp_path: Path):
    _, folder, file = published(architecture)
    alone = {"source": str(file), "config": str(folder), "family": family}
    bases: dict[str, dict[str, str]] = {"folder": {}, "file": alone}
    learnt = []
    for name, base in bases.items():
        way = {"rank": 4, "text_encoder": architecture != "z_image"}
        recipe = lessons.recipe(folder, tmp_path / name, "lora", way, train={"steps": 2})
        tree = recipe.dump()
        result = run.train(build(type(recipe), {**tree, "base": {**tree["base"], **base}}))
        assert result.verdict.passed
        learnt.append(load_file(result.files[0]))
    assert learnt[0].keys() == learnt[1].keys()
    assert all(torch.equal(tensor, learnt[1][name]) for name, tensor in learnt[0].items())


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    # Transformers are also published alone, and then without their prefix.
    [*((name, single_files.UNET) for name in BASES), *((name, "") for name in ("sd3", "flux", "z_image"))],
)
def test_every_weight_that_a_lora_can_change_is_found_in_the_file(
    architecture: str, prefix: str, published: Any, tmp_path: Path
):
    pipeline, *_ = published(architecture)
    file = single_files.write_single_file(pipeline, architecture, tmp_path / "base.safetensors", prefix)
    tensors, found = load_file(file), pieces(read_shapes(file)[0], architecture)
    assert found.keys() == single_files.LAYOUTS[architecture].keys()
    for part, weights in found.items():
        state = {clip_name(name): value for name, value in getattr(pipeline, part).state_dict().items()}
        missing = state.keys() ^ weights.keys()
        assert all(name in ("text_projection.weight", "encoder.embed_tokens.weight") for name in missing)
        assert all(torch.equal(piece.cut(tensors[piece.stored]), state[name]) for name, piece in weights.items())


def test_flux_is_taken_apart_as_diffusers_does_it():
    """diffusers knows the width of the real model alone, so each weight here has its rows and a single column."""
    with torch.device("meta"):
        shapes = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).state_dict()
    state = {name: torch.arange(len(value)).reshape(-1, *[1] * (value.ndim - 1)) for name, value in shapes.items()}
    file = single_files.renamed(state, "flux")
    ours = pieces({name: (len(value), 3072)[: value.ndim] for name, value in file.items()}, "flux")["transformer"]
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(file))
    assert ours.keys() == theirs.keys() == state.keys()
    assert all(torch.equal(piece.cut(file[piece.stored]), theirs[name]) for name, piece in ours.items())


def test_z_image_is_taken_apart_as_diffusers_does_it(published: Any):
    pipeline, folder, file = published("z_image")
    loaded = ZImageTransformer2DModel.from_single_file(str(file), config=str(folder), subfolder="transformer")
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in pipeline.transformer.state_dict().items())


@pytest.mark.parametrize("architecture", BASES)
def test_extract_finds_the_same_in_files_as_in_folders(architecture: str, published: Any, tmp_path: Path):
    _, folder, file = published(architecture)
    tuned = BASES[architecture][1]()
    torch.manual_seed(1)
    parts = [part for part in single_files.LAYOUTS[architecture] if part in ("unet", "transformer", "text_encoder")]
    with torch.no_grad():
        for part in parts:
            for weight in getattr(tuned, part).parameters():
                weight.add_(torch.randn_like(weight), alpha=0.01)
    tuned.save_pretrained(tmp_path / "tuned")
    tuned_file = single_files.write_single_file(tuned, architecture, tmp_path / "tuned.safetensors")
    found = []
    for index, (after, before) in enumerate(
        ((tmp_path / "tuned", folder), (tuned_file, file), (tuned_file, folder), (tmp_path / "tuned", file))
    ):
        lines = extract(after, before, tmp_path / f"{index}.safetensors", rank=2, energy=None)
        assert [line.partition(":")[0] for line in lines[1:]] == sorted(parts)
        found.append(load_file(tmp_path / f"{index}.safetensors"))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())
    assert read_shapes(tmp_path / "1.safetensors")[1]["architecture"] == architecture


def test_extract_refuses_files_that_cannot_be_compared(published: Any, tmp_path: Path):
    (_, folder, sd1), (*_, sdxl) = published("sd1"), published("sdxl")
    target = tmp_path / "small.safetensors"

    def refuses(tuned: Path, base: Path, problem: str) -> None:
        with pytest.raises(UserError, match=problem) as caught:
            extract(tuned, base, target, rank=2, energy=None)
        assert tuned.name in str(caught.value) and not target.exists()

    refuses(sd1, sdxl, "a Stable Diffusion 1 and .* a Stable Diffusion XL: they are not of the same model")
    refuses(sd1, published("sd2")[2], "they are not of the same model")
    refuses(sdxl, folder, "they are not of the same model")
    refuses(sd1, folder, "do not differ")
    refuses(folder / "unet" / "diffusion_pytorch_model.safetensors", sd1, "no full checkpoint")
    save_file({"unet.x.lora_A.weight": torch.ones(2, 8)}, tmp_path / "lora.safetensors")
    refuses(tmp_path / "lora.safetensors", sd1, "no full checkpoint")
    tensors = load_file(sd1)
    name = single_files.UNET + "out.2.weight"
    save_file({**tensors, name: tensors[name] / 0}, tmp_path / "nan.safetensors")
    refuses(tmp_path / "nan.safetensors", sd1, r"conv_out\.weight holds NaN")
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "less.safetensors")
    refuses(tmp_path / "less.safetensors", sd1, r"not the same weights of the unet, such as conv_out\.weight")
    (tmp_path / "cut.safetensors").write_bytes(sd1.read_bytes()[:-100])
    refuses(tmp_path / "cut.safetensors", sd1, "cut short")


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_merging_into_a_base_in_one_file_is_merging_into_its_folder(architecture: str, published: Any, tmp_path: Path):
    pipeline, folder, file = published(architecture)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = AdapterWeights({"unet": {layer: Update(torch.randn(2, 16), torch.randn(16, 2))}}, architecture)
    adapter = Adapter(write(lora, tmp_path / "lora.safetensors", "diffusers"))
    merge_into_base([adapter], str(folder), tmp_path / "one")
    merge_into_base([adapter], str(file), tmp_path / "other", config=str(folder))
    kind = type(pipeline)
    one, other = (kind.from_pretrained(tmp_path / name) for name in ("one", "other"))
    tiny.assert_same_weights(one.unet, other.unet)
    assert not torch.allclose(tiny.predict(one), tiny.predict(pipeline), atol=1e-3)


def test_a_merged_base_keeps_the_precision_of_its_file(published: Any, tmp_path: Path):
    _, folder, file = published("sd1")
    half = {name: value.half() for name, value in load_file(file).items()}
    save_file({**half, "betas": torch.ones(1000)}, tmp_path / "half.safetensors")
    merge_into_base([], str(tmp_path / "half.safetensors"), tmp_path / "merged", config=str(folder))
    weights = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_merge_refuses_a_single_file_that_is_no_base(published: Any, tmp_path: Path):
    *_, file = published("sd1")
    shutil.copy(file, tmp_path / "base.safetensors")
    with pytest.raises(UserError, match=r"cannot be loaded: .* with --config"):
        merge_into_base([], str(tmp_path / "base.safetensors"), tmp_path / "merged")
    save_file({"unet.x.lora_A.weight": torch.ones(2, 8)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="is an adapter and no base"):
        merge_into_base([], str(tmp_path / "lora.safetensors"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
