"""What is done in its own way on a GPU gives what torch gives. Without a GPU there is nothing to test."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

if not torch.cuda.is_available():
    pytest.skip("a GPU's kernels need a GPU", allow_module_level=True)

from finetune.gpu.geglu import geglu
from finetune.gpu.group_norm import group_norm
from finetune.gpu.unet import SideBySideNorm, SideBySideResnet, SideBySideTransformer, side_by_side

PICTURES = [(2, 30, 5, 7, 3), (1, 320, 64, 64, 32), (2, 240, 16, 16, 3), (2, 1280, 8, 8, 32), (3, 8, 1, 1, 2)]


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5e-6), (torch.bfloat16, 6e-3), (torch.float16, 8e-4)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", PICTURES, ids=str)
def test_group_normalisation_and_its_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], silu: bool, dtype: torch.dtype, most: float
):
    *size, groups = shape
    layer = torch.nn.GroupNorm(groups, size[1], device="cuda")
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = (torch.randn(size, device="cuda") * 2 + 10).to(dtype).requires_grad_()
    gradient = torch.randn(size, device="cuda").to(dtype)
    y = group_norm(x, layer, silu=silu)
    found = torch.autograd.grad(y, (x, layer.weight, layer.bias), gradient)
    exact = [part.detach().double().requires_grad_() for part in (x, layer.weight, layer.bias)]
    z = functional.group_norm(exact[0], groups, *exact[1:], layer.eps)
    z = functional.silu(z) if silu else z
    wanted = torch.autograd.grad(z, exact, gradient.double())
    assert y.dtype == dtype
    assert away(y, z) < most
    if size[2] * size[3] * size[1] // groups > 4:  # of so few values nearly nothing is left to move
        assert max(away(*pair) for pair in zip(found, wanted, strict=True)) < 4 * most


def test_a_gated_gelu_and_its_gradient_are_those_of_the_formula():
    joined = torch.randn(3, 50, 2 * 300, device="cuda", requires_grad=True)
    gradient = torch.randn(3, 50, 300, device="cuda")
    value, gate = joined.double().chunk(2, -1)
    wanted = value * functional.gelu(gate)
    found = geglu(joined)
    assert away(found, wanted) < 1e-6
    (slope,) = torch.autograd.grad(found, joined, gradient)
    assert away(slope, torch.autograd.grad(wanted, joined, gradient.double())[0]) < 1e-6


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_unet_with_channels_side_by_side_predicts_and_learns_the_same(family: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    usual: Any = next(iter(tiny.BASES[family].values()))().unet.cuda()
    moved = copy.deepcopy(usual)
    side_by_side(moved)
    kinds = {type(part) for part in moved.modules()}
    assert {SideBySideNorm, SideBySideResnet, SideBySideTransformer} <= kinds
    width = usual.config.cross_attention_dim
    inputs = [torch.randn(2, 4, 16, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, width)]
    inputs = [part.cuda() for part in inputs]
    pooled = torch.randn(2, (usual.config.projection_class_embeddings_input_dim or 48) - 48, device="cuda")
    added = {"time_ids": torch.randn(2, 6, device="cuda"), "text_embeds": pooled}
    gradients = []
    for unet in (usual, moved):
        loss = unet(*inputs, added_cond_kwargs=added).sample.square().mean()
        gradients.append([loss, *torch.autograd.grad(loss, list(unet.parameters()), allow_unused=True)])
    for found, wanted in zip(gradients[1], gradients[0], strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
