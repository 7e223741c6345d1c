"""LoRA and its kin: layers of peft while training, plain low-rank factors afterwards.

Shapes: m outputs and n inputs of a layer, r the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapter import to_update
from finetune.errors import UserError
from finetune.fused import fuse
from finetune.lowrank import LowRank, factor

TRAINED, START = "default", "start"  # adapters by the names that peft keeps them under


def inject(model: Any, targets: Sequence[str], variant: str, settings: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Add an adapter to a diffusers or transformers model; its parameters by name.

    Args:
        settings: rank, alpha, rank_pattern, alpha_pattern, dropout; of LoKr also factor.

    Raises:
        UserError: the adapter would be no small file.
    """
    if variant == "pissa":
        model.add_adapter(_config(targets, variant, settings), START)
    model.add_adapter(_config(targets, variant, settings), TRAINED)
    if variant == "pissa":
        _start_from_the_weights(model)
    fuse(model)
    if variant in ("loha", "lokr"):
        adapter_weights(model)  # says now, and not after the training, what cannot go out
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _config(targets: Sequence[str], variant: str, settings: Mapping[str, Any]) -> Any:
    """peft's own configuration."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    rank, alpha = settings["rank"], settings["alpha"]
    common = {
        "target_modules": list(targets),
        "r": rank,
        "rank_pattern": dict(settings["rank_pattern"]),
        "alpha_pattern": dict(settings["alpha_pattern"]),
    }
    if variant == "loha":
        return LoHaConfig(alpha=alpha, **common)
    if variant == "lokr":
        return LoKrConfig(alpha=alpha, decompose_factor=settings["factor"], **common)
    kind = {"use_rslora": variant == "rslora", "use_dora": variant == "dora"}
    return LoraConfig(lora_alpha=alpha, lora_dropout=settings["dropout"], **kind, **common)


@torch.no_grad()
def _start_from_the_weights(model: Any) -> None:
    """PiSSA (2404.02948): train the principal part of each weight, which is B A.

    The start is taken off by an adapter of its own instead of off the weight: the
    base stays what it is, to the bit and in its own precision.
    """
    model.set_adapter([START, TRAINED])
    for _, module in _adapted(model):
        down, up, _ = factor(_weight(module.get_base_layer()).detach(), module.r[TRAINED], None)
        up /= module.scaling[TRAINED]
        module.lora_A[TRAINED].weight.copy_(down)
        module.lora_B[TRAINED].weight.copy_(up)
        for layer, start in ((module.lora_A[START], down), (module.lora_B[START], -up)):
            device = layer.weight.device
            del layer.weight  # what is no parameter is never trained, whatever peft switches on
            layer.register_buffer("weight", start.to(device))


@contextmanager
def disabled(models: Sequence[Any]) -> Iterator[None]:
    """The models as they were before their adapters."""
    with ExitStack() as stack:
        for model in models:
            model.disable_adapters()
            stack.callback(model.enable_adapters)
        yield


@contextmanager
def scaled(models: Sequence[Any], weight: float) -> Iterator[None]:
    """The models that share of the way from what they were to what they became."""
    scales = [module.scaling for model in models for _, module in _adapted(model)]
    before = [dict(each) for each in scales]
    try:
        for each in scales:
            each.update({name: weight * scale for name, scale in each.items()})
        yield
    finally:
        for each, old in zip(scales, before, strict=True):
            each.update(old)


def adapter_weights(model: nn.Module) -> LowRank:
    """The adapter's factors with its scale multiplied into B, so that the scale of the file is 1.

    Tools differ in where they look for alpha, and some look nowhere: a file whose
    scale is in its weights means the same to all of them.

    Raises:
        UserError: as factors they would be larger than the layer.
    """
    from peft.tuners.lora import LoraLayer

    weights: LowRank = {}
    for name, module in _adapted(model):
        down, up = _sum(module) if isinstance(module, LoraLayer) else _product(name, module)
        weights[f"{name}.lora_A.weight"] = down
        weights[f"{name}.lora_B.weight"] = up
        if TRAINED in getattr(module, "lora_magnitude_vector", ()):
            weights[f"{name}.lora_magnitude_vector.weight"] = _weight(module.lora_magnitude_vector[TRAINED]).detach()
    return weights


def _sum(module: Any) -> tuple[Tensor, Tensor]:
    """All adapters of a layer as one: `[B1 B2] [A1; A2] = B1 A1 + B2 A2`."""
    names = sorted(module.lora_A)
    down = torch.cat([_weight(module.lora_A[name]).detach() for name in names])
    up = torch.cat([_weight(module.lora_B[name]).detach() * module.scaling[name] for name in names], dim=1)
    return down, up


def _product(name: str, module: Any) -> tuple[Tensor, Tensor]:
    """LyCORIS' products (2309.14859) as factors: exact, at the rank that they have."""
    roles = {
        role: getattr(module, role)[TRAINED].detach()
        for role in module.adapter_layer_names
        if TRAINED in getattr(module, role)
    }
    base = _weight(module.get_base_layer())
    try:
        update = to_update(name, roles, kernel=base.shape[-1] if base.ndim == 4 else 0)
    except UserError as error:
        reason = str(error).partition(". ")[0]  # which begins with the name
        raise UserError(f"method.variant: {reason}. Lower method.rank or method.factor.") from None
    update = replace(update, scale=module.scaling[TRAINED]).folded()
    if update.rank > (full := min(len(base), base[0].numel())):
        product = (update.up.flatten(1) @ update.down.flatten(1)).view_as(base)
        down, up, _ = factor(product, full, None)
        return down, up
    return update.down, update.up


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight
