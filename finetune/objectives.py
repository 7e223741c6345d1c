"""What the denoiser is asked to predict, and how much each noise level counts.

Shapes: B batch, C latent channels, H W latent height and width, T noise levels.
Time is an index 0..T-1, from almost clean to almost noise, for `Diffusion`; for `Flow` it is
the share of noise, 0..1. Families turn it into what their networks take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from finetune.errors import UserError


class Objective(Protocol):
    """What a trainer asks of the way from picture to noise."""

    def sample_time(self, generator: torch.Generator, shape: torch.Size) -> Tensor: ...

    def time_at(self, share: Tensor) -> Tensor: ...

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor: ...

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor: ...

    def weight(self, time: Tensor) -> Tensor: ...

    def to(self, device: torch.device) -> Objective: ...


def noisier(objective: Objective, time: Tensor, share: float) -> Tensor:
    """Which times (B,) lie beyond a share of the way from picture to noise: (B,), bool."""
    return time >= objective.time_at(torch.full_like(time, share, dtype=torch.float32))


@dataclass(frozen=True)
class Diffusion:
    """DDPM's forward process (2006.11239) with epsilon or v prediction (2202.00512)."""

    alphas_cumprod: Tensor  # (T,), float32, decreasing
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    min_snr_gamma: float | None = None

    @classmethod
    def from_scheduler(
        cls, config: Mapping[str, Any], *, min_snr_gamma: float | None, zero_terminal_snr: bool
    ) -> Diffusion:
        """Read the noise schedule and the prediction type that a checkpoint was trained with."""
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        scheduler: Any = DDPMScheduler.from_config(dict(config), rescale_betas_zero_snr=False)
        prediction = scheduler.config["prediction_type"]
        if prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"base.source: it predicts {prediction!r}; only epsilon and v_prediction can be trained")
        alphas_cumprod = scheduler.alphas_cumprod.float()
        if zero_terminal_snr or config.get("rescale_betas_zero_snr"):
            alphas_cumprod = rescale_to_zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod, prediction, min_snr_gamma)

    def sample_time(self, generator: torch.Generator, shape: torch.Size) -> Tensor:
        """A uniform noise level, whatever the latents' shape: (1,) int64."""
        return torch.randint(len(self.alphas_cumprod), (1,), generator=generator)

    def time_at(self, share: Tensor) -> Tensor:
        """The noise levels at shares (B,) of the way from picture to noise: (B,) int64."""
        return (share * len(self.alphas_cumprod)).long()

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) e, each (B, C, H, W), time (B,)."""
        signal, spread = self._mix(clean, time)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the denoiser should say of x_t, (B, C, H, W): e, or v = sqrt(ab_t) e - sqrt(1 - ab_t) x_0."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._mix(clean, time)
        return signal * noise - spread * clean

    def weight(self, time: Tensor) -> Tensor:
        """Min-SNR weights (2303.09556), or ones: (B,).

        The clipped SNR is divided by SNR for epsilon and by SNR + 1 for v, since
        that is how their squared errors relate to the error of x_0.
        """
        if self.min_snr_gamma is None:
            return torch.ones_like(time, dtype=torch.float32)
        alpha = self.alphas_cumprod[time]
        snr = alpha / (1 - alpha)
        clipped = snr.clamp(max=self.min_snr_gamma)
        return clipped / (snr if self.prediction == "epsilon" else snr + 1)

    def to(self, device: torch.device) -> Diffusion:
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def _mix(self, like: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod[time].view(-1, 1, 1, 1)
        return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)


def rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(ab) so that the last level is pure noise (2305.08891): (T,)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


@dataclass(frozen=True)
class Flow:
    """Rectified flow with logit-normal times (2403.03206), shifted towards noise as the checkpoint is sampled.

    Twice as many pixels need more noise to be destroyed alike, so the shift is either one
    number or grows with the number of 2x2 patches: its logarithm on a line through two points.
    """

    shift: float | None = 1.0
    line: tuple[float, float, float, float] = (256, 0.5, 4096, 1.15)  # patches, log shift, twice; where shift is None

    PATCH: ClassVar[int] = 2

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], *, min_snr_gamma: float | None, zero_terminal_snr: bool) -> Flow:
        """Read the shift that a checkpoint is sampled with."""
        problems = [
            f"train.{name}: is for models trained by diffusion; this base is trained by flow matching. Remove it."
            for name, given in (("min_snr_gamma", min_snr_gamma), ("zero_terminal_snr", zero_terminal_snr))
            if given
        ]
        if problems:
            raise UserError(problems)
        if not config.get("use_dynamic_shifting"):
            return cls(float(config.get("shift", 1.0)))
        names = ("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift")
        patches, start, most, end = (
            float(config.get(name, default)) for name, default in zip(names, cls.line, strict=True)
        )
        return cls(None, (patches, start, most, end))

    def shift_for(self, shape: torch.Size) -> float:
        """How much latents (..., H, W) are shifted."""
        if self.shift is not None:
            return self.shift
        patches, start, most, end = self.line
        tokens = shape[-2] * shape[-1] / self.PATCH**2
        return math.exp(start + (end - start) * (tokens - patches) / (most - patches))

    def sample_time(self, generator: torch.Generator, shape: torch.Size) -> Tensor:
        """s = a u / (1 + (a - 1) u) with u = sigmoid(N(0, 1)) and shift a: (1,) float32."""
        shift, plain = self.shift_for(shape), torch.sigmoid(torch.randn(1, generator=generator))
        return shift * plain / (1 + (shift - 1) * plain)

    def time_at(self, share: Tensor) -> Tensor:
        """The share itself: (B,)."""
        return share

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_s = (1 - s) x_0 + s e, each (B, C, H, W), time (B,)."""
        share = time.view(-1, 1, 1, 1).to(clean)
        return (1 - share) * clean + share * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The velocity e - x_0: (B, C, H, W)."""
        return noise - clean

    def weight(self, time: Tensor) -> Tensor:
        """Ones: the times' distribution is the weighting. (B,)"""
        return torch.ones_like(time, dtype=torch.float32)

    def to(self, device: torch.device) -> Flow:
        return self
