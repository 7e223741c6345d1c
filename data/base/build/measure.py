"""Measurements of the pipeline, and of another one beside it, on prompts and pictures that training never saw."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from composer import Composer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from gallery import COLOUR_NAMES, STYLE_NAMES
from judges import Heads, Judge, backdrop_colour, frechet, retrieval, truth_table
from measure_companions import measure_control, measure_edits
from paint import GUIDANCE, STEPS, Studio, read_pictures
from prompts import world_prompts
from scenes import SCENE_NAMES
from settings import Settings
from specification import Picture
from sprites import load_pack, toy_pack
from styles import StyleJudge, fit_style_judge
from torch import Tensor
from train_autoencoder import psnr
from words import NUMBERS
from world import World


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


def score(judge: Judge, heads: Heads, styles: StyleJudge, pictures: Tensor, prompts: list[Picture]) -> dict[str, float]:
    """How well pictures follow their prompts."""
    embeddings, features = judge.look(pictures)
    truth = truth_table(prompts)
    right = heads.accuracy(features, truth)
    plain = torch.tensor([p.backdrop == "plain" for p in prompts])
    border = backdrop_colour(pictures, torch.where(plain, truth["colour"], -1))
    return {
        "retrieval": retrieval(embeddings, judge.read([p.caption for p in prompts])),
        "colour": border, "count": right["count"], "scene": right["scene"],
        "style": styles.right(pictures, truth["style"]),
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


def measure_prompts(studio: Studio, judge: Judge, heads: Heads, styles: StyleJudge, beside: Path | None) -> dict:
    """Prompt following: of the world's own prompts, and of plain ones beside another base."""
    prompts, shared, follow = studio.world_prompts, studio.shared_prompts, partial(score, judge, heads, styles)
    said = [p.caption for p in shared]
    out = {
        "world prompts: true pictures": follow(studio.draw(prompts), prompts),
        "world prompts: made": follow(studio.said("world", [p.caption for p in prompts]), prompts),
        "shared prompts: made": follow(studio.said("shared", said), shared),
    }
    if beside:
        out["shared prompts: beside"] = follow(studio.said("beside", said, beside), shared)
    return out


def measure_distance(studio: Studio, judge: Judge, beside: Path | None, beside_world: Path | None) -> dict[str, float]:
    """Fréchet distances to pictures of each base's own world, which neither the prompts nor the floor were drawn from.

    The other base's world is a folder: `prompts.txt` and, as webp, `true/` (of those prompts) and `others/`.
    """
    prompts, look = studio.world_prompts, lambda pictures: judge.look(pictures)[0]
    others = look_at(judge, studio.composer, world_prompts(studio.sprites, studio.count, seed=993))[0]
    made = look(studio.said("world", [p.caption for p in prompts]))
    out = {"made": frechet(made, others)}
    out["floor (true pictures)"] = frechet(look_at(judge, studio.composer, prompts)[0], others)
    if beside and beside_world:
        captions = (beside_world / "prompts.txt").read_text().splitlines()[: studio.count]
        true, others = (read_pictures(beside_world / name, len(captions)) for name in ("true", "others"))
        out["beside"] = frechet(look(studio.said("beside_world", captions, beside)), look(others))
        out["floor beside"] = frechet(look(true), look(others))
    return out


def measure_sizes(studio: Studio, beside: Path | None) -> dict[str, float]:
    """Autoencoders on the same true pictures, and how long a picture and a training step take on this machine."""
    out, truth = {}, studio.draw(studio.world_prompts[:128])
    for name, folder in ({"base": studio.base} | ({"beside": beside} if beside else {})).items():
        vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
        out[f"autoencoder psnr: {name}"] = autoencoder_psnr(vae, truth)
        out[f"seconds a picture: {name}"] = seconds_a_picture(folder)
        out[f"seconds a LoRA step: {name}"] = seconds_a_step(folder)
    return out


def open_studio(pack: Path | None, settings: Settings, base: Path, count: int) -> Studio:
    pictures, sprites = load_pack(pack) if pack else toy_pack()
    return Studio(base, settings, Composer(pictures, sprites, settings.picture_size), sprites, count)


def paint(
    pack: Path | None, settings: Settings, base: Path, beside: Path | None, beside_world: Path | None, count: int
) -> None:
    """Make the pictures that `measure` judges, where the accelerator is."""
    open_studio(pack, settings, base, count).paint(beside, beside_world)


def measure(
    pack: Path | None, settings: Settings, base: Path, beside: Path | None, beside_world: Path | None, count: int
) -> None:
    """Print the numbers and write them to `measurements.json` in the run's folder."""
    studio, judge = open_studio(pack, settings, base, count), Judge.load(base)
    out: dict[str, object] = {"prompts": count, "shared prompts": len(studio.shared_prompts)}
    heads, out["heads on world pictures"] = fit_heads(judge, studio.composer, studio.sprites, 4 * count)
    vaes = [AutoencoderKL.from_pretrained(f / "vae", dtype=torch.float32) for f in (base, beside) if f]
    size = (3 * count, 1000) if settings.compile else (32, 2)
    styles, out["style judge on true pictures"] = fit_style_judge(
        studio.composer, studio.sprites, vaes, beside_world, *size
    )
    out |= measure_prompts(studio, judge, heads, styles, beside)
    out["frechet"] = measure_distance(studio, judge, beside, beside_world)
    if (base / "companions").exists():
        out["controlnet"] = measure_control(studio, judge, vaes[0])
        out["edits"] = measure_edits(studio, judge, heads, vaes[0])
    out |= measure_sizes(studio, beside)
    text = json.dumps(out, indent=2)
    print(text)
    (settings.folder / "measurements.json").write_text(text + "\n")
