"""Low-rank factors of a difference: the best there are, honestly reported, and put back exactly."""

from __future__ import annotations

from copy import deepcopy

import pytest
import tiny
import torch
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.lowrank import factor_difference, layers_named, restore

LAYERS = {
    "wide": lambda: nn.Linear(24, 10, bias=False),
    "tall": lambda: nn.Linear(10, 24, bias=False),
    "square": lambda: nn.Linear(12, 12, bias=False),
    "convolution": lambda: nn.Conv2d(5, 8, 3, bias=False),
    "tall convolution": lambda: nn.Conv2d(2, 40, 3, bias=False),
    "pointwise": lambda: nn.Conv2d(12, 7, 1, bias=False),
}


class Net(nn.Module):
    """A layer of each kind, beside what has no low-rank form."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(20, 12, bias=bias)
        self.norm = nn.LayerNorm(12, elementwise_affine=bias)
        self.conv = nn.Conv2d(4, 6, 3, bias=bias)


def changed(model: nn.Module, scale: float = 0.1) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model after its parameters moved, and its state before."""
    torch.manual_seed(0)
    base = deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model, base


def product(weights: dict[str, Tensor], layer: str, shape: torch.Size) -> Tensor:
    down, up = weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"]
    return (up.flatten(1) @ down.flatten(1)).view(shape)


def squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_factors_are_the_best_of_their_rank(kind: str, rank: int):
    model, base = changed(nn.ModuleDict({"layer": LAYERS[kind]()}))
    difference = model.state_dict()["layer.weight"] - base["layer.weight"]
    u, s, v = torch.linalg.svd(difference.flatten(1).double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank] @ v[:rank]).view(difference.shape)
    found = factor_difference(model, base, rank=rank, energy=None)
    torch.testing.assert_close(product(found.weights, "layer", difference.shape).double(), best, rtol=0, atol=1e-6)
    assert found.energy == pytest.approx(squares(s[:rank]) / squares(s), rel=1e-6)
    assert found.ranks == {"layer": rank}


@pytest.mark.parametrize("kind", ["wide", "tall", "convolution", "pointwise"])
def test_factors_have_the_shapes_and_precision_that_peft_writes(kind: str):
    model, base = changed(nn.ModuleDict({"layer": LAYERS[kind]()}))
    weights = factor_difference(model, base, rank=2, energy=None).weights
    out, *into = base["layer.weight"].shape
    assert weights["layer.lora_A.weight"].shape == (2, *into)
    assert weights["layer.lora_B.weight"].shape == (out, 2, *(1 for _ in into[1:]))
    assert {factor.dtype for factor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.9, 0.99, 0.999999, 1.0])
def test_a_share_of_the_energy_is_reached_with_the_smallest_rank(energy: float):
    model, base = changed(Net(bias=False))
    found = factor_difference(model, base, rank=None, energy=energy)
    for layer, rank in found.ranks.items():
        difference = model.state_dict()[f"{layer}.weight"] - base[f"{layer}.weight"]
        values = torch.linalg.svdvals(difference.flatten(1).double()).square()
        shares = values.cumsum(0) / values.sum()
        assert rank == len(shares) or shares[rank - 1] >= energy
        assert rank == 1 or shares[rank - 2] < energy
    assert found.energy >= energy - 1e-9


def test_what_has_no_low_rank_form_counts_as_lost():
    model, base = changed(Net())
    found = factor_difference(model, base, rank=99, energy=None)
    energies = {name: squares(value - base[name]) for name, value in model.state_dict().items()}
    kept = energies["linear.weight"] + energies["conv.weight"]
    assert found.energy == pytest.approx(kept / sum(energies.values()), rel=1e-6)
    assert found.energy < 0.99
    assert found.ranks == {"linear": 12, "conv": 6}


@pytest.mark.parametrize(("rank", "energy"), [(4, None), (None, 0.99)])
def test_a_layer_that_did_not_change_costs_next_to_nothing(rank: int | None, energy: float | None):
    model = Net()
    found = factor_difference(model, deepcopy(model.state_dict()), rank=rank, energy=energy)
    assert found.energy == 0
    assert all(torch.isfinite(factor).all() for factor in found.weights.values())
    assert all(not product(found.weights, layer, torch.Size([-1])).any() for layer in found.ranks)
    if rank is None:
        assert set(found.ranks.values()) <= {0, 1}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_factors_fit_into_half_precision(scale: float):
    model, base = changed(Net(bias=False), scale)
    found = factor_difference(model, base, rank=6, energy=None)
    for layer in found.ranks:
        difference = model.state_dict()[f"{layer}.weight"] - base[f"{layer}.weight"]
        halves = {name: factor.half().float() for name, factor in found.weights.items()}
        exact = product(found.weights, layer, difference.shape)
        assert squares(product(halves, layer, difference.shape) - exact) < 1e-5 * squares(exact)


@pytest.mark.parametrize("rank", [2, 99])
def test_restoring_gives_the_base_plus_the_update(rank: int):
    model, base = changed(Net())
    trained = deepcopy(model.state_dict())
    found = factor_difference(model, base, rank=rank, energy=None)
    before = deepcopy(base)
    restore(model, base, found.weights)
    for name, value in model.state_dict().items():
        assert torch.equal(base[name], before[name])
        layer = name.removesuffix(".weight")
        if layer not in found.ranks:
            assert torch.equal(value, base[name])
            continue
        torch.testing.assert_close(value, base[name] + product(found.weights, layer, value.shape))
        if rank == 99:
            torch.testing.assert_close(value, trained[name], rtol=0, atol=1e-6)


def test_a_base_in_half_precision_is_compared_in_full():
    model = Net(bias=False)
    base = {name: value.bfloat16() for name, value in model.state_dict().items()}
    for name, value in model.state_dict().items():
        value.copy_(base[name].float() + 1e-4 * torch.randn_like(value))
    assert factor_difference(model, base, rank=99, energy=None).energy == pytest.approx(1, abs=1e-6)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny.stable_diffusion().unet


def test_layers_are_found_by_the_end_of_their_name(unet: nn.Module):
    found = layers_named(unet, ("to_k", "to_out.0"))
    assert found and all(name.endswith((".to_k", ".to_out.0")) for name in found)
    assert found == [name for name in layers_named(unet, ()) if name in found]
    assert layers_named(unet, ("conv_in",)) == ["conv_in"]
    assert layers_named(unet, (found[0],)) == [found[0]]
    assert not any(isinstance(unet.get_submodule(name), nn.GroupNorm | nn.LayerNorm) for name in layers_named(unet, ()))


@pytest.mark.parametrize(
    ("target", "meant"),
    [("to_kk", "'to_k'"), ("conv_inn", "'conv_in'"), ("to_out", "'to_out.0'"), ("o_k", "'to_k'"), ("norm1", "")],
)
def test_a_target_that_is_no_layer_is_refused_with_what_was_meant(unet: nn.Module, target: str, meant: str):
    with pytest.raises(UserError, match=rf"method\.targets.*'{target}'.*{meant}"):
        layers_named(unet, ("to_k", target))


def test_every_target_that_is_no_layer_is_named(unet: nn.Module):
    with pytest.raises(UserError) as error:
        layers_named(unet, ("to_kk", "to_k", "conv_inn"))
    assert [("to_kk" in problem, "conv_inn" in problem) for problem in error.value.problems] == [
        *((True, False), (False, True))
    ]
