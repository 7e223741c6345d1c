"""What the denoiser is asked to predict, and how much each noise level counts.

Shapes: B batch, C latent channels, H W latent height and width, T noise levels.
Time is an index 0..T-1, from almost clean to almost noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.errors import UserError


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

    def sample_time(self, generator: torch.Generator) -> Tensor:
        """A uniform noise level, (1,) int64."""
        return torch.randint(len(self.alphas_cumprod), (1,), generator=generator)

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
        alpha = self.alphas_cumprod.to(time.device)[time]
        snr = alpha / (1 - alpha)
        clipped = snr.clamp(max=self.min_snr_gamma)
        return clipped / (snr if self.prediction == "epsilon" else snr + 1)

    def _mix(self, like: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod.to(like.device)[time].view(-1, 1, 1, 1)
        return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)


def rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(ab) so that the last level is pure noise (2305.08891): (T,)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
