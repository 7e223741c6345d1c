"""The denoiser and its text encoder, trained together on stored latents."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from models import new_denoiser, new_scheduler
from muon import Muon
from settings import Settings
from team import Average, Team, schedule
from torch import Tensor, nn
from transformers import CLIPTextModel

EMPTY_SHARE = 0.1  # of the captions, for classifier-free guidance
SNR_LIMIT = 5.0
TEXT_RATE = 0.25  # learning rate of the text encoder beside the denoiser's


class Generator(nn.Module):
    """Text encoder and denoiser, the two networks that a prompt goes through at every step."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet


def diffusion_loss(
    unet: UNet2DConditionModel, latents: Tensor, noise: Tensor, time: Tensor, prompt: Tensor, alphas: Tensor
) -> Tensor:
    """Noise prediction, weighted by min-SNR (arXiv:2303.09556).

    Shapes: latents and noise [b, 4, h, w], time [b], prompt [b, 77, d], alphas: cumulative products [1000].
    """
    alpha = alphas[time].view(-1, 1, 1, 1)
    guess = unet(add_noise(latents, noise, alpha), time, prompt).sample
    return weighted_error(guess, noise, alpha)


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    return noised.contiguous(memory_format=torch.channels_last)


def weighted_error(guess: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Squared error [b, 4, h, w] by min-SNR; alpha: cumulative products [b, 1, 1, 1]."""
    snr = (alpha / (1 - alpha)).flatten()
    return ((guess.float() - noise).square().mean((1, 2, 3)) * (snr.clamp(max=SNR_LIMIT) / snr)).mean()


@torch.no_grad()
def sample(
    model: Generator,
    vae: AutoencoderKL,
    ids: Tensor,
    empty: Tensor,
    settings: Settings,
    seed: int = 1,
    guidance: float = 5.0,
    steps: int = 25,
) -> Tensor:
    """DDIM pictures [n, 3, h, w] in 0..1 for token ids [n, 77], guided away from the empty caption [1, 77]."""
    device, scheduler = ids.device, new_scheduler()
    scheduler.set_timesteps(steps, device=device)
    noise = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn(len(ids), 4, settings.latent_size, settings.latent_size, generator=noise).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        prompt = model.text_encoder(input_ids=torch.cat([empty.expand_as(ids), ids])).last_hidden_state
        for t in scheduler.timesteps:
            base, prompted = model.unet(torch.cat([latents] * 2), t, prompt).sample.float().chunk(2)
            latents = scheduler.step(base + guidance * (prompted - base), t, latents).prev_sample
        pictures = vae.decode(latents / vae.config.scaling_factor).sample
    return (pictures.float() / 2 + 0.5).clamp(0, 1)


def train_denoiser(
    model: Generator, latents: Tensor, all_ids: Tensor, empty: Tensor, settings: Settings, team: Team, seconds: float,
    show: Callable[[Generator, int], None],
) -> None:  # fmt: skip
    """Train in place and keep the averaged weights; `show` gets them now and then."""
    model.to(team.device).train()
    model.unet.to(memory_format=torch.channels_last)
    optimizers = (
        (Muon(model.unet, lr=1e-3, edges=("conv_in", "conv_out", "time_embedding")), 1.0),
        (Muon(model.text_encoder, lr=1e-3, edges=("embedding",)), TEXT_RATE),
    )
    average = Average(model)
    alphas = new_scheduler().alphas_cumprod.to(team.device)
    loss_of = torch.compile(diffusion_loss, dynamic=False) if settings.compile else diffusion_loss
    batch, shown, total = settings.batch_denoiser, time.time(), torch.zeros((), device=team.device)
    for step, gone in team.ticks(seconds, settings.steps):
        rows = torch.randint(0, len(latents), (batch,), device=team.device)
        dropped = torch.rand(batch, 1, device=team.device) < EMPTY_SHARE
        ids = torch.where(dropped, empty, all_ids[rows].long())
        clean = latents[rows].float()
        times = torch.randint(0, 1000, (batch,), device=team.device)
        with torch.autocast(team.device.type, dtype=torch.bfloat16):
            prompt = model.text_encoder(input_ids=ids).last_hidden_state
            loss = loss_of(model.unet, clean, torch.randn_like(clean), times, prompt, alphas)
        loss.backward()
        team.average([g for optimizer, _ in optimizers for g in optimizer.gradients()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in optimizers:
            optimizer.step(schedule(gone, step, warmup=200) * rate)
        average.update()
        total += loss.detach()
        if step and step % 200 == 0:
            team.log(f"denoiser {step} at {gone:.2f} loss {total.item() / 200:.4f}")
            total.zero_()
        if team.leads and settings.sample_every and time.time() - shown > settings.sample_every:
            shown = time.time()
            show(averaged(average, model), step)
    average.copy_to(model)
    model.eval().requires_grad_(False)


def averaged(average: Average, model: Generator) -> Generator:
    """A copy of the model with the averaged weights."""
    copy = Generator(CLIPTextModel(model.text_encoder.config), UNet2DConditionModel.from_config(model.unet.config))
    average.copy_to(copy)
    return copy.to(next(model.parameters()).device).eval()


def save_generator(model: Generator, folder: Path) -> None:
    torch.save({name: w.half() for name, w in model.state_dict().items()}, folder / "generator_ema.pt")


def warm_denoiser(settings: Settings) -> None:
    """Compile the training step for the real shapes."""
    unet = new_denoiser(settings).to("cuda", memory_format=torch.channels_last).train()
    batch, size = settings.batch_denoiser, settings.latent_size
    latents = torch.randn(batch, 4, size, size, device="cuda")
    times = torch.randint(0, 1000, (batch,), device="cuda")
    prompt = torch.randn(batch, 77, settings.text_width, device="cuda", requires_grad=True)
    alphas = new_scheduler().alphas_cumprod.to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = torch.compile(diffusion_loss, dynamic=False)(
            unet, latents, torch.randn_like(latents), times, prompt, alphas
        )
    loss.backward()
