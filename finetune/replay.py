"""A denoiser as a CUDA graph while a pipeline draws: recorded at the second step of the sampler, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from finetune.capture import Captured


@dataclass(frozen=True)
class Call:
    """What a denoiser is called with."""

    values: Sequence[Any]
    nesting: TreeSpec

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> Call:
        return cls(*tree_flatten((args, kwargs)))

    @property
    def form(self) -> Hashable:
        """Calls of one form differ by what is in their tensors alone."""
        kinds = [(v.shape, v.dtype) if isinstance(v, Tensor) else repr(v) for v in self.values]
        return str(self.nesting), tuple(kinds)

    def tensors(self) -> list[Tensor]:
        return [value for value in self.values if isinstance(value, Tensor)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        return replace(self, values=[change(v) if isinstance(v, Tensor) else v for v in self.values])

    def carry_out(self, function: Callable[..., Any]) -> Any:
        args, kwargs = tree_unflatten(list(self.values), self.nesting)
        return function(*args, **kwargs)


class Replayed:
    """A denoiser's `forward`, by graphs of its own until they are let go."""

    def __init__(self, forward: Callable[..., Any], device: torch.device):
        self.forward = forward
        self.device = device
        self.captured: Captured[Call] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.captured is None:
            self.captured = Captured(lambda calls: calls[0].carry_out(self.forward), (), "the denoiser")
        call = Call.of(*args, **kwargs).map(partial(torch.Tensor.to, device=self.device))
        return tree_map(torch.clone, self.captured([call]))  # some samplers keep what earlier steps have answered

    def let_go(self, pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        """After a picture's last step, for the VAE needs the room; what could not be recorded is remembered."""
        if step + 1 >= pipeline.num_timesteps and not (self.captured and self.captured.given_up):
            self.captured = None
        return {}


@contextmanager
def replayed(pipeline: Any) -> Iterator[dict[str, Any]]:
    """Have a pipeline that is on a GPU draw so.

    Yields:
        What else to call it with.
    """
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if pipeline.device.type != "cuda" or denoiser is None or hasattr(denoiser, "_hf_hook"):  # which moves its weights
        yield {}
        return
    replaying = Replayed(denoiser.forward, pipeline.device)
    denoiser.forward = replaying
    try:
        yield {"callback_on_step_end": replaying.let_go}
    finally:
        del denoiser.forward
