"""How far an adapter moves the base where it was not asked to: its denoiser's answers, and pictures of the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.batch import Batch
from finetune.families.base import Family
from finetune.student import predict

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the way from picture to noise
UNRELATED = ("a red apple on a white background", "a car in the city", "a house in the snow", "a sunflower in a garden")


@dataclass(frozen=True)
class Drift:
    """Mean squared differences of the denoiser's predictions with the adapter and without it.

    Both see the same noised pictures, which the base drew of the same prompts, at the same `times` with the same noise.
    A prediction's own mean square is near 1, so 0.01 is a hundredth of it.
    """

    times: tuple[float, ...]
    class_prompts: float
    unrelated: float


def differ(before: Tensor, after: Tensor) -> float:
    """The mean squared difference of two results of `predictions`."""
    return float((after - before).square().mean())


@torch.no_grad()
def predictions(family: Family, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> Tensor:
    """What the denoiser says of a picture for each prompt, noised at each time: (T * N, C, H, W), on the CPU."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    height, width = pixels.shape[-2:]
    geometry = torch.tensor([[height, width, 0, 0, height, width]] * len(prompts)).float().to(family.device)
    found = []
    with family.looking(), family.exact():
        latents = family.encode_image(pixels.float() / 127.5 - 1).mean.to(family.device)
        for time in family.objective.time_at(torch.tensor(TIMES)):
            noise = torch.randn(latents.shape, generator=generator).to(family.device)
            when = time.expand(len(prompts)).to(family.device)
            batch = Batch(latents, noise, when, family.tokenize(prompts), geometry, 0)
            found.append(predict(family, batch).cpu())
    return torch.cat(found)
