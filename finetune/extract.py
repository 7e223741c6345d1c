"""The `extract` command: what fine-tuning changed between two full checkpoints, as a small file.

Weights are read one at a time, so two checkpoints that do not fit into memory do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.adapter import AdapterWeights, Update
from finetune.architectures import ARCHITECTURES, from_updates
from finetune.errors import UserError
from finetune.formats import write
from finetune.lowrank import factor, squares
from finetune.resize import check_asked

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
# Tables are read by index; a LoRA of one is nothing that diffusers loads.
TABLES = ("token_embedding", "position_embedding", "shared", "embed_tokens", "relative_attention_bias")


@dataclass
class Extracted:
    """Updates by part, and the squared differences that were there and that they keep."""

    parts: dict[str, dict[str, Update]] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)

    def share(self, part: str) -> float:
        return self.kept[part] / self.total[part] if self.total[part] else 1.0


class Checkpoint:
    """The weights of one part of a folder in diffusers' layout, opened but not read."""

    def __init__(self, folder: Path, opened: ExitStack):
        from safetensors import SafetensorError, safe_open

        files = sorted(folder.glob("*.safetensors"))
        plain = [file for file in files if file.name.count(".") == 1] or files  # `….fp16.safetensors` are copies
        try:
            handles = [opened.enter_context(safe_open(file, framework="pt")) for file in plain]
        except SafetensorError as error:
            raise UserError(f"{folder}: weights that are damaged or cut short ({error})") from None
        self.folder = folder
        self.places: dict[str, Any] = {_canonical(name): (handle, name) for handle in handles for name in handle.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        handle, stored = self.places[name]
        return handle.get_tensor(stored)


def _canonical(name: str) -> str:
    """CLIP's names of before transformers 5.6, as adapters have them."""
    return f"text_model.{name}" if name.startswith(("encoder.layers.", "embeddings.", "final_layer_norm.")) else name


def extract(
    tuned: Path,
    base: Path,
    output: Path,
    *,
    rank: int | None,
    energy: float | None,
    to: str = "diffusers",
    overwrite: bool = False,
) -> list[str]:
    """Write the difference of two checkpoints; what it keeps, in lines.

    Raises:
        UserError: they are no two checkpoints of one model, or do not differ.
    """
    check_asked(rank, energy)
    architecture = _same_pipeline(tuned, base)
    found = Extracted()
    for part in PARTS:
        if (tuned / part).is_dir() and (base / part).is_dir():
            _extract_part(part, tuned / part, base / part, found, rank, energy)
    if not any(found.parts.values()):
        raise UserError(f"{tuned} and {base} do not differ in any layer that a LoRA can hold")
    parts = {part: layers for part, layers in found.parts.items() if layers}
    shares = {f"energy_kept.{part}": f"{found.share(part):.4f}" for part in parts}
    header = {"method": "extract", "base": str(base), "tuned": str(tuned), **shares}
    weights = AdapterWeights(parts, architecture or from_updates(parts), header)
    write(weights, output, to, dtype=torch.float16, overwrite=overwrite)
    lines = [f"{output}  ({output.stat().st_size / 1000:,.1f} kB)"]
    for part, total in found.total.items():
        if total:
            lines.append(f"{part}: {len(found.parts[part])} layers keep {found.share(part):.2%} of its change")
    return lines


def _same_pipeline(tuned: Path, base: Path) -> str | None:
    """The architecture of two folders of the same pipeline."""
    classes = []
    for folder in (tuned, base):
        if folder.is_file():
            raise UserError(
                f"{folder}: a single file. Write it as a folder first: "
                f'`StableDiffusionXLPipeline.from_single_file("{folder.name}").save_pretrained("{folder.stem}")`, '
                "with the pipeline that it is for."
            )
        try:
            classes.append(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder}: no folder in diffusers' layout (it has no model_index.json)") from None
    if classes[0] != classes[1]:
        raise UserError(f"{tuned} is a {classes[0]} and {base} a {classes[1]}: they are not of the same model")
    fitting = [name for name, known in ARCHITECTURES.items() if known.pipeline == classes[0]]
    return fitting[0] if len(fitting) == 1 else None


def _extract_part(part: str, tuned: Path, base: Path, found: Extracted, rank: int | None, energy: float | None) -> None:
    with ExitStack() as opened:
        after, before = Checkpoint(tuned, opened), Checkpoint(base, opened)
        layers = found.parts.setdefault(part, {})
        found.kept[part] = found.total[part] = 0.0
        for name, difference in _differences(after, before):
            found.total[part] += squares(difference)
            layer = name.removesuffix(".weight")
            if layer == name or difference.ndim not in (2, 4) or layer.endswith(TABLES):
                continue
            down, up, kept = factor(difference, rank, energy)
            layers[layer] = Update(down, up)
            found.kept[part] += kept


def _differences(after: Checkpoint, before: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """(name, tuned - base) of every weight that differs, float32."""
    _check_names(after.places, before.places, after.folder, before.folder)
    for name in sorted(after.places.keys() & before.places.keys()):
        tuned, base = after[name], before[name]
        if name.removesuffix(".weight").endswith(TABLES):  # new words come after the old ones
            tuned = tuned[: len(base)]
        if tuned.shape != base.shape:
            raise UserError(
                f"{after.folder}: {name} is of shape {tuple(tuned.shape)}, and the base's is {tuple(base.shape)}: "
                "they are not of the same model"
            )
        difference = tuned.float() - base.float()
        if not bool(difference.isfinite().all()):
            raise UserError(f"{name}: NaN or infinity in {after.folder} or {before.folder}")
        if difference.any():
            yield name, difference


def _check_names(after: Mapping[str, Any], before: Mapping[str, Any], tuned: Path, base: Path) -> None:
    buffers = ("position_ids",)
    alone = sorted(name for name in after.keys() ^ before.keys() if not name.endswith(buffers))
    if alone or not after:
        example = f", such as {alone[0]}" if alone else ""
        raise UserError(f"{tuned} and {base} have not the same weights{example}: they are not of the same model")
