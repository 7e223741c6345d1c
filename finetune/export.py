"""The small files that go out. Each is written whole or not at all, and reloaded before it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapter import in_precision
from finetune.batch import Batch
from finetune.families.base import Family
from finetune.files import whole, write_tensors
from finetune.lowrank import LowRank
from finetune.originals import clip_name
from finetune.student import predict
from finetune.vocabulary import words

# The names that diffusers and the Hub look for in a folder.
LORA_FILE = "pytorch_lora_weights.safetensors"
WORDS_FILE = "learned_embeds.safetensors"
PIPELINE_FOLDER = "checkpoint"  # a whole denoiser's pipeline, where it was asked for


def save(weights: Mapping[str, Tensor], path: Path, dtype: torch.dtype, header: Mapping[str, str]) -> Path:
    """Write all in one precision; readers see the old file or the new one."""
    tensors = {name: value.detach() for name, value in weights.items()}
    return write_tensors(in_precision(tensors, dtype), path, header, overwrite=True)


def save_lora(parts: Mapping[str, LowRank], folder: Path, dtype: torch.dtype, header: Mapping[str, str]) -> Path:
    """Factors of the denoiser and the text encoders in diffusers' format; as their scale is 1, alpha is the rank."""
    weights = {f"{part}.{clip_name(name)}": factor for part, found in parts.items() for name, factor in found.items()}
    ranks = sorted({len(factor) for name, factor in weights.items() if name.endswith(".lora_A.weight")})
    rank = f"{ranks[0]}..{ranks[-1]}" if ranks[1:] else str(ranks[0])
    return save(weights, folder / LORA_FILE, dtype, {**header, "rank": rank, "alpha": rank})


def save_words(family: Family, folder: Path, dtype: torch.dtype, header: Mapping[str, str]) -> list[Path]:
    """The trained vectors: under their word, as `load_textual_inversion` reads them, where there is one text
    encoder; under the encoders' names, as ComfyUI reads them, where there are several."""
    tables = words(family)
    several = len(tables) > 1
    named = {family.word_keys[name] if several else table.word: table.new for name, table in tables.items()}
    return [save(named, folder / WORDS_FILE, dtype, header)]


def save_pipeline(family: Family, folder: Path) -> Path:
    """The whole pipeline, as diffusers reads it."""
    with whole(folder / PIPELINE_FOLDER, overwrite=True) as unfinished:
        family.pipeline.save_pretrained(unfinished, safe_serialization=True)
    return folder / PIPELINE_FOLDER


@dataclass(frozen=True)
class Verdict:
    """How far an exported file, loaded anew, is from the trained model."""

    error: float  # of the predictions, relative to how much training changed them
    changed: float  # how much training changed the predictions, relative to their size

    TOLERANCE = 0.02

    @property
    def passed(self) -> bool:
        return self.changed > 0 and self.error <= self.TOLERANCE


@torch.no_grad()
def probe(family: Family, captions: Sequence[str], size: int) -> Tensor:
    """The family's prediction on fixed noised latents at four noise levels per caption, in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shape, geometry = (4, *family.latent_shape(size)), torch.tensor([[size, size, 0, 0, size, size]]).float()
    times = family.objective.time_at(torch.tensor([0.1, 0.35, 0.6, 0.9]))
    predictions = []
    with family.exact():
        for prompt in family.read(captions):
            drawn = (torch.randn(shape, generator=generator) for _ in range(2))
            for latents, noise, time in zip(*(part.split(1) for part in (*drawn, times)), strict=True):
                batch = Batch(latents, noise, time, prompt, geometry, 0).map(partial(Tensor.to, device=family.device))
                predictions.append(predict(family, batch).cpu())
    return torch.cat(predictions)


def compare(before: Tensor, after: Tensor, reloaded: Tensor) -> Verdict:
    """Judge the reloaded model by the change it must reproduce, which a small adapter's own size hides."""
    change = float((after - before).norm())
    error = float((reloaded - after).norm()) / change if change else float("inf")
    return Verdict(error, change / float(before.norm()))
