"""The second run, from the exported pipeline: the denoiser trained on, then its ControlNet and its InstructPix2Pix.

Text encoder and autoencoder are frozen, so that prompts and latents are computed once. Every stage leaves a checkpoint
and writes its part of the pipeline's folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from build import load_sprites
from composer import Composer
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from export import write_companion, write_denoiser
from gallery import Gallery, draw_pairs, draw_specifications
from launch import launch, set_up
from lowrank import Difference, Rounded, rounded
from models import new_scheduler
from muon import Muon
from prompts import world_prompts
from settings import Settings
from team import Average, Team, schedule
from tokens import encode
from torch import Tensor, nn
from train_autoencoder import encode_gallery, encode_pictures
from train_companions import control_loss, edit_loss, new_controlnet, new_editor, warm_control, warm_edit, warm_refine
from train_denoiser import EMPTY_SHARE, diffusion_loss
from transformers import CLIPTextModel, CLIPTokenizer

from finetune.companions import FILE
from finetune.edges import gray, lines

FRESH_SEED, PAIR_SEED = 5_000_000, 9_000_000  # none of the first run's
DENOISER_RATE, FACTOR_RATE = 6e-4, 1.5e-3


class Refinement:
    """What the three stages share: the pipeline's parts, the painted world, its prompts and latents."""

    def __init__(self, pack: Path | None, base: Path, settings: Settings, team: Team) -> None:
        set_up(team)
        self.base, self.settings, self.team = base, settings, team
        load = partial(torch.nn.Module.to, device=team.device)
        self.unet = load(UNet2DConditionModel.from_pretrained(base / "unet", dtype=torch.float32))
        self.vae = load(AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32))
        self.text_encoder = load(CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32))
        self.tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        for part in (self.unet, self.vae, self.text_encoder):
            part.requires_grad_(False).eval()
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        pictures, self.sprites = load_sprites(pack)
        self.composer = Composer(pictures, self.sprites, settings.picture_size, team.device)
        self.alphas = new_scheduler().alphas_cumprod.to(team.device)
        self.empty = self.read(torch.as_tensor(encode(self.tokenizer, [""])))

    @torch.no_grad()
    def read(self, ids: Tensor, batch: int = 2048) -> Tensor:
        """Prompts float16 [n, 77, d] of token ids [n, 77]."""
        parts = [self.text_encoder(input_ids=part.long().to(self.team.device)) for part in ids.split(batch)]
        return torch.cat([part.last_hidden_state.half() for part in parts])

    def run(self) -> None:
        settings, team = self.settings, self.team
        gallery = Gallery.paint(settings.folder / "fresh.npz", self.composer, team, 256 if settings.compile else 8)
        team.log(f"painted {len(gallery)} pictures")
        latents, prompts = encode_gallery(self.vae, gallery, settings, team), self.read(gallery.ids)
        team.log(f"encoded them and their captions, latent std {latents[:1000].float().std().item():.3f}")
        self.denoiser(latents, prompts)
        self.controlnet(gallery, latents, prompts)
        del gallery, latents, prompts
        self.instruct_pix2pix()

    def fit(self, name: str, module: nn.Module, form, optimizer: Muon, seconds: float, loss_of: Callable) -> Average:
        """Train what the optimizer holds, through its form, by the clock; returns the averaged weights."""
        team, average, total = self.team, Average(module), torch.zeros((), device=self.team.device)
        for step, gone in team.ticks(seconds, self.settings.steps):
            form.write()
            with torch.autocast(team.device.type, dtype=torch.bfloat16):
                loss = loss_of()
            loss.backward()
            form.pull()
            team.average(optimizer.gradients())
            torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
            optimizer.step(schedule(gone, step, warmup=150, hold=0.1))
            average.update()
            total += loss.detach()
            if step and step % 100 == 0:
                team.log(f"{name} {step} at {gone:.2f} loss {total.item() / 100:.4f}")
                total.zero_()
        return average

    def draw(self, latents: Tensor, prompts: Tensor, dropped: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(rows, latents, noise, times, prompts) of a random batch, some prompts empty."""
        batch, device = self.settings.batch_denoiser, self.team.device
        rows = torch.randint(0, len(latents), (batch,), device=device)
        empty = torch.rand(batch, 1, 1, device=device) < dropped
        clean, prompt = latents[rows].float(), torch.where(empty, self.empty, prompts[rows])
        times = torch.randint(0, 1000, (batch,), device=device)
        return rows, clean, torch.randn_like(clean), times, prompt

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function, dynamic=False) if self.settings.compile else function

    # -- the stages -------------------------------------------------------------------------------------------------

    def denoiser(self, latents: Tensor, prompts: Tensor) -> None:
        """On from the exported weights, through their float8 rounding; kept if held-out pictures say so."""
        path = self.settings.folder / "refined.pt"
        if path.exists():
            self.unet.load_state_dict(torch.load(path, map_location=self.team.device, weights_only=True))
            return
        before, loss_of = self.held_out(), self.compiled(diffusion_loss)
        self.unet.requires_grad_(True).train()
        optimizer = Muon(self.unet, DENOISER_RATE, edges=("conv_in", "conv_out", "time_embedding"))

        def loss() -> Tensor:
            _, clean, noise, times, prompt = self.draw(latents, prompts, EMPTY_SHARE)
            return loss_of(self.unet, clean, noise, times, prompt, self.alphas)

        average = self.fit("denoiser", self.unet, Rounded(self.unet), optimizer, self.settings.seconds_refine, loss)
        self.unet.requires_grad_(False).eval()
        last = self.held_out()
        average.copy_to(self.unet)
        self.team.log(f"held-out loss, float8: was {before:.5f}, last {last:.5f}, averaged {self.held_out():.5f}")
        if self.team.leads:
            torch.save(self.unet.state_dict(), path)
            write_denoiser(self.unet, self.base)
        self.team.wait()

    @torch.no_grad()
    def held_out(self, seed: int = 3) -> float:
        """Mean loss over pictures of the evaluation world, with the weights as they would be exported."""
        count, small = (4, 4) if self.settings.steps else (2048, 256)
        rng, form, drawn = np.random.default_rng(seed), Rounded(self.unet), world_prompts(self.sprites, count, seed)
        form.write()
        losses = []
        for start in range(0, count, small):
            some = drawn[start : start + small]
            latents = encode_pictures(self.vae, self.composer.draw(some), False)
            noise = torch.as_tensor(rng.standard_normal(latents.shape, np.float32), device=latents.device)
            times = torch.as_tensor(rng.integers(0, 1000, len(some)), device=latents.device)
            prompt = self.read(torch.as_tensor(encode(self.tokenizer, [p.caption for p in some]))).float()
            losses.append(diffusion_loss(self.unet, latents, noise, times, prompt, self.alphas))
        form.pull()
        return torch.stack(losses).mean().item()

    def companion(self, name: str, model: ControlNetModel | UNet2DConditionModel, seconds: float, loss: Callable):
        """Train a model's difference to the base, unless its checkpoint is there, and write it beside the base."""
        path = self.settings.folder / f"{name}.safetensors"
        if path.exists():
            return
        frozen = {n: w.detach() for n, w in self.unet.state_dict().items()}
        difference = Difference(model, {n: rounded(w) for n, w in frozen.items()}, self.settings.rank)
        optimizer = Muon(difference, FACTOR_RATE, weight_decay=0.0, edges=("",))  # AdamW for all
        average = self.fit(name, difference, difference, optimizer, seconds, loss)
        average.copy_to(difference)
        if self.team.leads:
            write_companion(difference, model, self.base, name)
            path.write_bytes((self.base / "companions" / name / FILE).read_bytes())
        self.team.wait()
        self.team.log(f"{name} saved")

    def controlnet(self, gallery: Gallery, latents: Tensor, prompts: Tensor) -> None:
        controlnet = new_controlnet(self.unet).to(self.team.device, memory_format=torch.channels_last).train()
        chunks = (part.float() / 255 for part in gallery.pictures.split(256))
        hints, loss_of = torch.cat([lines(gray(*part.unbind(1))) for part in chunks]), self.compiled(control_loss)
        gallery.pictures = gallery.pictures[:1].clone()
        self.round_base()

        def loss() -> Tensor:
            rows, clean, noise, times, prompt = self.draw(latents, prompts, 0.15)
            return loss_of(controlnet, self.unet, clean, hints[rows], noise, times, prompt, self.alphas)

        self.companion("controlnet", controlnet, self.settings.seconds_controlnet, loss)

    def instruct_pix2pix(self) -> None:
        editor = new_editor(self.unet).to(self.team.device, memory_format=torch.channels_last).train()
        stored, mine = np.load(self.settings.folder / "pairs.npz"), self.team.share(self.settings.num_pairs)
        paint = partial(self.paint_latents, batch=256 if self.settings.compile else 8)
        sources = paint(stored["layers"][0, mine], stored["grounds"][0, mine], True)
        targets = paint(stored["layers"][1, mine], stored["grounds"][1, mine], False)
        prompts, loss_of = self.read(torch.as_tensor(stored["ids"][mine])), self.compiled(edit_loss)
        self.team.log(f"painted {len(prompts)} pairs, source std {sources[:1000].float().std().item():.3f}")

        def loss() -> Tensor:
            rows, clean, noise, times, prompt = self.draw(targets, prompts, 0.0)
            chance = torch.rand(len(rows), 1, 1, device=rows.device)
            prompt = torch.where((chance < 0.05) | (chance > 0.95), self.empty, prompt)  # 5 % no words, 5 % nothing
            source = sources[rows].float() * (chance < 0.9)[..., None]  # 5 % no picture
            return loss_of(editor, clean, source, noise, times, prompt, self.alphas)

        self.companion("instruct_pix2pix", editor, self.settings.seconds_instruct, loss)

    def round_base(self) -> None:
        """The frozen base as a user will load it."""
        for weight in self.unet.parameters():
            weight.data = rounded(weight.data)

    @torch.no_grad()
    def paint_latents(self, layers: np.ndarray, grounds: np.ndarray, source: bool, batch: int) -> Tensor:
        """Latents bf16 [n, 4, h, w] of specifications; pictures with the same backdrop are painted together."""
        order, size = np.argsort(grounds[:, 0], kind="stable"), self.settings.latent_size
        out = torch.empty(len(order), 4, size, size, dtype=torch.bfloat16, device=self.team.device)
        for i in range(0, len(order), batch):
            rows = order[i : i + batch]
            some = [torch.as_tensor(a[rows]).to(self.team.device) for a in (layers, grounds)]
            out[torch.as_tensor(rows, device=out.device)] = encode_pictures(
                self.vae, self.composer.compose(*some), source
            ).bfloat16()
        return out


def work(pack: Path | None, settings: Settings, start: float, base: Path) -> None:
    """Everything that one process does, once the specifications are there."""
    team = Team.join(start)
    while not (settings.folder / "pairs.npz").exists():
        time.sleep(0.2)
        assert team.elapsed() < 300, "the specifications were not drawn"
    Refinement(pack, base, settings, team).run()
    team.log("done")


def warm(settings: Settings) -> None:
    for compile_step in (warm_refine, warm_control, warm_edit):
        start = time.time()
        compile_step(settings)
        print(f"{compile_step.__name__}: {time.time() - start:.0f}s", flush=True)


def refine(pack: Path | None, settings: Settings, start: float, base: Path) -> None:
    """Draw on the CPU what is to be painted, and run the stages with one process per accelerator."""

    def prepare() -> None:
        settings.folder.mkdir(parents=True, exist_ok=True)
        sprites, tokenizer = load_sprites(pack)[1], CLIPTokenizer.from_pretrained(base / "tokenizer")
        draw = partial(draw_specifications, sprites, settings=settings, tokenizer=tokenizer)
        if not (settings.folder / "fresh.npz").exists():
            draw(settings.num_fresh, path=settings.folder / "fresh.npz", seed=FRESH_SEED)
        if not (settings.folder / "pairs.npz").exists():
            draw(settings.num_pairs, path=settings.folder / "pairs.npz", draw=draw_pairs, seed=PAIR_SEED)
        print(
            f"[{time.time() - start:6.0f}s] drew {settings.num_fresh} pictures, {settings.num_pairs} edits", flush=True
        )

    launch(work, (pack, settings, start, base), prepare, partial(warm, settings) if settings.compile else None)
