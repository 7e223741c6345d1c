"""What is done in its own way on a GPU gives what torch gives: there, or in Triton's interpreter (`make kernels`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lessons
import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional

from finetune import run
from finetune.exact import in_float32
from finetune.families.flux import Flux
from finetune.float8 import Float8Linear
from finetune.gpu import INTERPRETED, make_ready

if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("a GPU's kernels need a GPU, or Triton's interpreter: make kernels", allow_module_level=True)

from finetune.gpu.flux import LeanDoubleBlock, LeanSingleBlock, lean
from finetune.gpu.geglu import geglu
from finetune.gpu.group_norm import group_norm
from finetune.gpu.layer_norm import add_and_normalise
from finetune.gpu.residual import add
from finetune.gpu.unet import SideBySideBlock, SideBySideNorm, SideBySideResnet, SideBySideTransformer, side_by_side
from finetune.gpu.unpack import unpack_float8
from finetune.nf4 import Linear4bit

DEVICE = "cpu" if INTERPRETED else "cuda"
SIDES = (24, 20) if INTERPRETED else (64, 64)  # enough for several programs to share a picture
PICTURES = [(2, 30, 5, 7, 3), (1, 320, *SIDES, 32), (2, 240, 16, 16, 3), (2, 640, 8, 8, 32), (3, 8, 1, 1, 2)]


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5e-6), (torch.bfloat16, 6e-3), (torch.float16, 8e-4)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("shape", PICTURES, ids=str)
def test_group_normalisation_and_its_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], shifted: bool, silu: bool, dtype: torch.dtype, most: float
):
    *size, groups = shape
    layer = torch.nn.GroupNorm(groups, size[1], device=DEVICE)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = (torch.randn(size, device=DEVICE) * 2 + 10).to(dtype).requires_grad_()
    gradient = torch.randn(size, device=DEVICE).to(dtype)
    shift = torch.randn(size[:2], device=DEVICE).to(dtype) if shifted else None
    y = group_norm(x, layer, silu=silu, shift=shift)
    found = torch.autograd.grad(y, (x, layer.weight, layer.bias), gradient)
    exact = [part.detach().double().requires_grad_() for part in (x, layer.weight, layer.bias)]
    moved = exact[0] if shift is None else exact[0] + shift.double()[:, :, None, None]
    z = functional.group_norm(moved, groups, *exact[1:], layer.eps)
    z = functional.silu(z) if silu else z
    wanted = torch.autograd.grad(z, exact, gradient.double())
    assert y.dtype == dtype
    assert away(y, z) < most
    if size[2] * size[3] * size[1] // groups > 4:  # of so few values nearly nothing is left to move
        assert max(away(*pair) for pair in zip(found, wanted, strict=True)) < 4 * most


def test_a_gated_gelu_and_its_gradient_are_those_of_the_formula():
    joined = torch.randn(3, 50, 2 * 300, device=DEVICE, requires_grad=True)
    gradient = torch.randn(3, 50, 300, device=DEVICE)
    value, gate = joined.double().chunk(2, -1)
    wanted = value * functional.gelu(gate)
    found = geglu(joined)
    assert away(found, wanted) < 1e-6
    (slope,) = torch.autograd.grad(found, joined, gradient)
    assert away(slope, torch.autograd.grad(wanted, joined, gradient.double())[0]) < 1e-6


@pytest.mark.parametrize("gated", [None, "gated"])
@pytest.mark.parametrize("of", ["all", "each picture"])
@pytest.mark.parametrize("shape", [(2, 7, 320), (1, 300, 96), (2, 3, 5000)], ids=str)
def test_a_sum_and_its_layer_normalisation_are_those_of_the_formula(
    shape: tuple[int, int, int], of: str, gated: str | None
):
    batch, _, width = shape
    x, added, *gradients = (torch.randn(shape, device=DEVICE) for _ in range(4))
    gate, weight, bias = torch.randn(batch, 3 * width, device=DEVICE).chunk(3, dim=1)
    weight, bias = (weight, bias) if of == "each picture" else (weight[0], bias[0])
    results = []
    for exact in (False, True):
        given = [part.double() if exact else part for part in (x, added, weight, bias, gate)]
        one, other = given[0].requires_grad_(), given[1].requires_grad_()
        with torch.autocast(DEVICE, enabled=False):
            if exact:
                factor, shift = (part[:, None] if part.dim() == 2 else part for part in given[2:4])
                total = one + (other * given[4][:, None] if gated else other)
                y = functional.layer_norm(total, (width,), eps=1e-5) * factor + shift
            else:
                total, y = add_and_normalise(
                    one, given[2], given[3], 1e-5, added=other, gate=given[4] if gated else None
                )
        grads = torch.autograd.grad([total, y], [one, other], [part.to(y.dtype) for part in gradients])
        results.append([total.detach(), y.detach(), *grads])
    assert max(away(found, wanted) for found, wanted in zip(*results, strict=True)) < 2e-6


def test_the_sum_of_two_pictures_and_a_bias_has_the_gradient_of_a_sum():
    a, b = (torch.randn(2, 6, 5, 3, device=DEVICE, requires_grad=True) for _ in range(2))
    bias = torch.randn(6, device=DEVICE)
    found = add(a, b, bias)
    torch.testing.assert_close(found, a + b + bias[:, None, None])
    gradient = torch.randn_like(found)
    assert all(torch.equal(each, gradient) for each in torch.autograd.grad(found, (a, b), gradient))


@pytest.mark.parametrize("trained", ["inputs", "weights"])
@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_unet_with_channels_side_by_side_predicts_and_learns_the_same(
    family: str, trained: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    usual: Any = next(iter(tiny.BASES[family].values()))().unet.to(DEVICE).requires_grad_(trained == "weights")
    moved = copy.deepcopy(usual)
    side_by_side(moved)
    kinds = {type(part) for part in moved.modules()}
    assert {SideBySideNorm, SideBySideResnet, SideBySideTransformer, SideBySideBlock} <= kinds
    width = usual.config.cross_attention_dim
    inputs = [torch.randn(2, 4, 16, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, width)]
    inputs = [part.to(DEVICE).requires_grad_(trained == "inputs") for part in inputs]
    pooled = torch.randn(2, (usual.config.projection_class_embeddings_input_dim or 48) - 48, device=DEVICE)
    added = {"time_ids": torch.randn(2, 6, device=DEVICE), "text_embeds": pooled}
    compare(usual, moved, inputs, {"added_cond_kwargs": added})


@pytest.mark.parametrize(
    ("family", "method", "to"),
    [
        ("stable_diffusion", "textual_inversion", None),
        ("stable_diffusion_xl", "lora", None),
        ("flux", "lora", None),
        ("flux", "lora", "nf4"),
        ("flux", "lora", "fp8"),
    ],
)
def test_a_run_on_a_base_in_half_precision_or_less_learns_the_same_and_passes_its_own_check(
    family: str, method: str, to: str | None, base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(Flux.prompt_lengths, "text_encoder_2", 8)  # an interpreter takes its time for each token
    losses = []
    for readied in (False, True):
        way = {"rank": 4} if method == "lora" else {"init": "thing"}
        settings: dict[str, Any] = {"train": {"precision": "bf16", "capture": False, "steps": 2}}
        settings |= {"validation": {"prompts": []}, "base": {"quantize": to}}
        at_work = run.prepare(lessons.recipe(base_folder(family), tmp_path / str(readied), method, way, **settings))
        if readied:
            make_ready(at_work.family.denoiser)
        at_work.loop()
        losses.append([line["loss"] for line in lessons.lines(at_work.folder) if "loss" in line])
        assert at_work.finish().verdict.passed
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


SHAPES = [(48, 64), (3, 640), (80, 1280), (17, 192), (1, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [Float8Linear, Linear4bit], ids=["fp8", "nf4"])
def test_packed_weights_are_the_numbers_that_torch_and_bitsandbytes_make_of_them(
    kind: Any, shape: tuple[int, int], dtype: torch.dtype
):
    torch.manual_seed(0)
    plain = torch.nn.Linear(shape[1], shape[0], dtype=dtype)
    plain.weight.data[0] *= 1e-3
    layer = kind(plain, dtype).to(DEVICE)
    with in_float32([]):  # where no kernel runs
        wanted = layer.unpacked(dtype)
    into = torch.full((3 * shape[0], shape[1]), 7, dtype=dtype, device=DEVICE)
    for found in (layer.unpacked(dtype), layer.unpacked(dtype, out=into[shape[0] : 2 * shape[0]])):
        assert found.dtype == dtype and found.shape == shape
        # Scales are multiplied and added in one, which rounds once less.
        torch.testing.assert_close(found, wanted, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=1e-9)
    assert (into[: shape[0]] == 7).all() and (into[2 * shape[0] :] == 7).all()


def test_every_number_of_8_bits_is_unpacked_as_torch_unpacks_it():
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(2, 128)
    wanted = numbers.view(torch.float8_e4m3fn).float()
    found = unpack_float8(numbers, torch.ones(2, 1, device=DEVICE), torch.empty_like(wanted))
    known = wanted.isfinite()  # all but the two that are none
    assert known.sum() == 254 and torch.equal(found[known], wanted[known])


@pytest.mark.parametrize("trained", ["inputs", "weights"])
def test_a_lean_flux_predicts_and_learns_the_same(trained: str):
    torch.manual_seed(0)
    usual = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    ).to(DEVICE)  # fmt: skip
    moved = copy.deepcopy(usual.requires_grad_(trained == "weights"))
    lean(moved)
    assert {LeanDoubleBlock, LeanSingleBlock} <= {type(part) for part in moved.modules()}
    inputs = [
        part.to(DEVICE).requires_grad_(trained == "inputs") for part in (torch.randn(2, 8, 16), torch.randn(2, 5, 64))
    ]
    others = {
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.3, 0.7]), "guidance": torch.ones(2),
        "img_ids": torch.randn(8, 3).round(), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    compare(usual, moved, inputs, {name: part.to(DEVICE) for name, part in others.items()})


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_reach_flux_s_attention_whole(packed: bool, monkeypatch: pytest.MonkeyPatch):
    """Where one was part of a larger one cuDNN read beyond it, and the GPU gave up."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    for block in model.single_transformer_blocks if packed else ():
        block.proj_out = Float8Linear(block.proj_out, torch.float32)
    lean(model.requires_grad_(False).to(DEVICE))
    attend, whole = functional.scaled_dot_product_attention, []

    def watched(*args: Any, **options: Any) -> Tensor:
        found = attend(*args, **options)
        found.register_hook(lambda gradient: whole.append(gradient.transpose(1, 2).is_contiguous()))
        return found

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    inputs = [torch.randn(2, 8, 16), torch.randn(2, 5, 64), torch.randn(2, 32), torch.tensor([0.3, 0.7])]
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    given = {name: part.to(DEVICE) for name, part in zip(names, inputs, strict=True)}
    given |= {"img_ids": torch.zeros(8, 3, device=DEVICE), "txt_ids": torch.zeros(5, 3, device=DEVICE)}
    given["hidden_states"].requires_grad_()
    model(**given).sample.square().mean().backward()
    assert whole == [True] * 3


def compare(usual: Any, moved: Any, inputs: list[Tensor], others: dict[str, Any]) -> None:
    """The loss of two models on the same, and its gradients for what is trained: inputs or weights."""
    gradients = []
    for model in (usual, moved):
        loss = model(*inputs, **others).sample.square().mean()
        trained = [part for part in (*inputs, *model.parameters()) if part.requires_grad]
        gradients.append([loss, *torch.autograd.grad(loss, trained, allow_unused=True)])
    for found, wanted in zip(gradients[1], gradients[0], strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
