"""The autoencoder: crisp pictures out of latents that a small denoiser can model.

Absolute, squared and edge errors; a fraction of the latents is also decoded at half size and must give the half-size
picture (EQ-VAE, arXiv:2502.09509), which makes the latents smooth and the denoiser's work easier.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from gallery import Gallery
from models import new_autoencoder
from muon import Muon
from settings import Settings
from team import Average, Team, schedule
from torch import Tensor

KL_WEIGHT = 1e-4
HALF_WEIGHT = 0.25
ENCODE_BATCH = 256


def edges(error: Tensor) -> Tensor:
    """Mean absolute slope of an error, which blur is made of."""
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def reconstruction_loss(made: Tensor, truth: Tensor) -> Tensor:
    error = made.float() - truth
    loss = error.abs().mean() + 2 * error.square().mean()
    for _ in range(3):
        loss = loss + 0.5 * edges(error)
        error = F.avg_pool2d(error, 2)
    return loss


def autoencoder_loss(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error) of pictures [n, 3, h, w] from -1 to 1."""
    posterior = vae.encode(pictures).latent_dist
    latents = posterior.sample()
    made = vae.decode(latents).sample
    some = max(1, len(pictures) // 4)
    half = vae.decode(F.avg_pool2d(latents[:some], 2)).sample
    with torch.autocast(pictures.device.type, enabled=False):
        kl = posterior.kl().float().mean() / latents[0].numel()
        loss = reconstruction_loss(made, pictures) + KL_WEIGHT * kl
        loss = loss + HALF_WEIGHT * reconstruction_loss(half, F.avg_pool2d(pictures[:some], 2))
        return loss, (made.float() - pictures).square().mean()


def psnr(squared_error: float) -> float:
    """Decibels of a mean squared error on the -1..1 scale."""
    return -10 * math.log10(max(squared_error, 1e-12) / 4)


def train_autoencoder(vae: AutoencoderKL, gallery: Gallery, settings: Settings, team: Team, seconds: float) -> None:
    """Train in place, keep the averaged weights, and set the latents' scaling factor."""
    vae.to(team.device, memory_format=torch.channels_last).train()
    optimizer = Muon(vae, lr=1e-3, weight_decay=0.0, edges=("conv_in", "conv_out", "quant_conv"))
    average = Average(vae)
    loss_of = torch.compile(autoencoder_loss, dynamic=False) if settings.compile else autoencoder_loss
    for step, gone in team.ticks(seconds, settings.steps):
        pictures = gallery.whole(gallery.some(settings.batch_autoencoder))
        with torch.autocast(team.device.type, dtype=torch.bfloat16):
            loss, error = loss_of(vae, pictures.contiguous(memory_format=torch.channels_last))
        loss.backward()
        team.average(optimizer.gradients())
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
        optimizer.step(schedule(gone, step))
        average.update()
        if step % 200 == 0:
            team.log(f"autoencoder {step} at {gone:.2f} loss {loss.item():.4f} psnr {psnr(error.item()):.2f}")
    average.copy_to(vae)
    vae.eval().requires_grad_(False)
    latents, error = encode_some(vae, gallery, team)
    scale = team.agree(1 / latents.float().std().item())
    vae.register_to_config(scaling_factor=scale)
    team.log(f"autoencoder done: psnr {psnr(error):.2f} dB, latent scale {scale:.3f}")


@torch.no_grad()
def encode_some(vae: AutoencoderKL, gallery: Gallery, team: Team, count: int = 64) -> tuple[Tensor, float]:
    """(latents, mean squared error) of a few whole pictures."""
    pictures = gallery.whole(gallery.some(count)).contiguous(memory_format=torch.channels_last)
    with torch.autocast(team.device.type, dtype=torch.bfloat16):
        latents = vae.encode(pictures).latent_dist.sample()
        made = vae.decode(latents).sample
    return latents, (made.float() - pictures).square().mean().item()


@torch.no_grad()
def encode_gallery(vae: AutoencoderKL, gallery: Gallery, settings: Settings, team: Team) -> Tensor:
    """Scaled latents bf16 [n, 4, h/8, w/8] of every picture, sampled once."""
    size = settings.latent_size
    latents = torch.empty(len(gallery), 4, size, size, dtype=torch.bfloat16, device=team.device)
    encode = torch.compile(vae.encoder, dynamic=False) if settings.compile else vae.encoder
    batch = min(ENCODE_BATCH, len(gallery))
    for start in range(0, len(gallery), batch):
        rows = torch.arange(start, start + batch, device=team.device).clamp(max=len(gallery) - 1)
        pictures = gallery.whole(rows).contiguous(memory_format=torch.channels_last)
        with torch.autocast(team.device.type, dtype=torch.bfloat16):
            mean, logvar = vae.quant_conv(encode(pictures)).float().chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (logvar.clamp(-30, 20) / 2).exp()
        latents[start : start + batch] = (drawn * vae.config.scaling_factor)[: len(gallery) - start]
    return latents


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor, source: bool) -> Tensor:
    """Latents [n, 4, h/8, w/8] of pictures in 0..1: drawn and scaled, or a source's: the unscaled mode."""
    pixels = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(pictures.device.type, dtype=torch.bfloat16):
        found = vae.encode(pixels).latent_dist
    return found.mode().float() if source else found.sample().float() * vae.config.scaling_factor


def warm_autoencoder(settings: Settings) -> None:
    """Compile the training step for the real shapes."""
    vae = new_autoencoder(settings).to("cuda", memory_format=torch.channels_last)
    size = settings.picture_size
    pictures = torch.rand(settings.batch_autoencoder, 3, size, size, device="cuda").contiguous(
        memory_format=torch.channels_last
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, _ = torch.compile(autoencoder_loss, dynamic=False)(vae, pictures)
    loss.backward()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        torch.compile(vae.encoder, dynamic=False)(
            pictures[:1].expand(ENCODE_BATCH, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        )
