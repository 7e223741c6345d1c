"""A family says exactly what its diffusers pipeline would."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lessons
import pytest
import single_files
import tiny
import torch
from safetensors.torch import save_file

from finetune import run
from finetune.adapter import WordVectors
from finetune.batch import Encoder
from finetune.dataset import DatasetConfig, Pictures, scan
from finetune.errors import UserError
from finetune.families.base import Source, families
from finetune.families.flux import pack, unpack
from finetune.formats import write
from finetune.objectives import Diffusion
from finetune.vocabulary import extend

BASES = [(family, variant) for family, variants in tiny.BASES.items() for variant in variants]


@pytest.fixture
def family(request: Any, base_folder: Any) -> Any:
    name, variant = request.param
    return families[name].load(Source(str(base_folder(name, variant))), min_snr_gamma=None, zero_terminal_snr=False)


def encode_as_pipeline(pipeline: Any, captions: list[str]) -> tuple[Any, Any]:
    """Embeddings and pooled embeddings, from what each pipeline's own `encode_prompt` returns."""
    asked = inspect.signature(pipeline.encode_prompt).parameters
    given = {name: None for name in ("prompt_2", "prompt_3") if name in asked}
    given |= {"num_images_per_prompt": 1} if "num_images_per_prompt" in asked else {}
    given |= {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in asked else {}
    embeds, *others = pipeline.encode_prompt(prompt=list(captions), device="cpu", **given)
    pooled = [other for other in others if isinstance(other, torch.Tensor) and other.shape[:1] == (len(captions),)]
    return embeds, pooled[0] if pooled and not isinstance(embeds, list) else None


every_family = pytest.mark.parametrize("family", BASES, ids="-".join, indirect=True)


@every_family
def test_prompts_are_encoded_as_the_pipeline_encodes_them(family: Any):
    captions = ["a thing", "another, much longer, caption of a thing " * 9]
    with torch.no_grad():
        said = family.encode_prompt(family.tokenize(captions))
        embeds, pooled = encode_as_pipeline(family.pipeline, captions)
    if said.mask is None:
        torch.testing.assert_close(said.embeds, embeds)
    else:
        for mine, mask, theirs in zip(said.embeds, said.mask, embeds, strict=True):
            torch.testing.assert_close(mine[mask], theirs)
    assert (said.pooled is None) == (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(said.pooled, pooled)


@every_family
def test_latents_decode_to_the_picture_as_the_pipeline_decodes_them(family: Any):
    pixels = torch.rand(1, 3, tiny.SIZE, tiny.SIZE) * 2 - 1
    vae, posterior = family.pipeline.vae, family.encode_image(pixels)
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist
    shift = vae.config.shift_factor or 0.0
    torch.testing.assert_close(posterior.mean / vae.config.scaling_factor + shift, expected.mean)
    torch.testing.assert_close(posterior.std / vae.config.scaling_factor, expected.std)


@every_family
def test_everything_is_frozen_until_a_method_is_attached(family: Any):
    assert not any(parameter.requires_grad for part in family.parts() for parameter in part.parameters())


@every_family
def test_no_prompt_is_encoded_otherwise_while_its_encoder_trains(family: Any):
    tokens = family.tokenize(["a thing"])
    said = family.encode_prompt(tokens)
    for part in family.parts():
        part.train()
    now = family.encode_prompt(tokens)
    torch.testing.assert_close(vars(now), vars(said), rtol=0, atol=0)


@every_family
def test_a_word_of_several_vectors_is_spelled_out_in_the_prompt(family: Any):
    tables = extend(family, "<it>", 3, "thing")
    tokens = family.tokenize(["a <it> thing"])
    for name, table in tables.items():
        found, first = tokens[name][0].tolist(), table.first
        # Sentence pieces and padding may stand between words, never within one.
        assert [token for token in found if token >= first] == [first, first + 1, first + 2]


@every_family
def test_a_word_that_exists_already_is_refused(family: Any):
    with pytest.raises(UserError, match="already a word"):
        extend(family, "a", 1, "thing")
    extend(family, "<it>", 1, "a")
    with pytest.raises(UserError, match="already a word"):
        extend(family, "<it>", 1, "a")


@pytest.mark.parametrize(("width", "height"), [(tiny.SIZE, tiny.SIZE), (40, 24), (24, 40)])
@every_family
def test_a_step_of_the_sampler_is_the_family_s_own_prediction(family: Any, width: int, height: int):
    """The pipeline, asked for one step from known noise, ends where the family's prediction leads."""
    pipeline, prompt = family.pipeline, ["a thing"]
    noise = torch.randn(1, *family.encode_image(torch.zeros(1, 3, height, width)).mean.shape[1:])
    seen: dict[str, Any] = {}

    def watch(module: Any, inputs: Any, keywords: Any, output: Any) -> None:
        seen["said"] = output[0]

    given = pack(noise) if family.pipeline_class == "FluxPipeline" else noise
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0 if "Flux" in family.pipeline_class else 0.0}
    hook = family.denoiser.register_forward_hook(watch, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline(list(prompt), height=height, width=width, latents=given, output_type="latent", **settings)
        hook.remove()
        level = pipeline.scheduler.timesteps[:1].float()
        time = level.long() if isinstance(family.objective, Diffusion) else level / 1000
        geometry = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        mine = family.denoise(noise, time, family.encode_prompt(family.tokenize(prompt)), geometry)
    theirs = seen["said"]
    if isinstance(theirs, list):
        theirs = -torch.stack(theirs).squeeze(2)
    if theirs.ndim == 3:
        theirs = unpack(theirs, *noise.shape[-2:])
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_word_can_start_from_an_embedding_in_any_format_and_from_nothing_else(base_folder: Any, tmp_path: Path):
    source = Source(str(base_folder("stable_diffusion_xl")))
    start = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 40)}
    write(WordVectors("fox", start, "sdxl"), tmp_path / "fox.safetensors", "embedding_comfyui")
    loaded = families["stable_diffusion_xl"].load(source, min_snr_gamma=None, zero_terminal_snr=False)
    tables = extend(loaded, "<it>", 2, str(tmp_path / "fox.safetensors"))
    assert all(torch.equal(tables[name].new, start[key]) for name, key in loaded.word_keys.items())
    write(WordVectors("cat", {"clip_l": torch.randn(2, 48)}, "sd1"), tmp_path / "wide.safetensors", "embedding_a1111")
    save_file({"<nan>": torch.randn(1, 32) / 0}, tmp_path / "nan.safetensors")
    save_file({"unet.conv.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "fox.safetensors").read_bytes()[:50])
    for name, problem in {
        "wide": "holds no embedding of width 32 for clip_l",
        "nan": "NaN or infinity",
        "lora": "up is missing",
        "cut": "cut short",
        "nowhere": "does not exist",
    }.items():
        with pytest.raises(UserError, match=rf"method\.init: .*{name}\.safetensors.* {problem}"):
            extend(loaded, "<other>", 1, str(tmp_path / f"{name}.safetensors"))


def test_stable_diffusion_3_without_t5_is_conditioned_as_its_pipeline_does_it(base_folder: Any):
    source = Source(str(base_folder("stable_diffusion_3")))
    loaded = families["stable_diffusion_3"].load(source, min_snr_gamma=None, zero_terminal_snr=False)
    loaded.pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        embeds, pooled = encode_as_pipeline(loaded.pipeline, ["a thing"])
        said = loaded.encode_prompt(loaded.tokenize(["a thing"]))
    torch.testing.assert_close(said.embeds, embeds)
    torch.testing.assert_close(said.pooled, pooled)


def test_clip_pools_at_the_end_of_the_caption_though_an_old_config_says_otherwise(base_folder: Any, tmp_path: Path):
    pipeline = tiny.stable_diffusion_xl()
    pipeline.text_encoder_2.config.eos_token_id = 2
    pipeline.save_pretrained(tmp_path)
    pooled = []
    for path in (base_folder("stable_diffusion_xl"), tmp_path):
        loaded = families["stable_diffusion_xl"].load(Source(str(path)), min_snr_gamma=None, zero_terminal_snr=False)
        extend(loaded, "<it>", 1, "thing")
        with torch.no_grad():
            pooled.append(loaded.encode_prompt(loaded.tokenize(["a <it> thing"])).pooled)
    torch.testing.assert_close(*pooled)


@pytest.mark.parametrize("setting", ["min_snr_gamma", "zero_terminal_snr"])
def test_what_is_for_diffusion_alone_is_refused_for_flow_matching(base_folder: Any, setting: str):
    given = {"min_snr_gamma": None, "zero_terminal_snr": False, setting: 5.0}
    with pytest.raises(UserError, match=setting):
        families["flux"].load(Source(str(base_folder("flux"))), **given)


def test_a_text_encoder_whose_lora_no_pipeline_loads_is_refused(base_folder: Any, tmp_path: Path):
    way = {"rank": 4, "text_encoder": True}
    with pytest.raises(UserError, match="text_encoder: ZImagePipeline loads no LoRA"):
        run.prepare(lessons.recipe(base_folder("z_image"), tmp_path, "lora", way))


def test_an_adapter_given_as_a_base_is_named(tmp_path: Path):
    save_file({"unet.conv.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="is an adapter and no base"):
        run.load_family(lessons.recipe(tmp_path / "lora.safetensors", tmp_path / "out", "lora", "plain"))


def test_a_denoiser_alone_says_what_it_lacks_and_how_to_give_it(tmp_path: Path):
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks the text_encoder, vae\. Name a folder.*base\.config"):
        run.load_family(lessons.recipe(tmp_path / "model.safetensors", tmp_path / "out", "lora", "plain"))


def test_a_single_file_that_needs_configs_says_how_to_give_them(tmp_path: Path):
    file = single_files.write_single_file(tiny.stable_diffusion(), "sd1", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"set base\.config to a folder"):
        run.load_family(lessons.recipe(file, tmp_path / "out", "lora", "plain"))


def test_prediction_type_is_read_from_the_checkpoint(base_folder: Any):
    for variant in tiny.BASES["stable_diffusion"]:
        source = Source(str(base_folder("stable_diffusion", variant)))
        loaded = families["stable_diffusion"].load(source, min_snr_gamma=None, zero_terminal_snr=False)
        assert loaded.objective.prediction == variant


def test_the_fingerprint_follows_the_weights(base_folder: Any, tmp_path: Path):
    pipeline = tiny.stable_diffusion()
    pipeline.save_pretrained(tmp_path / "same")
    pipeline.unet.save_pretrained(tmp_path / "same" / "companions" / "another")
    pipeline.unet.conv_out.bias.data[0] += 1
    pipeline.save_pretrained(tmp_path / "other")
    prints = [
        families["stable_diffusion"].load(Source(str(path)), min_snr_gamma=None, zero_terminal_snr=False).fingerprint
        for path in (base_folder("stable_diffusion"), tmp_path / "same", tmp_path / "other")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_a_base_of_no_known_family_is_named(tmp_path: Path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(UserError, match="KandinskyPipeline"):
        run.load_family(lessons.recipe(tmp_path, tmp_path / "out", "lora", "plain"))


def test_cached_latents_follow_the_picture_and_not_its_name(base_folder: Any, tmp_path: Path):
    source = Source(str(base_folder("stable_diffusion")))
    loaded = families["stable_diffusion"].load(source, min_snr_gamma=None, zero_terminal_snr=False)
    encoder = Encoder(loaded, size=tiny.SIZE, trains_text=False, noise_offset=0.0)
    config = DatasetConfig(folder=tiny.save_pictures(tmp_path / "pictures", 2), resolution=tiny.SIZE)

    def means() -> list[torch.Tensor]:
        pictures = Pictures.from_pictures(scan(config), config, "<it>")
        draws = sorted((pictures.draw(0, position) for position in range(2)), key=lambda draw: draw.path)
        encoder.see(draws)
        return [encoder.posteriors.kept[draw.key].mean for draw in draws]

    before = means()
    first, second = tmp_path / "pictures/0.png", tmp_path / "pictures/1.png"
    swap = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(swap)
    after = means()
    assert torch.equal(before[0], after[1]) and torch.equal(before[1], after[0])
    assert not torch.equal(before[0], before[1])


def test_random_flips_are_drawn_anew_while_latents_are_cached(base_folder: Any, tmp_path: Path):
    source = Source(str(base_folder("stable_diffusion")))
    loaded = families["stable_diffusion"].load(source, min_snr_gamma=None, zero_terminal_snr=False)
    encoder = Encoder(loaded, size=tiny.SIZE, trains_text=False, noise_offset=0.0)
    folder = tiny.save_pictures(tmp_path / "pictures", 1)
    config = DatasetConfig(folder=folder, resolution=tiny.SIZE, flip=True)
    pictures = Pictures.from_pictures(scan(config), config, "<it>")
    draws = [pictures.draw(0, position) for position in range(12)]
    assert {draw.crop.flip for draw in draws} == {True, False}
    encoder.see(draws)
    assert len(encoder.posteriors.kept) == 2
    latents = encoder.posteriors.get({draw.key: draw for draw in draws})
    plain, flipped = (latents[next(draw.key for draw in draws if draw.crop.flip is flip)] for flip in (False, True))
    assert not torch.equal(plain.mean, flipped.mean)
