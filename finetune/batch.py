"""Draws to the tensors of a step; what is frozen is encoded before the first one.

Shapes: B samples (the concept's, those that are held first, then the prior's), C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from finetune.cache import Cache
from finetune.dataset.draws import Draw
from finetune.families.base import Family, Posterior, Prompt, Tokens
from finetune.objectives import noisier

# Through the VAE, whose activations are the largest of all.
PIXELS_AT_ONCE = 2**19
PICTURES_AT_ONCE = 8
COUNTS = 8  # of held samples, from one to all, that batches can have: for each a step is recorded anew


@dataclass(frozen=True)
class Batch:
    """All that a step depends on; drawn before it, so that the step is a pure function of tensors."""

    latents: Tensor  # (B, C, H, W), float32
    noise: Tensor  # (B, C, H, W), float32
    time: Tensor  # (B,), in the objective's unit
    prompt: Prompt | Tokens  # tokens where the text encoder's weights or words are trained
    geometry: Tensor  # (B, 6), see Family.denoise
    num_prior: int  # how many of the last samples are prior
    mask: Tensor | None = None  # (B, 1, H, W), how much each place counts; without it, all alike
    num_held: int = 0  # how many of the first samples may be held to the base's own prediction

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Each of its tensors changed."""
        latents, noise, time, geometry = map(change, (self.latents, self.noise, self.time, self.geometry))
        prompt = (
            self.prompt.map(change)
            if isinstance(self.prompt, Prompt)
            else {name: change(ids) for name, ids in self.prompt.items()}
        )
        mask = None if self.mask is None else change(self.mask)
        return Batch(latents, noise, time, prompt, geometry, self.num_prior, mask, self.num_held)

    def ends(self, held: int, prior: int) -> Batch:
        """The first and the last samples alone."""
        kept = self.map(lambda part: torch.cat([part[:held], part[len(part) - prior :]]))
        return replace(kept, num_held=held, num_prior=prior)

    def tensors(self) -> list[Tensor]:
        """All of them, in the same order for each batch."""
        found: list[Tensor] = []
        self.map(lambda part: found.append(part) or part)
        return found

    @property
    def form(self) -> Hashable:
        """What two batches have in common that the same kernels can work on."""
        return self.num_prior, self.num_held, *((part.shape, part.dtype) for part in self.tensors())


class Encoder:
    """Turns draws into batches on the family's device.

    Latents are kept as the VAE's posterior by (file content, crop, flip), masks likewise, prompts by their text.

    Args:
        unmasked_weight: how much a place outside a mask counts; None where there are no masks at all.
        keep_layout: from which share of the way to noise the concept's samples are held; None where none are.
    """

    def __init__(
        self,
        family: Family,
        *,
        size: int,
        trains_text: bool,
        noise_offset: float,
        unmasked_weight: float | None = None,
        keep_layout: float | None = None,
    ):
        self.family = family
        self.trains_text = trains_text
        self.noise_offset = noise_offset
        self.unmasked_weight = unmasked_weight
        self.keep_layout = keep_layout
        self.done: list[str] = []  # the parts of the pipeline that no draw needs any more
        self.cell = family.pipeline.vae_scale_factor
        self.posteriors = Cache(self._encode_pictures, _num_bytes, pictures_at_once(size), lambda draw: draw.crop.size)
        self.masks = Cache(self._read_masks, lambda mask: mask.nbytes, PICTURES_AT_ONCE)
        self.prompts = Cache(self._encode_captions, _num_bytes, 1)

    def read(self, draws: Iterable[Draw], *, show: bool = False) -> None:
        """Encode all captions, if there is room for what they become."""
        captions = {draw.caption: draw.caption for draw in draws}
        if self.prompts.fill(captions, title="encoding captions" if show else None):
            self.done += self.family.text_encoders

    def see(self, draws: Sequence[Draw], *, show: bool = False) -> None:
        """Encode all pictures and their masks, if there is room for what they become."""
        if self.unmasked_weight is not None:
            self.masks.fill({draw.mask_key: draw for draw in draws})
        pictures = {draw.key: draw for draw in draws}
        if self.posteriors.fill(pictures, title="encoding pictures" if show else None):
            self.done.append("vae")

    @property
    def complete(self) -> bool:
        """Whether no draw needs a file or an encoder any more."""
        return {"vae", *(() if self.trains_text else self.family.text_encoders)} <= set(self.done)

    def encode(self, draws: Sequence[Draw], num_prior: int) -> Batch:
        posteriors = self.posteriors.get({draw.key: draw for draw in draws})
        samples = [(draw, *self._sample(posteriors[draw.key], draw)) for draw in draws]
        concept, prior = samples[: len(samples) - num_prior], samples[len(samples) - num_prior :]
        num_held = self._put_held_first(concept)
        draws, *parts = zip(*concept, *prior, strict=True)
        latents, noise, time = map(torch.cat, parts)
        geometry = torch.tensor([draw.geometry for draw in draws], dtype=torch.float32)
        prompt = self._prompt([draw.caption for draw in draws])
        batch = Batch(latents, noise, time, prompt, geometry, num_prior, self._mask(draws), num_held)
        return batch.map(partial(send, device=self.family.device))

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

    def _put_held_first(self, samples: list[tuple[Draw, Tensor, Tensor, Tensor]]) -> int:
        """Order them in place; the number of those that are held, rounded up to one of a few."""
        if self.keep_layout is None:
            return 0
        times = torch.cat([time for *_, time in samples])
        noisy = noisier(self.family.objective, times, self.keep_layout).tolist()
        order = sorted(range(len(samples)), key=lambda place: not noisy[place])
        samples[:] = [samples[place] for place in order]
        unit = -(-len(samples) // COUNTS)
        return min(len(samples), -(-sum(noisy) // unit) * unit)

    def _mask(self, draws: Sequence[Draw]) -> Tensor | None:
        if self.unmasked_weight is None:
            return None
        known = self.masks.get({draw.mask_key: draw for draw in draws})
        coverage = torch.stack([known[draw.mask_key] for draw in draws])
        return self.unmasked_weight + (1 - self.unmasked_weight) * coverage

    def _read_masks(self, draws: Sequence[Draw]) -> list[Tensor]:
        unique = dict.fromkeys(draws)  # a group is filled up with its last one
        with ThreadPoolExecutor() as pool:
            found = dict(zip(unique, pool.map(lambda draw: draw.coverage(self.cell), unique), strict=True))
        return [torch.from_numpy(found[draw]) for draw in draws]

    def _encode_pictures(self, draws: Sequence[Draw]) -> list[Posterior]:
        with ThreadPoolExecutor() as pool:
            pixels = list(pool.map(lambda draw: torch.from_numpy(draw.pixels()), draws))
        posterior = self.family.encode_image(torch.stack(pixels))
        # Side by side channels would be convolved in another way than those that were laid in a file.
        means, stds = (part.cpu().contiguous().split(1) for part in (posterior.mean, posterior.std))
        return [Posterior(*pair) for pair in zip(means, stds, strict=True)]

    @torch.no_grad()
    def _encode_captions(self, captions: Sequence[str]) -> list[Prompt]:
        return [self.family.encode_prompt(self.family.tokenize([caption])).to("cpu") for caption in captions]

    def _prompt(self, captions: Sequence[str]) -> Prompt | Tokens:
        if self.trains_text:
            return self.family.tokenize(captions)
        known = self.prompts.get(dict(zip(captions, captions, strict=True)))
        return Prompt.join([known[caption] for caption in captions])


def send(part: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what it is doing."""
    if device.type == "cuda":
        part = part.pin_memory()
    return part.to(device, non_blocking=True)


def pictures_at_once(size: int) -> int:
    """How many of `size` x `size` pixels are encoded together."""
    return min(PICTURES_AT_ONCE, max(1, PIXELS_AT_ONCE // size**2))


def _num_bytes(encoded: Posterior | Prompt) -> int:
    return sum(part.nbytes for part in vars(encoded).values() if part is not None)
