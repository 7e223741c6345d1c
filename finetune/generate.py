"""The `generate` command: a base, any mix of adapters, and a picture file for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError
from finetune.load import Adapter, load_adapters, read_header
from finetune.quiet import quiet_loading
from finetune.render import file_name, render, use_ddim


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
