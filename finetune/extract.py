"""The `extract` command: what fine-tuning changed between two full checkpoints, as a small file.

Weights are read one at a time, so two checkpoints that do not fit into memory do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.adapter import AdapterWeights, Update, is_adapter
from finetune.architectures import ARCHITECTURES, from_updates
from finetune.errors import UserError, reason
from finetune.files import read_shapes
from finetune.formats import write
from finetune.inspection import checkpoint
from finetune.lowrank import factor, squares
from finetune.originals import clip_name
from finetune.resize import check_asked
from finetune.single_file import Piece, pieces

PARTS = {"unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}
UNKNOWN = "no full checkpoint of a model that is known. `finetune inspect` tells what it is."
# Tables are read by index; a LoRA of one is nothing that diffusers loads.
TABLES = ("token_embedding", "position_embedding", "shared", "embed_tokens", "relative_attention_bias")
# What some files have and others leave out: a count, the identity, and a table under its second name.
OPTIONAL = ("position_ids", "text_projection.weight", "encoder.embed_tokens.weight")


@dataclass
class Extracted:
    """Updates by part, and the squared differences that were there and that they keep."""

    parts: dict[str, dict[str, Update]] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)

    def share(self, part: str) -> float:
        return self.kept[part] / self.total[part] if self.total[part] else 1.0


@dataclass(frozen=True)
class Weights:
    """Those of one part of a checkpoint under diffusers' names, opened but not read."""

    where: Path
    places: dict[str, tuple[Any, Piece]]  # an open file, and what of it

    def __getitem__(self, name: str) -> Tensor:
        """Raises: UserError when it holds NaN or infinity."""
        file, piece = self.places[name]
        try:
            weight = piece.cut(file.get_tensor(piece.stored)).float()
        except Exception as error:  # of a kind or a shape that no weight has
            raise UserError(f"{self.where}: {name} is no weight of a model ({reason(error)})") from None
        if not bool(weight.isfinite().all()):
            raise UserError(f"{self.where}: {name} holds NaN or infinity")
        return weight


class Checkpoint:
    """All parts of a folder in diffusers' layout, or of a single file in its authors'."""

    def __init__(self, path: Path, opened: ExitStack):
        self.path = path
        self.opened = opened
        self.pipeline, self.architecture = _architecture_of_file(path) if path.is_file() else _pipeline_of_folder(path)

    def parts(self) -> dict[str, Weights]:
        if self.path.is_dir():
            return {part: self._part(self.path / part) for part in sorted(PARTS) if (self.path / part).is_dir()}
        file = self._open(self.path)
        found = pieces(read_shapes(self.path)[0], self.architecture)
        if not found.keys() & PARTS:
            raise UserError(f"{self.path}: {UNKNOWN}")
        return {
            part: Weights(self.path, {name: (file, piece) for name, piece in found[part].items()})
            for part in sorted(PARTS)
            if part in found
        }

    def _part(self, folder: Path) -> Weights:
        files = sorted(folder.glob("*.safetensors"))
        plain = [file for file in files if file.name.count(".") == 1] or files  # `….fp16.safetensors` are copies
        handles = [self._open(file) for file in plain]
        return Weights(folder, {clip_name(name): (file, Piece(name)) for file in handles for name in file.keys()})  # noqa: SIM118

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return self.opened.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: weights that are damaged or cut short ({reason(error)})") from None


def _pipeline_of_folder(folder: Path) -> tuple[str, str | None]:
    """The class of diffusers, and the architecture where only one has this class."""
    try:
        pipeline = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{folder}: no folder in diffusers' layout (it has no model_index.json)") from None
    fitting = [name for name, known in ARCHITECTURES.items() if known.pipeline == pipeline]
    return pipeline, fitting[0] if len(fitting) == 1 else None


def _architecture_of_file(file: Path) -> tuple[str, str | None]:
    """The class of diffusers, and the architecture, by its tensors' names."""
    shapes, header = read_shapes(file)
    architecture = None if is_adapter(shapes) else checkpoint(shapes, header)[1]
    if architecture is None:
        raise UserError(f"{file}: {UNKNOWN}")
    return ARCHITECTURES[architecture].pipeline, architecture


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
    found = Extracted()
    with ExitStack() as opened:
        after, before = Checkpoint(tuned, opened), Checkpoint(base, opened)
        _check_same_model(after, before)
        held = before.parts()
        for part, weights in after.parts().items():
            if part in held:
                _extract_part(part, weights, held[part], found, rank, energy)
    if not found.parts:
        raise UserError(f"{tuned} and {base} have no part in common that a LoRA can be for")
    if not any(found.parts.values()):
        raise UserError(f"{tuned} and {base} do not differ in any layer that a LoRA can hold")
    parts = {part: layers for part, layers in found.parts.items() if layers}
    shares = {f"energy_kept.{part}": f"{found.share(part):.4f}" for part in parts}
    header = {"method": "extract", "base": str(base), "tuned": str(tuned), **shares}
    architecture = after.architecture or before.architecture or from_updates(parts)
    weights = AdapterWeights(parts, architecture, header)
    write(weights, output, to, dtype=torch.float16, overwrite=overwrite)
    lines = [f"{output}  ({output.stat().st_size / 1000:,.1f} kB)"]
    for part, total in found.total.items():
        if total:
            lines.append(f"{part}: {len(found.parts[part])} layers keep {found.share(part):.2%} of its change")
    return lines


def _check_same_model(tuned: Checkpoint, base: Checkpoint) -> None:
    sides = [(side.pipeline, side.architecture) for side in (tuned, base)]
    unknown = None in (tuned.architecture, base.architecture)  # one class is for several
    if sides[0] == sides[1] or (unknown and tuned.pipeline == base.pipeline):
        return
    names = [ARCHITECTURES[architecture].title if architecture else pipeline for pipeline, architecture in sides]
    raise UserError(f"{tuned.path} is a {names[0]} and {base.path} a {names[1]}: they are not of the same model")


def _extract_part(
    part: str, after: Weights, before: Weights, found: Extracted, rank: int | None, energy: float | None
) -> None:
    layers = found.parts.setdefault(part, {})
    found.kept[part] = found.total[part] = 0.0
    for name, difference in _differences(part, after, before):
        found.total[part] += squares(difference)
        layer = name.removesuffix(".weight")
        if layer == name or difference.ndim not in (2, 4) or layer.endswith(TABLES):
            continue
        down, up, kept = factor(difference, rank, energy)
        layers[layer] = Update(down, up)
        found.kept[part] += kept


def _differences(part: str, after: Weights, before: Weights) -> Iterator[tuple[str, Tensor]]:
    """(name, tuned - base) of every weight that differs, float32."""
    alone = sorted(name for name in after.places.keys() ^ before.places.keys() if not name.endswith(OPTIONAL))
    if alone or not after.places:
        example = f", such as {alone[0]}" if alone else ""
        raise UserError(
            f"{after.where} and {before.where} have not the same weights of the {part}{example}: "
            "they are not of the same model"
        )
    for name in sorted(after.places.keys() & before.places.keys()):
        tuned, base = after[name], before[name]
        if name.removesuffix(".weight").endswith(TABLES):  # new words come after the old ones
            tuned = tuned[: len(base)]
        if tuned.shape != base.shape:
            raise UserError(
                f"{after.where}: {name} is of shape {tuple(tuned.shape)}, and the base's is {tuple(base.shape)}: "
                "they are not of the same model"
            )
        difference = tuned - base
        if difference.any():
            yield name, difference
