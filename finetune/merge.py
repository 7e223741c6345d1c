"""The `merge` command: adapters into one another, or into a base."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch

from finetune.adapter import AdapterWeights, Update
from finetune.errors import UserError
from finetune.families.base import Source
from finetune.files import whole
from finetune.formats import read, write
from finetune.load import Adapter, load_adapters
from finetune.resize import rank_header, shrink

# What files that are merged may have in common; steps, ranks and recipes are of each.
SHARED = ("base", "base_fingerprint", "finetune_version", "zero_terminal_snr")


def merge(
    adapters: Sequence[Adapter],
    output: Path,
    *,
    rank: int | None = None,
    to: str = "diffusers",
    overwrite: bool = False,
) -> list[str]:
    """One file that does what the adapters do together, exactly, or at `rank`; what it keeps, in lines."""
    given = [(file, adapter.weight) for adapter in adapters for file in adapter.files()]
    weights = [(_read_lora(file), weight) for file, weight in given]
    merged = concatenate(weights)
    described = ", ".join(f"{file.name}={weight:g}" for file, weight in given)
    merged = replace(merged, header={**merged.header, "merged_from": described, "modelspec.merged_from": described})
    dtype = reduce(torch.promote_types, [content.dtype for content, _ in weights])
    lines = ["exact: every layer's rank is the sum of the adapters' ranks"]
    if rank is not None:
        resized = shrink(merged, rank=rank, energy=None)
        merged, lines = resized.weights, resized.lines()
    write(merged, output, to, dtype=dtype, overwrite=overwrite)
    return [f"{output}  ({output.stat().st_size / 1000:,.1f} kB)", *lines]


def _read_lora(file: Path) -> AdapterWeights:
    content = read(file)
    if not isinstance(content, AdapterWeights):
        raise UserError(f"{file}: an embedding is not merged into a LoRA. Load both, or merge them into a --base.")
    if any(update.magnitude is not None for *_, update in content.updates()):
        raise UserError(f"{file}: a DoRA depends on the base's weights. Merge it into one with --base.")
    return content


def concatenate(given: Sequence[tuple[AdapterWeights, float]]) -> AdapterWeights:
    """The weighted sum: `[u1 u2] [d1; d2] = u1 d1 + u2 d2`.

    Raises:
        UserError: they are for different models.
    """
    architectures = {weights.architecture for weights, _ in given if weights.architecture}
    if len(architectures) > 1:
        raise UserError(f"adapters of different models cannot be merged: {', '.join(sorted(architectures))}")
    parts: dict[str, dict[str, list[Update]]] = {}
    for weights, weight in given:
        for part, name, update in weights.updates():
            if not math.isfinite(update.scale * weight):
                raise UserError(f"{part}.{name}: a weight of {weight:g} makes it infinite. Give a smaller one.")
            folded = replace(update, scale=update.scale * weight).folded()
            parts.setdefault(part, {}).setdefault(name, []).append(folded)
    merged = {
        part: {name: _concatenate(f"{part}.{name}", updates) for name, updates in layers.items()}
        for part, layers in parts.items()
    }
    header = _common_header(given) | rank_header(merged)
    return AdapterWeights(merged, architectures.pop() if architectures else None, header)


def _concatenate(name: str, updates: Sequence[Update]) -> Update:
    shapes = {(len(update.up), tuple(update.down.shape[1:])) for update in updates}
    if len(shapes) > 1:
        raise UserError(f"{name}: layers of different shapes cannot be merged: {sorted(map(str, shapes))}")
    down = torch.cat([update.down.float() for update in updates])
    up = torch.cat([update.up.float() for update in updates], dim=1)
    return Update(down, up)


def _common_header(given: Sequence[tuple[AdapterWeights, float]]) -> dict[str, str]:
    """What all agree on, and the words of all."""
    headers = [weights.header for weights, _ in given]
    common = {key: value for key, value in headers[0].items() if all(header.get(key) == value for header in headers)}
    common = {key: value for key, value in common.items() if key in SHARED}
    words = [header["trigger"] for header in headers if "trigger" in header]
    return {**common, "method": "merge"} | ({"trigger": ", ".join(dict.fromkeys(words))} if words else {})


def merge_into_base(
    adapters: Sequence[Adapter], base: str, output: Path, *, config: str | None = None, overwrite: bool = False
) -> list[str]:
    """A full pipeline with the adapters in its weights, as a folder in diffusers' layout.

    Args:
        base: a folder, model of the Hub or file; `config` is where the configs of a base in a single file are.

    Raises:
        UserError: the base cannot be loaded, or an adapter is not for it.
    """
    from finetune.generate import load_base

    if output.suffix:
        raise UserError(f"--output {output}: with --base it is a folder")
    with whole(output, overwrite=overwrite) as unfinished:
        pipeline = load_base(Source(base, config=config), every_part=True)
        dtype = stored_dtype(Path(base))
        load_adapters(pipeline, adapters)
        if pipeline.get_list_adapters():
            pipeline.fuse_lora(components=list(pipeline.get_list_adapters()))
            pipeline.unload_lora_weights()
        pipeline.to(dtype).save_pretrained(unfinished, safe_serialization=True)
    return [str(output)]


def stored_dtype(base: Path) -> torch.dtype:
    """The precision that most of a base's denoiser is kept in; float32 where it is not local."""
    from safetensors import safe_open

    folders = ("unet/*.safetensors", "transformer/*.safetensors")
    counted: Counter[str] = Counter()
    for file in [base] if base.is_file() else [file for folder in folders for file in base.glob(folder)]:
        with safe_open(file, framework="pt") as weights:
            counted.update(weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118
    names = {"F16": torch.float16, "BF16": torch.bfloat16}
    return names.get(counted.most_common(1)[0][0], torch.float32) if counted else torch.float32
