"""Adapters back into any diffusers pipeline, and pictures out of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import UserError
from finetune.quiet import quiet_loading

if TYPE_CHECKING:
    from PIL import Image


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


def use_ddim(pipeline: Any, *, zero_terminal_snr: bool = False) -> None:
    """Sample with DDIM (2010.02502) on the base's own noise schedule."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    settings: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    if zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)


def render(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    size: int,
    batch_size: int = 4,
) -> list[Image.Image]:
    """One picture for each prompt and seed. A picture depends on its own seed alone, not on its neighbours."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[chunk]]
        images += pipeline(
            prompt=list(prompts[chunk]),
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=size,
            width=size,
        ).images
    return images


def file_name(text: str) -> str:
    """A prompt as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "picture"


def generate_files(
    prompts: Sequence[str],
    adapters: Sequence[Adapter],
    *,
    base: str | None,
    revision: str | None,
    seed: int,
    steps: int,
    guidance: float,
    size: int | None,
    folder: Path,
) -> list[Path]:
    """Load a base with adapters, and write a PNG for each prompt; picture i has the seed `seed + i`."""
    headers = [read_header(file)[1] for adapter in adapters for file in adapter.files()]
    base = base or next((header["base"] for header in headers if "base" in header), None)
    if size is not None and size % 8:
        raise UserError(f"--size: {size} is not a multiple of 8. Try {size // 8 * 8 or 8}.")
    if base is None:
        raise UserError("--base: no adapter says which base it is for. Name one.")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    quiet_loading()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(base, revision=revision, dtype=dtype, use_safetensors=True)
    except Exception as error:  # a broken folder fails in as many ways as it has files
        raise UserError(f"--base: {base} cannot be loaded: {' '.join(str(error).split())}") from error
    use_ddim(pipeline, zero_terminal_snr=any(header.get("zero_terminal_snr") == "true" for header in headers))
    load_adapters(pipeline, adapters).to(device)
    pixels = size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    with torch.no_grad():
        images = render(
            pipeline, prompts, range(seed, seed + len(prompts)), steps=steps, guidance=guidance, size=pixels
        )
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed + index:04d}-{file_name(prompt)}.png" for index, prompt in enumerate(prompts)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths
