"""Draws to the tensors of a step; what is frozen is encoded once and kept by its content.

Shapes: B samples (the concept's first, then the prior's), C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.dataset.draws import Draw
from finetune.families.base import Family, Posterior, Prompt, Tokens

ENCODE_AT_ONCE = 8  # pictures through the VAE: its activations are the largest of all


@dataclass(frozen=True)
class Batch:
    """All that a step depends on; drawn before it, so that the step is a pure function of tensors."""

    latents: Tensor  # (B, C, H, W), float32
    noise: Tensor  # (B, C, H, W), float32
    time: Tensor  # (B,), in the objective's unit
    prompt: Prompt | Tokens  # tokens where the text encoder's weights or words are trained
    geometry: Tensor  # (B, 6), see Family.denoise
    num_prior: int  # how many of the last samples are prior

    def last(self, count: int) -> Batch:
        """The last samples alone."""
        prompt = (
            self.prompt.last(count)
            if isinstance(self.prompt, Prompt)
            else {name: ids[-count:] for name, ids in self.prompt.items()}
        )
        latents, noise, time, geometry = (
            part[-count:] for part in (self.latents, self.noise, self.time, self.geometry)
        )
        return Batch(latents, noise, time, prompt, geometry, count)


class Encoder:
    """Turns draws into batches on the family's device.

    Latents are cached as the VAE's posterior by (file content, crop, flip), prompts by
    their text, so neither a shuffle nor a renamed file can match them up wrongly. A random
    crop is seldom drawn twice, and is not kept.
    """

    def __init__(self, family: Family, *, trains_text: bool, noise_offset: float):
        self.family = family
        self.trains_text = trains_text
        self.noise_offset = noise_offset
        self._posteriors: dict[tuple, Posterior] = {}
        self._prompts: dict[str, Prompt] = {}

    def encode(self, draws: Sequence[Draw], num_prior: int, keep: bool = True) -> Batch:
        posteriors = self._encode_images(draws, keep)
        samples = [self._sample(*pair) for pair in zip(posteriors, draws, strict=True)]
        latents, noise, time = (torch.cat(parts).to(self.family.device) for parts in zip(*samples, strict=True))
        geometry = torch.tensor([draw.geometry for draw in draws], dtype=torch.float32, device=self.family.device)
        prompt = self._encode_captions([draw.caption for draw in draws])
        return Batch(latents, noise, time, prompt, geometry, num_prior)

    def _sample(self, posterior: Posterior, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, noise and time of one sample, from its own generator: B is 1."""
        generator = torch.Generator().manual_seed(draw.seed)
        shape = posterior.mean.shape
        latents = posterior.mean + posterior.std * torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        time = self.family.objective.sample_time(generator, shape)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn((*shape[:2], 1, 1), generator=generator)
        return latents, noise, time

    def _encode_images(self, draws: Sequence[Draw], keep: bool) -> list[Posterior]:
        known = self._posteriors if keep else {}
        new = list({draw.key: draw for draw in draws if draw.key not in known}.values())
        for start in range(0, len(new), ENCODE_AT_ONCE):
            some = new[start : start + ENCODE_AT_ONCE]
            with ThreadPoolExecutor() as pool:
                pixels = list(pool.map(lambda draw: torch.from_numpy(draw.pixels()), some))
            posterior = self.family.encode_image(torch.stack(pixels))
            means, stds = posterior.mean.cpu().split(1), posterior.std.cpu().split(1)
            known.update((draw.key, Posterior(*pair)) for draw, *pair in zip(some, means, stds, strict=True))
        return [known[draw.key] for draw in draws]

    def _encode_captions(self, captions: Sequence[str]) -> Prompt | Tokens:
        if self.trains_text:
            return self.family.tokenize(captions)
        for caption in set(captions) - self._prompts.keys():
            with torch.no_grad():
                self._prompts[caption] = self.family.encode_prompt(self.family.tokenize([caption]))
        return Prompt.join([self._prompts[caption] for caption in captions])
