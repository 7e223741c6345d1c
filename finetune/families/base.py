"""What a method may ask of a text-to-image model, whichever architecture it has.

Shapes: B batch, C latent channels, H W latent size, h w pixels, L prompt length, D prompt width.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.objectives import Diffusion
from finetune.registry import Registry

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Tokens = Mapping[str, Tensor]  # text encoder -> (B, L) ids


@dataclass(frozen=True)
class Prompt:
    """Captions as the denoiser takes them."""

    embeds: Tensor  # (B, L, D)


@dataclass(frozen=True)
class Posterior:
    """What the VAE says of a picture before a latent is drawn from it, scaled as the denoiser sees it."""

    mean: Tensor  # (B, C, H, W)
    std: Tensor  # (B, C, H, W)


@dataclass(frozen=True)
class Source:
    """Where a base comes from: a folder in diffusers' layout, or a model of the Hub."""

    path: str
    revision: str | None = None
    dtype: torch.dtype = torch.float32


class Family(ABC):
    """A frozen text-to-image model behind one interface. One subclass for each architecture."""

    pipeline_classes: ClassVar[tuple[str, ...]]  # as named in a checkpoint's model_index.json
    denoiser_name: ClassVar[str]  # attribute of the pipeline: "unet" or "transformer"
    text_encoders: ClassVar[Mapping[str, str]]  # attribute of the pipeline -> its tokenizer's
    attention: ClassVar[tuple[str, ...]]  # suffixes of the attention projections
    feed_forward: ClassVar[tuple[str, ...]]  # suffixes of the feed-forward layers
    text_attention: ClassVar[tuple[str, ...]]  # suffixes of the text encoders' attention projections

    def __init__(self, pipeline: DiffusionPipeline, objective: Diffusion, source: Source):
        self.pipeline = pipeline
        self.objective = objective
        self.source = source
        for part in self.parts():
            part.requires_grad_(False).eval()

    @classmethod
    @abstractmethod
    def load(cls, source: Source, *, min_snr_gamma: float | None, zero_terminal_snr: bool) -> Family:
        """Read a checkpoint, and its objective from the scheduler's config."""

    @abstractmethod
    def encode_prompt(self, tokens: Tokens) -> Prompt:
        """Differentiable in the text encoders' weights."""

    @abstractmethod
    def denoise(self, noised: Tensor, time: Tensor, prompt: Prompt) -> Tensor:
        """Predict the objective's target: noised (B, C, H, W), time (B,) in the objective's unit."""

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's own precision, whatever its adapters have."""
        return next(self.denoiser.parameters()).dtype

    def parts(self) -> Iterator[nn.Module]:
        return (part for part in self.pipeline.components.values() if isinstance(part, nn.Module))

    def to(self, device: torch.device) -> None:
        self.pipeline.to(device)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Posterior:
        """Pixels (B, 3, h, w) in [-1, 1] to the scaled posterior of their latents."""
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
        return Posterior((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """Those whose end `tokenize` cuts off."""
        tokenizers = [getattr(self.pipeline, name) for name in self.text_encoders.values()]
        return [
            caption
            for caption in captions
            if any(
                len(tokenizer(self._spell(caption, tokenizer)).input_ids) > tokenizer.model_max_length
                for tokenizer in tokenizers
            )
        ]

    def _spell(self, caption: str, tokenizer: Any) -> str:
        """The caption with each word of several vectors written out, as the pipelines do."""
        return self.pipeline.maybe_convert_prompt(caption, tokenizer)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions to ids, padded and cut at the encoder's length."""
        tokens = {}
        for encoder, name in self.text_encoders.items():
            tokenizer = getattr(self.pipeline, name)
            encoded = tokenizer(
                [self._spell(caption, tokenizer) for caption in captions],
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            )
            tokens[encoder] = encoded.input_ids
        return tokens

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The trained modules as they are used: no dropout, no gradients, and the random state left alone."""
        was_training = {part: part.training for part in self.parts()}
        with torch.random.fork_rng(), torch.no_grad():
            for part in was_training:
                part.eval()
            try:
                yield
            finally:
                for part, training in was_training.items():
                    part.train(training)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash that tells bases apart: the weights' headers and evenly spaced samples of their bytes."""
        digest = hashlib.sha256(json.dumps(type(self).__name__).encode())
        for file in sorted(snapshot(self.source).rglob("*.safetensors")):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                size = stream.seek(0, 2)
                for offset in range(0, size, max(1 << 16, size // 64)):
                    stream.seek(offset)
                    digest.update(stream.read(1 << 16))
        return digest.hexdigest()[:16]


def snapshot(source: Source) -> Path:
    """The local folder of a base; one from the Hub is already in its cache once it was loaded."""
    if Path(source.path).is_dir():
        return Path(source.path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))


families: Registry[Family] = Registry("model family", "finetune.families")
