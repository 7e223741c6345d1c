"""From checkpoints to folders that diffusers and transformers load: small, sharded, safetensors only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from lowrank import Difference
from models import new_autoencoder, new_clip, new_denoiser, new_scheduler, text_encoder_of
from safetensors.torch import save_file
from settings import Settings
from torch import nn
from train_denoiser import Generator
from transformers import CLIPModel, CLIPTokenizer

from finetune.companions import FILE

SHARD = "14MB"


def shrink(module: nn.Module) -> nn.Module:
    """Matrices and kernels as float8_e4m3fn, the few vectors as float16; `from_pretrained` widens both."""
    for parameter in module.parameters():
        kind = torch.float8_e4m3fn if parameter.ndim > 1 else torch.float16
        parameter.data = parameter.data.clamp(-448, 448).to(kind)
    return module


def restore(settings: Settings) -> tuple[StableDiffusionPipeline, CLIPModel]:
    """The pipeline in float32 and the evaluation towers, from the run's checkpoints."""
    folder = settings.folder
    state = {
        n: torch.load(folder / f"{n}.pt", map_location="cpu", weights_only=True)
        for n in ("generator", "autoencoder", "evaluation")
    }
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = Generator(text_encoder_of(new_clip(settings, tokenizer)), new_denoiser(settings))
    model.load_state_dict(state["generator"]["weights"])
    vae = new_autoencoder(settings)
    vae.load_state_dict(state["autoencoder"]["weights"])
    vae.register_to_config(scaling_factor=state["autoencoder"]["scale"])
    judge = new_clip(settings, tokenizer, evaluation=True)
    judge.load_state_dict(state["evaluation"]["weights"])
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=model.text_encoder, tokenizer=tokenizer, unet=model.unet, scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipeline, judge.eval()


def export(settings: Settings, target: Path) -> None:
    """Write `target` (the pipeline) and `target/evaluation` (the judging CLIP; it shares the tokenizer)."""
    pipeline, judge = restore(settings)
    pipeline.vae.half()
    pipeline.text_encoder.half()
    shrink(pipeline.unet)
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "evaluation"):
        shutil.rmtree(target / part, ignore_errors=True)
    pipeline.save_pretrained(target, max_shard_size=SHARD)
    shrink(judge).save_pretrained(target / "evaluation")
    for name in ("vocab.json", "merges.txt"):  # what every CLIPTokenizer reads; tokenizer.json is for the newest only
        shutil.copy(settings.folder / "tokenizer" / name, target / "tokenizer" / name)
    _name_types(target)
    for path in sorted(target.rglob("*.safetensors")):
        print(f"{path.relative_to(target)} {path.stat().st_size / 1e6:.1f} MB")


def write_denoiser(unet: UNet2DConditionModel, target: Path) -> None:
    """Replace the pipeline's denoiser."""
    copy = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict(unet.state_dict())
    shutil.rmtree(target / "unet", ignore_errors=True)
    shrink(copy).save_pretrained(target / "unet", max_shard_size=SHARD)
    _name_types(target)


def write_companion(difference: Difference, model: ModelMixin, target: Path, name: str) -> None:
    """A companion's configuration, and what it has beside the base."""
    folder = target / "companions" / name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    save_file(difference.stored(), folder / FILE)
    _name_types(target)


def _name_types(target: Path) -> None:
    """Say float32 where the loader would take the stored type, and drop this machine's paths."""
    for path in target.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if "architectures" in config:  # a transformers model; diffusers widens by itself
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
