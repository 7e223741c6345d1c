"""A base in 4 or 8 bits: smaller, and taught as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import lessons
import pytest
import tiny
import torch
from bitsandbytes import nn as bnb

from finetune import run
from finetune.errors import UserError
from finetune.evaluation import studio
from finetune.evaluation.concept import Given, read
from finetune.float8 import Float8Linear
from finetune.fused import FusedLinear, as_kept
from finetune.parts import move

KINDS = {
    "nf4": (bnb.Linear4bit, torch.uint8),
    "int8": (bnb.Linear8bitLt, torch.int8),
    "fp8": (Float8Linear, torch.uint8),
}
WAYS = {
    "lora": ("lora", {"rank": 2}),
    "dora": ("lora", {"rank": 2, "variant": "dora"}),
    "word": ("textual_inversion", {"init": "thing"}),
    "dreambooth": ("dreambooth", {"rank": 2, "prior": "prediction", "class_prompt": "a thing"}),
}


def recipe(base: Path, output: Path, way: str, to: str, precision: str = "no") -> Any:
    method, settings = WAYS[way]
    return lessons.recipe(base, output, method, settings, base={"quantize": to}, train={"precision": precision})


# On a CPU, peft loses the scales of 8 bits when it reads a weight for DoRA a second time; a GPU has another way.
CASES = [(way, to) for way in WAYS for to in KINDS if (way, to) != ("dora", "int8")]


@pytest.mark.parametrize(("way", "to"), CASES)
@pytest.mark.parametrize("family", tiny.BASES)
def test_every_family_learns_on_a_quantised_base(way: str, family: str, to: str, base_folder: Any, tmp_path: Path):
    at_work = run.prepare(recipe(base_folder(family), tmp_path, way, to))
    kind, packed = KINDS[to]
    for name in (at_work.family.denoiser_name, *at_work.family.heavy):
        part = getattr(at_work.family.pipeline, name)
        found = [module for module in part.modules() if isinstance(module, kind)]
        assert found and all(module.weight.dtype == packed for module in found)
    before = {name: value.clone() for name, value in at_work.family.denoiser.named_parameters()}
    at_work.loop()
    trained = {name for name, value in at_work.family.denoiser.named_parameters() if value.requires_grad}
    moved = {name for name, value in at_work.family.denoiser.named_parameters() if not torch.equal(value, before[name])}
    assert moved <= trained and len(moved) >= 0.9 * len(trained)
    assert at_work.finish().verdict.error < 0.005


@pytest.mark.parametrize("to", ["nf4", "fp8"])
@pytest.mark.parametrize("family", tiny.BASES)
def test_all_that_is_taught_beside_packed_weights_is_one_operation_in_the_precision_of_the_base(
    family: str, to: str, base_folder: Any, tmp_path: Path
):
    """With one layer left to peft the whole denoiser would be cast to float32 and back: it took three times as long."""
    at_work = run.prepare(recipe(base_folder(family), tmp_path, "lora", to, precision="bf16"))
    denoiser = at_work.family.denoiser
    adapted = [module for module in denoiser.modules() if hasattr(module, "lora_A")]
    assert adapted and all(isinstance(module, FusedLinear) for module in adapted)
    with torch.autocast("cpu", torch.bfloat16), as_kept(denoiser, torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("to", ["nf4", "fp8"])
@pytest.mark.parametrize("way", ["lora", "dora"])
def test_what_was_learnt_on_a_quantised_base_can_be_evaluated(way: str, to: str, base_folder: Any, tmp_path: Path):
    at_work = run.prepare(recipe(base_folder("stable_diffusion"), tmp_path, way, to))
    at_work.loop()
    at_work.finish()
    studio.check(read(str(at_work.folder), Given()))


@pytest.mark.parametrize("has_read", [False, True])
def test_a_text_encoder_in_8_bits_leaves_nothing_behind_where_it_was(has_read: bool, base_folder: Any, tmp_path: Path):
    at_work = run.prepare(recipe(base_folder("flux"), tmp_path, "lora", "int8"))
    encoder = at_work.family.pipeline.text_encoder_2
    expected = at_work.family.read(["a thing"])[0].embeds if has_read else None
    layers = [module for module in encoder.modules() if isinstance(module, bnb.Linear8bitLt)]

    def to_elsewhere(_: torch.device) -> None:
        for parameter in encoder.parameters():
            parameter.data = parameter.data.clone()

    encoder.to = to_elsewhere
    move(encoder, torch.device("cpu"))
    held = [each.CB for layer in layers for each in (layer.state, layer.weight) if each.CB is not None]
    assert len(held) == len(layers)
    assert {kept.data_ptr() for kept in held} == {layer.weight.data_ptr() for layer in layers}
    found = at_work.family.read(["a thing"])[0].embeds
    assert expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("to", KINDS)
def test_a_quantised_base_predicts_about_what_the_base_does(to: str, base_folder: Any, tmp_path: Path):
    at_work = run.prepare(recipe(base_folder("stable_diffusion"), tmp_path, "lora", to, precision="bf16"))
    plain = at_work.recipe.model_copy(update={"base": at_work.recipe.base.model_copy(update={"quantize": None})})
    expected, found = at_work.probe(run.load_family(plain)), at_work.probe(at_work.family)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < {"nf4": 0.1, "int8": 0.02, "fp8": 0.04}[to]


def test_the_comparison_knows_no_rounding_of_activations(
    base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a GPU a layer's input has 8 bits, too; there a fresh pipeline was 8 % off what was trained."""
    at_work = run.prepare(recipe(base_folder("stable_diffusion"), tmp_path, "lora", "int8"))
    expected, product = at_work.probe(at_work.family), bitsandbytes.matmul

    def like_a_gpu(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return product((x / step).round() * step, *rest, **options)

    monkeypatch.setattr(bitsandbytes, "matmul", like_a_gpu)
    found = at_work.probe(at_work.family)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dreambooth", {"denoiser": "whole", "prior": "none"}),
        ("lora", {"variant": "pissa"}),
        ("lora", {"variant": "loha"}),
        ("lora", {"variant": "lokr"}),
    ],
)
def test_what_changes_or_reads_the_weights_themselves_is_refused(
    method: str, settings: dict[str, Any], base_folder: Any, tmp_path: Path
):
    with pytest.raises(UserError, match=r"base\.quantize: the method needs the base's weights as they are"):
        lessons.recipe(base_folder("stable_diffusion"), tmp_path, method, settings, base={"quantize": "nf4"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_in_8_bit_floating_point_errs_by_at_most_a_sixteenth_of_each_weight(dtype: torch.dtype):
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48, dtype=dtype)
    plain.weight.data[3] *= 1e-3  # a scale of its own for each output
    plain.weight.data[4] = 0
    packed = Float8Linear(plain, dtype).cpu()  # when it is moved it is packed
    weight, expected = packed.dequantize().float(), plain.weight.float()
    least = expected.abs().amax(1, keepdim=True) / 448 * 2**-9  # at most half of what is the least but 0
    assert ((weight - expected).abs() <= expected.abs() / 16 + least).all()
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    packed(x).sum().backward()
    given = torch.nn.functional.linear(x.detach(), packed.dequantize(), plain.bias)
    torch.testing.assert_close(packed(x), given)
    torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(2, 5, 64), rtol=1e-2, atol=1e-2)


def test_a_layer_in_8_bit_floating_point_keeps_nothing_wider_for_the_way_back():
    packed, kept = Float8Linear(torch.nn.Linear(64, 48), torch.float32).cpu(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):
        packed(torch.randn(1, 64, requires_grad=True))
    assert {part.dtype for part in kept if part.numel() >= 64 * 48} <= {torch.uint8}
