"""The `resize` command: fewer ranks, the best ones, and how much of the update they keep.

Shapes: m outputs and n inputs of a layer, r the rank of its update, s the rank that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetune.adapter import AdapterWeights, Update
from finetune.errors import UserError
from finetune.files import read_shapes
from finetune.formats import read, write
from finetune.formats.base import recognise
from finetune.lowrank import chosen_rank


@dataclass(frozen=True)
class Resized:
    """Adapter weights of lower rank, and what of the squared update they hold."""

    weights: AdapterWeights
    kept: float
    worst: float
    worst_layer: str

    def lines(self) -> list[str]:
        ranks = sorted({update.rank for *_, update in self.weights.updates()})
        return [
            f"rank {ranks[0]}{f' to {ranks[-1]}' if ranks[1:] else ''}",
            f"keeps {self.kept:.2%} of the squared update, and {self.worst:.2%} in {self.worst_layer}",
        ]


def truncate(update: Update, *, rank: int | None, energy: float | None) -> tuple[Update, float, float]:
    """The best update of a lower rank (Eckart-Young), the squares it keeps, and all of them.

    The singular values of the product are those of an r x r matrix once both factors
    are orthogonalised: the product itself is never made.
    """
    up, down = (factor.double() for factor in update.factors())
    if not (up.isfinite().all() and down.isfinite().all()):
        raise UserError("NaN or infinity")
    left, upper = torch.linalg.qr(up)  # (m, r), (r, r)
    right, lower = torch.linalg.qr(down.T)  # (n, r), (r, r)
    u, values, vh = torch.linalg.svd(upper @ lower.T)
    squares = values.square()
    rank = chosen_rank(squares, rank, energy)
    # Equal norms for both factors keep either within half precision's range.
    roots = values[:rank].sqrt()
    up, down = left @ u[:, :rank] * roots, roots[:, None] * (vh[:rank] @ right.T)
    smaller = replace(
        update,
        up=up.float().reshape(len(up), rank, *update.up.shape[2:]),
        down=down.float().reshape(rank, *update.down.shape[1:]),
        scale=1.0,
        kind="DoRA" if update.magnitude is not None else "LoRA",
    )
    return smaller, float(squares[:rank].sum()), float(squares.sum())


def check_asked(rank: int | None, energy: float | None) -> None:
    """Raises: UserError unless exactly one of both is given, and makes sense."""
    if (rank is None) == (energy is None):
        raise UserError("give one of --rank (the same for all layers) and --energy (a share, such as 0.95)")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise UserError("--rank is a whole number from 1 on, and --energy a share between 0 and 1")


def shrink(weights: AdapterWeights, *, rank: int | None, energy: float | None) -> Resized:
    """Every layer at the rank, or at the lowest rank that keeps a share of its squared update."""
    check_asked(rank, energy)
    parts: dict[str, dict[str, Update]] = {}
    kept = total = 0.0
    worst, worst_layer = 1.0, "every layer"
    for part, name, update in weights.updates():
        smaller, squares, all_squares = truncate(update, rank=rank, energy=energy)
        parts.setdefault(part, {})[name] = smaller
        kept, total = kept + squares, total + all_squares
        share = squares / all_squares if all_squares else 1.0
        if share < worst - 1e-9:
            worst, worst_layer = share, f"{part}.{name}"
    share = kept / total if total else 1.0
    header = {**weights.header, **rank_header(parts), "energy_kept": f"{share:.4f}"}
    return Resized(replace(weights, parts=parts, header=header), share, worst, worst_layer)


def rank_header(parts: Mapping[str, Mapping[str, Update]]) -> dict[str, str]:
    """As a run's export says it; every scale is 1, so alpha is the rank."""
    ranks = sorted({update.rank for layers in parts.values() for update in layers.values()})
    text = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
    return {"rank": text, "alpha": text}


def resize(
    file: Path, *, rank: int | None, energy: float | None, output: Path | None = None, overwrite: bool = False
) -> list[str]:
    """Write a smaller file in the same format; what it keeps, in lines."""
    content = read(file)
    if not isinstance(content, AdapterWeights):
        raise UserError(f"{file}: an embedding has no rank")
    name = recognise(read_shapes(file)[0])
    assert name is not None
    resized = shrink(content, rank=rank, energy=energy)
    output = output or file.with_name(f"{file.stem}-{'rank' if rank else 'energy'}-{rank or energy}.safetensors")
    write(resized.weights, output, name, dtype=content.dtype, overwrite=overwrite)
    sizes = " to ".join(f"{path.stat().st_size / 1000:,.1f}" for path in (file, output))
    return [f"{output}  ({sizes} kB)", *resized.lines()]
