"""Low-rank updates: the layers that take one, and those factored out of a weight difference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.errors import UserError, did_you_mean

# Weight name -> factors, in peft's layout: `<module>.lora_A.weight`, `<module>.lora_B.weight` and, of a DoRA,
# `<module>.lora_magnitude_vector.weight`.
LowRank = dict[str, Tensor]


def layers_named(model: nn.Module, suffixes: Sequence[str]) -> list[str]:
    """Full names of the linear and convolution layers that end with one of `suffixes`; all of them without any.

    Raises:
        UserError: a suffix matches nothing.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not suffixes:
        return layers
    matches = {suffix: [name for name in layers if _ends_with(name, suffix)] for suffix in suffixes}
    lonely = [suffix for suffix, names in matches.items() if not names]
    if lonely:
        known = {found[0] for name in layers if (found := re.search(r"[^.]+(\.\d+)?$", name))}
        raise UserError(f"method.targets: no layer is named {name!r}. {did_you_mean(name, known)}" for name in lonely)
    return [name for name in layers if any(name in names for names in matches.values())]


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


@dataclass(frozen=True)
class Factored:
    """A weight difference as low-rank factors, and how much of it they hold."""

    weights: LowRank
    energy: float  # kept share of the squared difference, over all parameters
    ranks: dict[str, int]


def factor_difference(
    model: nn.Module, base: Mapping[str, Tensor], *, rank: int | None, energy: float | None
) -> Factored:
    """The best low-rank approximation of `model - base`, layer by layer (Eckart-Young).

    Exactly one of `rank` (the same for all) and `energy` (the share of each layer's
    squared difference that must be kept) is given. Norms and biases have no low-rank
    form; their share counts as lost.
    """
    weights: LowRank = {}
    ranks: dict[str, int] = {}
    total = sum(squares(value - base[name].to(value)) for name, value in model.state_dict().items())
    kept = 0.0
    for name in layers_named(model, ()):
        weight = _weight(model.get_submodule(name)).detach()
        down, up, share = factor(weight - base[f"{name}.weight"].to(weight), rank, energy)
        kept += share
        ranks[name] = len(down)
        weights[f"{name}.lora_A.weight"] = down
        weights[f"{name}.lora_B.weight"] = up
    return Factored(weights, kept / total if total else 0.0, ranks)


def restore(model: nn.Module, base: Mapping[str, Tensor], weights: LowRank) -> None:
    """Set the model to its base plus a low-rank update."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(base[name])
        for name in layers_named(model, ()):
            down, up = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            weight = _weight(model.get_submodule(name))
            weight += (up.flatten(1) @ down.flatten(1)).view_as(weight)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def squares(difference: Tensor) -> float:
    return float(difference.double().square().sum())


def chosen_rank(energies: Tensor, rank: int | None, energy: float | None) -> int:
    """The rank that is asked for, or the lowest that keeps a share: energies (r,) are squares, the largest first."""
    if rank is None:
        assert energy is not None
        shares = energies.cumsum(0) / energies.sum().clamp(min=torch.finfo(torch.float64).tiny)
        rank = int((shares < energy).sum()) + 1 if energies.any() else 1
    return min(rank, len(energies))


def factor(difference: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """A (r, in, ...) and B (out, r, ...) of a layer's difference (out, in, ...), and the squares they keep.

    Singular vectors come from the smaller Gram matrix in float64: as exact as
    float32 weights need, and many times faster than a full SVD.
    """
    flat = difference.flatten(1).double()
    wide = flat if len(flat) <= flat.shape[1] else flat.T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rank = chosen_rank(values, rank, energy)
    left = vectors[:, :rank]
    right = left.T @ wide
    # Equal norms for both factors keep either within half precision's range.
    balance = right.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    left, right = left * balance, right / balance[:, None]
    up, down = (left, right) if wide is flat else (right.T, left.T)
    shape = difference.shape
    ones = [1] * (difference.ndim - 2)
    return (
        down.reshape(rank, *shape[1:]).float(),
        up.reshape(shape[0], rank, *ones).float(),
        float(values[:rank].sum()),
    )
