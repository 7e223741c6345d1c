"""Adapters back into any diffusers pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError


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


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Tensor names and metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None


def load_adapters(pipeline: Any, adapters: Iterable[Adapter | str | Path]) -> Any:
    """Load any mix of LoRAs and embeddings into a diffusers pipeline.

    A LoRA's weight scales its update. An embedding's weight moves its vectors from the
    vocabulary's mean (0) to what was learnt (1).

    Returns:
        The pipeline itself.
    """
    weights: dict[str, float] = {}
    for given in adapters:
        adapter = given if isinstance(given, Adapter) else Adapter(Path(given))
        for file in adapter.files():
            names, _ = read_header(file)
            if any("lora" in name for name in names):
                name = f"adapter_{len(weights)}"
                pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
                weights[name] = adapter.weight
            else:
                _load_words(pipeline, file, adapter.weight)
    if weights:
        pipeline.set_adapters(list(weights), list(weights.values()))
    return pipeline


def _load_words(pipeline: Any, file: Path, weight: float) -> None:
    from safetensors.torch import load_file

    state = load_file(file)
    if len(state) != 1:
        raise UserError(f"{file}: neither a LoRA nor the embedding of one word")
    ((word, vectors),) = state.items()
    table = pipeline.text_encoder.get_input_embeddings().weight
    if vectors.shape[-1] != table.shape[-1]:
        raise UserError(f"{file}: vectors of width {vectors.shape[-1]}, but this base's words have {table.shape[-1]}")
    mean = table.detach().float().mean(0).cpu()
    pipeline.load_textual_inversion({word: mean + weight * (vectors.float() - mean)})
