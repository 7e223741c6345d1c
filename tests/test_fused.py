"""A layer and its update as one operation: the same numbers as peft's, and peft's own way where it cannot be one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from finetune.fused import FusedLinear, fuse


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(**settings: Any) -> Any:
    """A net with random updates of both layers."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], **settings)
    net = inject_adapter_in_model(config, Net().requires_grad_(False))
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return net


def learnt(net: Any, x: Tensor, precision: torch.dtype | None = None) -> tuple[Tensor, dict[str, Any]]:
    """The output, and the gradients by name; the input's is `x`."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
        output = net(x)
    output.float().square().sum().backward()
    found = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    return output, {**found, "x": x.grad}


def fused_copy(net: Any) -> Any:
    twin = copy.deepcopy(net)
    fuse(twin)
    assert all(type(layer) is FusedLinear for layer in (twin.first, twin.second))
    return twin


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32), (2, 3, 4, 32)], ids=str)
def test_outputs_and_gradients_are_those_of_peft(shape: tuple[int, ...]):
    net = adapted()
    twin, x = fused_copy(net), torch.randn(shape)
    (expected, wanted), (output, found) = learnt(net, x), learnt(twin, x)
    torch.testing.assert_close(output, expected)
    assert wanted.keys() == found.keys() and len(found) == 5
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


def test_in_half_precision_gradients_stay_float32_and_are_no_further_off_than_those_of_peft():
    net, x = adapted(), torch.randn(64, 32)
    twin = fused_copy(net)
    exact = learnt(net, x)[1]
    net.zero_grad()
    rounded, (output, found) = learnt(net, x, torch.bfloat16)[1], learnt(twin, x, torch.bfloat16)
    assert output.dtype == torch.bfloat16
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        allowed = 1.5 * float((rounded[name] - exact[name]).norm()) + 0.01 * float(exact[name].norm())
        assert float((gradient - exact[name]).norm()) <= allowed, name


def test_a_frozen_layer_in_half_precision_has_updates_in_float32():
    net = adapted()
    twin, x = fused_copy(net), torch.randn(8, 32).bfloat16()
    for each in (net, twin):
        for layer in (each.first, each.second):
            layer.base_layer.bfloat16()
    output, found = learnt(twin, x)
    assert output.dtype == torch.bfloat16 and found["first.lora_A.default.weight"].dtype == torch.float32
    torch.testing.assert_close(output, learnt(net, x)[0], atol=0.1, rtol=0.05)


def test_without_its_adapter_a_layer_is_what_it_was():
    net = adapted()
    twin, x = fused_copy(net), torch.randn(5, 32)
    for layer in (twin.first, twin.second):
        layer.enable_adapters(False)
    plain = nn.functional.linear(x, net.first.base_layer.weight, net.first.base_layer.bias)
    torch.testing.assert_close(twin(x), nn.functional.linear(torch.tanh(plain), net.second.base_layer.weight))


def test_what_is_not_a_plain_update_is_left_to_peft():
    for settings in ({"lora_dropout": 0.1}, {"use_dora": True}):
        net = adapted(**settings)
        fuse(net)
        assert not any(isinstance(layer, FusedLinear) for layer in net.modules())


def test_two_adapters_at_once_are_left_to_peft():
    net = fused_copy(adapted())
    for layer in (net.first, net.second):
        config = LoraConfig(r=4, init_lora_weights=False)
        layer.update_layer("other", r=4, lora_alpha=4, config=config)
        layer.set_adapter(["default", "other"])
    x = torch.randn(5, 32)
    expected = sum(
        scale * x @ net.first.lora_A[name].weight.T @ net.first.lora_B[name].weight.T
        for name, scale in net.first.scaling.items()
    )
    torch.testing.assert_close(net.first(x), net.first.base_layer(x) + expected)
