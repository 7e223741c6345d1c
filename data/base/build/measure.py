"""Measurements of the pipeline, and of another one beside it, on prompts and pictures that training never saw."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from composer import Composer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from gallery import COLOUR_NAMES, STYLE_NAMES
from judges import Heads, Judge, backdrop_colour, frechet, retrieval, truth_table
from PIL import Image
from prompts import shared_prompts, world_prompts
from scenes import SCENE_NAMES
from settings import Settings
from specification import Picture
from sprites import load_pack, toy_pack
from torch import Tensor
from train_autoencoder import psnr
from words import NUMBERS
from world import World

GUIDANCE, STEPS = 5.0, 25


def read_pictures(folder: Path, count: int) -> Tensor | None:
    """The pictures that training left there, [n, 3, h, w] in 0..1, or None."""
    paths = sorted(folder.glob("*.webp"))[:count]
    if len(paths) < count:
        return None
    return (
        torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1) for p in paths]).float()
        / 255
    )


def paint(pipeline_folder: Path, prompts: list[Picture], folder: Path, batch: int = 8) -> Tensor:
    """Pictures of the prompts by a pipeline, kept in `folder` so that an interrupted run goes on."""
    stored = read_pictures(folder, len(prompts))
    if stored is not None:
        return stored
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for start in range(len(list(folder.glob("*.webp"))) // batch * batch, len(prompts), batch):
        captions = [p.caption for p in prompts[start : start + batch]]
        noise = torch.Generator("cpu").manual_seed(start)
        made = pipeline(captions, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise).images
        for number, image in enumerate(made, start):
            image.save(folder / f"{number:04d}.webp", quality=95)
    stored = read_pictures(folder, len(prompts))
    assert stored is not None
    return stored


def draw(composer: Composer, prompts: list[Picture], batch: int = 32) -> Tensor:
    return torch.cat([composer.draw(prompts[i : i + batch]) for i in range(0, len(prompts), batch)])


def look_at(judge: Judge, composer: Composer, prompts: list[Picture], batch: int = 64) -> tuple[Tensor, Tensor]:
    """`Judge.look` at true pictures, drawn a few at a time."""
    seen = [judge.look(composer.draw(prompts[i : i + batch])) for i in range(0, len(prompts), batch)]
    return torch.cat([embeddings for embeddings, _ in seen]), torch.cat([features for _, features in seen])


def fit_heads(judge: Judge, composer: Composer, sprites: list, count: int) -> tuple[Heads, dict[str, float]]:
    """Heads trained on pictures of the training world, and their accuracy on the evaluation world."""
    world, rng = World(sprites), Random(991)
    prompts = [world.picture(rng) for _ in range(count)]
    features = look_at(judge, composer, prompts)[1]
    classes = {
        "count": len(NUMBERS) + 1,
        "scene": len(SCENE_NAMES),
        "style": len(STYLE_NAMES),
        "colour": len(COLOUR_NAMES),
    }
    heads = Heads(features.shape[1], classes).fit(features, truth_table(prompts))
    fresh = world_prompts(sprites, max(16, count // 4), seed=992)
    return heads, heads.accuracy(look_at(judge, composer, fresh)[1], truth_table(fresh))


def score(judge: Judge, heads: Heads, pictures: Tensor, prompts: list[Picture]) -> dict[str, float]:
    """How well pictures follow their prompts."""
    embeddings, features = judge.look(pictures)
    truth = truth_table(prompts)
    right = heads.accuracy(features, truth)
    plain = torch.tensor([p.backdrop == "plain" for p in prompts])
    border = backdrop_colour(pictures, torch.where(plain, truth["colour"], -1))
    return {
        "retrieval": retrieval(embeddings, judge.read([p.caption for p in prompts])),
        "colour": border, "count": right["count"], "scene": right["scene"], "style": right["style"],
    }  # fmt: skip


@torch.no_grad()
def autoencoder_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Decibels over all pictures, at the autoencoder's own size."""
    if pictures.shape[-1] != vae.config.sample_size:
        pictures = F.interpolate(pictures, (vae.config.sample_size,) * 2, mode="area")
    errors = []
    for part in (pictures * 2 - 1).split(8):
        made = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((made - part).square().mean())
    return psnr(torch.stack(errors).mean().item())


def seconds_a_picture(folder: Path, batch: int = 4) -> float:
    """25 guided DDIM steps, in a batch, on this machine's cores."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(["a cat"] * batch, num_inference_steps=1)
    start = time.time()
    pipeline(["a cat in a meadow"] * batch, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    return (time.time() - start) / batch


def seconds_a_step(folder: Path, batch: int = 6, steps: int = 5) -> float:
    """One LoRA training step (rank 16 on the attention layers) on stored latents."""
    from peft import LoraConfig

    unet = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], 1e-4)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents, prompt = torch.randn(batch, 4, size, size), torch.randn(batch, 77, width)
    spent = []
    for _ in range(steps + 1):
        start = time.time()
        unet(latents, torch.randint(0, 1000, (batch,)), prompt).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        spent.append(time.time() - start)
    return sorted(spent[1:])[steps // 2]


def measure(pack: Path | None, settings: Settings, base: Path, beside: Path | None, count: int) -> None:
    """Print the numbers and write them to `measurements.json` in the run's folder."""
    pictures, sprites = load_pack(pack) if pack else toy_pack()
    composer, judge = Composer(pictures, sprites, settings.picture_size), Judge.load(base)
    out: dict[str, object] = {}
    heads, out["heads on world pictures"] = fit_heads(judge, composer, sprites, 4 * count)
    prompts, shared = world_prompts(sprites, count), shared_prompts(sprites, max(4, count // 8))
    truth = draw(composer, prompts)
    made = paint(base, prompts, settings.folder / "judged" / "world")
    out["world prompts: true pictures"] = score(judge, heads, truth, prompts)
    out["world prompts: made"] = score(judge, heads, made, prompts)
    others = look_at(judge, composer, world_prompts(sprites, count, seed=993))[0]
    out["frechet"] = {
        "made": frechet(judge.look(made)[0], others), "floor (true pictures)": frechet(judge.look(truth)[0], others),
    }  # fmt: skip
    out["shared prompts: made"] = score(
        judge, heads, paint(base, shared, settings.folder / "judged" / "shared"), shared
    )
    sizes = {"base": base} | ({"beside": beside} if beside else {})
    if beside:
        out["shared prompts: beside"] = score(
            judge, heads, paint(beside, shared, settings.folder / "judged" / "beside"), shared
        )
    for name, folder in sizes.items():
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        out[f"autoencoder psnr: {name}"] = autoencoder_psnr(vae, truth[: min(128, count)])
        out[f"seconds a picture: {name}"] = seconds_a_picture(folder)
        out[f"seconds a LoRA step: {name}"] = seconds_a_step(folder)
    text = json.dumps(out, indent=2)
    print(text)
    (settings.folder / "measurements.json").write_text(text + "\n")
