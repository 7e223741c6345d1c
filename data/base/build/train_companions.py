"""The companions' networks and losses: a ControlNet on edge maps, and an InstructPix2Pix denoiser."""

from __future__ import annotations

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from models import new_denoiser, new_scheduler
from settings import Settings
from torch import Tensor
from train_denoiser import add_noise, diffusion_loss, weighted_error

HINT_CHANNELS = (16, 32, 64, 96)


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """arXiv:2302.05543: a copy of the denoiser's first half, an encoder of the edge map, and zero convolutions."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)


def new_editor(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """arXiv:2211.09800: four more input channels for the source's latents, of no weight at first."""
    config = {name: value for name, value in unet.config.items() if name != "_use_default_values"}
    editor = UNet2DConditionModel.from_config(config | {"in_channels": 2 * unet.config.in_channels})
    weights = {name: w.clone() for name, w in unet.state_dict().items()}
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], torch.zeros_like(weights["conv_in.weight"])], 1)
    editor.load_state_dict(weights)
    return editor


def control_loss(
    controlnet: ControlNetModel, unet: UNet2DConditionModel, latents: Tensor, hint: Tensor, noise: Tensor,
    time: Tensor, prompt: Tensor, alphas: Tensor,
) -> Tensor:  # fmt: skip
    """hint: booleans [b, h, w] of the edge map; the rest as in `diffusion_loss`."""
    alpha = alphas[time].view(-1, 1, 1, 1)
    noised = add_noise(latents, noise, alpha)
    picture = hint[:, None].to(latents.dtype).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    down, middle = controlnet(noised, time, prompt, picture, return_dict=False)
    guess = unet(
        noised, time, prompt, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    return weighted_error(guess, noise, alpha)


def edit_loss(
    editor: UNet2DConditionModel, latents: Tensor, source: Tensor, noise: Tensor, time: Tensor, prompt: Tensor,
    alphas: Tensor,
) -> Tensor:  # fmt: skip
    """source: unscaled latents [b, 4, h, w] of the picture before, as the pipeline gives them; zeros for none."""
    alpha = alphas[time].view(-1, 1, 1, 1)
    noised = torch.cat([add_noise(latents, noise, alpha), source], 1).contiguous(memory_format=torch.channels_last)
    return weighted_error(editor(noised, time, prompt).sample, noise, alpha)


def toy_batch(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(latents, noise, times, prompts, alphas) of the real shapes and types."""
    batch, size = settings.batch_denoiser, settings.latent_size
    latents = torch.randn(batch, 4, size, size, device="cuda")
    times = torch.randint(0, 1000, (batch,), device="cuda")
    prompt = torch.randn(batch, 77, settings.text_width, device="cuda", dtype=torch.float16)
    return latents, torch.randn_like(latents), times, prompt, new_scheduler().alphas_cumprod.to("cuda")


def warm_refine(settings: Settings) -> None:
    """Compile the denoiser's step with stored prompts."""
    unet = new_denoiser(settings).to("cuda", memory_format=torch.channels_last).train()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = torch.compile(diffusion_loss, dynamic=False)(unet, *toy_batch(settings))
    loss.backward()


def warm_control(settings: Settings) -> None:
    unet = new_denoiser(settings).to("cuda", memory_format=torch.channels_last).requires_grad_(False).eval()
    controlnet = new_controlnet(unet).to("cuda", memory_format=torch.channels_last).train().requires_grad_(True)
    latents, noise, times, prompt, alphas = toy_batch(settings)
    hint = torch.rand(len(latents), settings.picture_size, settings.picture_size, device="cuda") < 0.03
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = torch.compile(control_loss, dynamic=False)(controlnet, unet, latents, hint, noise, times, prompt, alphas)
    loss.backward()


def warm_edit(settings: Settings) -> None:
    unet = new_denoiser(settings).to("cuda")
    editor = new_editor(unet).to("cuda", memory_format=torch.channels_last).train().requires_grad_(True)
    latents, noise, times, prompt, alphas = toy_batch(settings)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = torch.compile(edit_loss, dynamic=False)(
            editor, latents, torch.randn_like(latents), noise, times, prompt, alphas
        )
    loss.backward()
