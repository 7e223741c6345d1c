"""Adapters back into any diffusers pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.adapter import AdapterWeights, WordVectors
from finetune.errors import UserError, reason
from finetune.formats import read, to_diffusers
from finetune.placeholder import add_word, pool_at_the_end
from finetune.shortage import is_out_of_memory

# What an embedding's vectors are for -> the endings of the pipelines' attributes where such an encoder may be.
ENCODERS = {"clip_l": ("",), "clip_g": ("_2",), "t5": ("_3", "_2"), "qwen3": ("",)}


@dataclass(frozen=True)
class Adapter:
    """A LoRA or an embedding file, or a run's folder with either or both, and its weight."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """`path` or `path=weight`."""
        path, equals, weight = text.rpartition("=")
        try:
            adapter = cls(Path(path), float(weight)) if equals else cls(Path(text))
            if not math.isfinite(adapter.weight):
                raise ValueError
        except ValueError:
            raise UserError(f"--adapter {text!r}: the weight after '=' is not a number") from None
        if not adapter.path.exists():
            raise UserError(f"--adapter {text!r}: {adapter.path} does not exist")
        return adapter

    def files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{self.path}: holds no adapter (.safetensors)")
        return files


def load_adapters(pipeline: Any, adapters: Iterable[Adapter | str | Path]) -> Any:
    """Load any mix of LoRAs and embeddings, in whichever format, into a diffusers pipeline.

    A LoRA's weight scales its update. An embedding's weight moves its vectors from the
    vocabulary's mean (0) to what was learnt (1).

    Returns:
        The pipeline itself.
    """
    pool_at_the_end(pipeline)
    weights: dict[str, float] = {}
    for given in adapters:
        adapter = given if isinstance(given, Adapter) else Adapter(Path(given))
        for file in adapter.files():
            content, name = read(file), f"adapter_{len(weights)}"
            with _naming(file):
                if isinstance(content, WordVectors):
                    _load_word(pipeline, content, adapter.weight, file)
                else:
                    _load_lora(pipeline, content, name)
                    weights[name] = adapter.weight
    if weights:
        pipeline.set_adapters(list(weights), list(weights.values()))
    return pipeline


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Say which file does not fit the base, whatever diffusers and peft make of it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"{file}: is not for this base ({reason(error)})") from error


def _load_lora(pipeline: Any, content: AdapterWeights, name: str) -> None:
    pipeline.load_lora_weights(to_diffusers(content), adapter_name=name)
    if not any(name in names for names in pipeline.get_list_adapters().values()):
        raise ValueError(f"it has none of the {', '.join(content.parts)} that the file changes")
    _widen_lengths(pipeline, content, name)


def _widen_lengths(pipeline: Any, content: AdapterWeights, adapter: str) -> None:
    """The lengths of a DoRA in float32: in the base's half precision each would err by a share of its whole weight."""
    for part, layer, update in content.updates():
        if update.magnitude is not None:
            model = getattr(pipeline, part)
            names = (layer, layer.removeprefix("text_model."))  # CLIP before transformers 5.6, and since
            module = next(found for name in names if (found := _submodule(model, name)) is not None)
            held = module.lora_magnitude_vector[adapter].weight
            held.data = update.magnitude.to(held.device, torch.float32).view_as(held)


def _submodule(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _load_word(pipeline: Any, content: WordVectors, weight: float, file: Path) -> None:
    """A word into the text encoders that there are vectors for."""
    for key, vectors in content.vectors.items():
        encoder, tokenizer = _encoder_for(pipeline, key, vectors.shape[-1], file)
        mean = encoder.get_input_embeddings().weight.detach().float().mean(0).cpu()
        add_word(encoder, tokenizer, content.word, mean + weight * (vectors.float() - mean))


def _encoder_for(pipeline: Any, key: str, width: int, file: Path) -> tuple[Any, Any]:
    """The text encoder and tokenizer that an embedding's key means."""
    widths = []
    for ending in ENCODERS[key]:
        encoder = getattr(pipeline, f"text_encoder{ending}", None)
        if encoder is not None:
            widths.append(encoder.get_input_embeddings().weight.shape[-1])
            if widths[-1] == width:
                return encoder, getattr(pipeline, f"tokenizer{ending}")
    has = f"have {widths[0]}" if widths else f"are not read by {key}"
    raise UserError(f"{file}: vectors of width {width}, but this base's words {has}")
