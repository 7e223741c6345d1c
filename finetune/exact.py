"""Float32 arithmetic on weights that are kept in half of it, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_WIDE = ContextVar("wide", default=False)


def is_exact() -> bool:
    """Whether everything is computed in float32 just now."""
    return _WIDE.get()


@contextmanager
def in_float32(models: Iterable[nn.Module]) -> Iterator[None]:
    """Each layer computes in float32 while it is at work; no more than one is held in it.

    A model that fills the memory in half precision has no room for itself in full,
    and what rounding adds to a prediction can exceed what a small adapter does.
    """
    with ExitStack() as stack:
        for model in models:
            for module in model.modules():
                if hasattr(getattr(module, "state", None), "SCB"):
                    stack.callback(module.register_forward_hook(_eight_bits).remove)
                if _is_half(module):
                    layer = _Layer(module)
                    stack.callback(module.register_forward_pre_hook(layer.widen, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(layer.restore, always_call=True).remove)
        stack.callback(_WIDE.reset, _WIDE.set(True))
        yield


def _eight_bits(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
    """The answer of a layer in 8 bits with its input as it is; on a GPU it rounds that to 8 bits, too."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    state, weight = module.state, module.weight
    packed, scales = (weight.data, weight.SCB) if state.SCB is None else (state.CB, state.SCB)
    bias = None if module.bias is None else module.bias.float()
    return nn.functional.linear(inputs[0].float(), int8_vectorwise_dequant(packed, scales), bias)


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """A layer's parameters; an adapted one is a layer with all that is in it, for its parts look at each other's."""
    return module.parameters(recurse=hasattr(module, "base_layer"))


def _is_half(module: nn.Module) -> bool:
    computes = getattr(module, "compute_dtype", None)  # of a layer that is quantised
    return computes in (torch.float16, torch.bfloat16) or any(
        part.dtype in (torch.float16, torch.bfloat16) for part in _own(module)
    )


class _Layer:
    """A module's own parameters, widened before its forward pass and as they were after it."""

    def __init__(self, module: nn.Module):
        self.kept: list[tuple[nn.Parameter, Tensor]] = []
        self.computes = getattr(module, "compute_dtype", None)

    def widen(self, module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        self.kept = [(part, part.data) for part in _own(module) if part.is_floating_point()]
        for part, data in self.kept:
            part.data = data.float()
        if self.computes is not None:
            module.compute_dtype = torch.float32
        return tuple(map(_widened, inputs)), {name: _widened(value) for name, value in options.items()}

    def restore(self, module: Any, *_: Any) -> None:
        for part, data in self.kept:
            part.data = data
        self.kept = []
        if self.computes is not None:
            module.compute_dtype = self.computes


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
