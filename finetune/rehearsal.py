"""A run on tensors without data: what is alive at each moment, and what a GPU would make of it.

Shapes: B batch, N heads, L queries, S keys, D width of a head.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

# What autocast on CUDA does to the functions that these models call (docs.pytorch.org/docs/stable/amp.html).
LOWERED = {"linear", "conv2d", "matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
RAISED = {"layer_norm", "group_norm", "rms_norm", "interpolate", "softmax", "pow", "__pow__", "square", "rsqrt"}
RAISED |= {"exp", "log", "reciprocal", "sum", "cumsum", "norm", "mse_loss"}
UNKNOWN = {"item": 1, "__float__": 1.0, "__bool__": True}  # what stands for a value that there is not


@dataclass(frozen=True)
class Work:
    """What an action asks of a machine."""

    flops: int  # of its products, a multiplication and an addition being two
    operations: int  # of any size, each of which Python has to start

    def times(self, flops: float, operations: float | None = None) -> Work:
        """Both by the same factor, unless the other has its own."""
        return Work(round(self.flops * flops), round(self.operations * (flops if operations is None else operations)))


class Ledger(TorchDispatchMode):
    """Bytes of all tensors on the meta device that are alive, by what they are for, and the work that is done.

    A storage counts from the operation that makes it until nothing holds it any more, in
    Python or in autograd's graph, so the fullest moment is found and not assumed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = ""  # what is made from now on is for
        self.held: Counter[str] = Counter()
        self.fullest: Counter[str] = Counter()
        self.flops = self.operations = 0
        self._known: dict[int, tuple[str, int]] = {}  # storage -> what it is for, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += flops(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta and leaf.untyped_storage()._cdata not in self._known:
                self.book([leaf], self.kind)
        if self.held.total() > self.fullest.total():
            self.fullest = self.held.copy()
        return result

    def book(self, tensors: Iterable[Tensor], kind: str, share: float = 1.0) -> None:
        """Say what tensors are for.

        Args:
            share: of their bytes that is counted, where they are stored in less than their precision takes.
        """
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if (key := storage._cdata) not in self._known:
                weakref.finalize(storage, self._strike, key).atexit = False
            self._strike(key)
            self._known[key] = kind, int(storage.nbytes() * share)
            self.held[kind] += self._known[key][1]

    def _strike(self, key: int) -> None:
        kind, size = self._known.pop(key, ("", 0))
        self.held[kind] -= size

    def most(self, action: Callable[[], Any]) -> int:
        """Bytes at the fullest moment of an action; `fullest` has them by what they are for."""
        self.fullest = self.held.copy()
        action()
        return self.fullest.total()

    def more(self, action: Callable[[], Any]) -> int:
        """Bytes that an action needs beside what was there before."""
        before = self.held.total()
        return self.most(action) - before

    def count(self, action: Callable[[], Any]) -> Work:
        """What an action asks for."""
        flops, operations = self.flops, self.operations
        action()
        return Work(self.flops - flops, self.operations - operations)


def go_back(loss: Tensor) -> None:
    """`loss.backward()`, which would leave the modes while it works, though blocks may be computed anew in it."""
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), accumulate_grad=True)


def recompute_alike(model: nn.Module) -> None:
    """Have checkpointed blocks computed anew under the autocast that they were computed under.

    Torch sees to it on the devices that it knows.
    """

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), _autocast(torch.is_autocast_enabled("cuda"))

    for module in model.modules():
        if (checkpoint := getattr(module, "_gradient_checkpointing_func", None)) is not None:
            setattr(module, "_gradient_checkpointing_func", partial(checkpoint, context_fn=contexts))  # noqa: B010


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """What `torch.autocast` does, on a machine without a GPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


class LikeGpu(TorchFunctionMode):
    """Treats tensors on the meta device as a GPU treats real ones: autocast and fused attention.

    Neither exists for them: torch's autocast leaves them alone, and its attention would
    make the L x S matrix that no GPU keeps.
    """

    def __init__(self, precision: torch.dtype | None, mask_length: int | None = None):
        super().__init__()
        self.precision = precision  # of autocast, if there is one
        self.mask_length = mask_length  # how many a mask picks; without it, all
        self._casts: dict[int, Tensor] | None = None

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """A forward pass, for which each trained weight is cast once."""
        self._casts = {}
        with _autocast(self.precision is not None):
            yield
        self._casts = None

    def end_forward(self) -> None:
        """Let go of the cast weights; a block that is computed again casts its own."""
        self._casts = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if torch.is_autocast_enabled("cuda") and name in LOWERED | RAISED:
            target = self.precision if name in LOWERED else torch.float32
            args, kwargs = tree_map(lambda value: self._cast(value, target), (args, kwargs))
        if name == "scaled_dot_product_attention":
            return attend(*args, **kwargs)
        if name in UNKNOWN and args[0].is_meta:
            return UNKNOWN[name]
        if name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool and args[1].is_meta:
            return args[0][: self.mask_length]
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta or not value.is_floating_point():
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        if self._casts is None or dtype != self.precision or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention (B, N, L, D) by the kernels of a GPU: FlashAttention and, with a mask or in float32, xFormers'."""
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]
