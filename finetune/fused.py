"""A frozen linear layer and its trained low-rank update as one operation, and all that read the same input as one.

peft computes them apart, in the update's own precision: it copies each layer's input to
float32 and back, and adds the two outputs. Most of the time of a small step is spent there.
A model whose trained layers are all fused so computes in the precision that it is kept in.

Shapes: k layers, one below another; N rows, n inputs, m outputs of each, r the rank of each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.packed import Packed, computes, unpacked_together

HALF = {torch.float16, torch.bfloat16}
# Layers of an attention by the names of diffusers and transformers; all but the first of them read the text of a cross
# attention.
READERS = [("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("q_proj", "k_proj", "v_proj")]
# Where kernels are many and small. A CPU gains nothing from fewer of them; what is on meta stands for a GPU.
TOGETHER = ("cuda", "meta")
Frozen = Callable[[torch.dtype], Tensor]  # weights that are not trained, in a precision: (km, n)


class LowRankLinear(torch.autograd.Function):
    """`x W^T + b + s (x A^T) B^T` of k layers that read the same x, with gradients for x, A and B alone.

    A and B are float32, and so are their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: Frozen,
        bias: Tensor | None,
        dtype: torch.dtype,
        scale: float,
        cast: Sequence[Tensor],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        """(..., n) to k times (..., m).

        Args:
            frozen, bias: W (km, n) and b (km,).
            dtype: what is computed in.
            cast: A (kr, n) and B (km, r) in the precision of the base, where they are known.
            factors: A (r, n) of each layer, then B (m, r) of each.
        """
        count = len(factors) // 2
        plain = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with plain:
            if not cast or cast[0].dtype != dtype:
                cast = [_below(factors[:count]), _below(factors[count:])]
            rows, down, up = (part.to(dtype) for part in (x.reshape(-1, x.shape[-1]), *cast))
            inner = rows @ down.T
            result = nn.functional.linear(rows, frozen(dtype), None if bias is None else bias.to(dtype))
            _add_product(_apart(result, count), _apart(inner, count), _each(up, count).mT, scale)
        ctx.save_for_backward(rows, inner, down, up)
        ctx.frozen, ctx.scale, ctx.shape, ctx.dtype = frozen, scale, x.shape, x.dtype
        ctx.set_materialize_grads(False)  # to know the layers whose answer nobody took
        answers = result.view(*x.shape[:-1], -1)
        return (answers,) if count == 1 else answers.split(answers.shape[-1] // count, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, inner, down, up = ctx.saved_tensors
        count, used = len(gradients), [each is not None for each in gradients]
        shape = len(rows), len(up) // count
        parts = [rows.new_zeros(shape) if each is None else each.reshape(shape) for each in gradients]
        gradient = (parts[0] if count == 1 else torch.cat(parts, dim=1)).to(rows.dtype)
        apart, back = _apart(gradient, count), torch.empty_like(inner)
        _add_product(_apart(back, count), apart, _each(up, count), ctx.scale, beta=0)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ ctx.frozen(rows.dtype)).addmm_(back, down).view(ctx.shape).to(ctx.dtype)
        to_downs = _product(back.T, rows).chunk(count)
        to_ups = _product(apart.mT, _apart(inner if ctx.scale == 1 else inner * ctx.scale, count))
        to_factors = *to_downs, *(to_ups.unbind() if count > 1 else [to_ups])
        to_factors = [each if its else None for each, its in zip(to_factors, 2 * used, strict=True)]
        return to_x, None, None, None, None, None, *to_factors


def _precision(x: Tensor, base: nn.Linear) -> torch.dtype:
    """That of autocast, or of x without it."""
    kind = x.device.type
    if x.is_meta:  # where autocast is unknown; its precision is then that of the base
        return computes(base)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _below(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _apart(matrix: Tensor, count: int) -> Tensor:
    """(N, kc) to (k, N, c), in the same memory; what is of one layer stays a matrix, which a CPU is faster with."""
    if count == 1:
        return matrix
    return matrix.view(len(matrix), count, matrix.shape[1] // count).transpose(0, 1)


def _each(matrix: Tensor, count: int) -> Tensor:
    """(kc, n) to (k, c, n), and likewise."""
    return matrix if count == 1 else matrix.view(count, len(matrix) // count, matrix.shape[1])


def _add_product(result: Tensor, a: Tensor, b: Tensor, scale: float, beta: int = 1) -> None:
    """Of each layer, in place: `beta` times what is there and `scale` times `a b`."""
    add = result.addmm_ if result.ndim == 2 else result.baddbmm_
    add(a, b, beta=beta, alpha=scale)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32, which a GPU adds up in anyway."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return (a @ b).float()
    product = torch.mm if a.ndim == 2 else torch.bmm
    return product(a, b, out_dtype=torch.float32)


class FusedLinear(lora.Linear):
    """peft's layer, for which one active adapter without dropout is one operation."""

    cast: Sequence[Tensor] = ()  # the factors in the base's precision, while a model is at work
    siblings: Siblings | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = self.active_adapters
        if self.disable_adapters or self.merged or args or kwargs or len(active) != 1:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        name = active[0]
        if self.siblings is not None and (found := self.siblings.answer(x, base, name)) is not None:
            return found
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        frozen = base.unpacked if isinstance(base, Packed) else base.weight.to
        dtype = _precision(x, base)
        return LowRankLinear.apply(x, frozen, base.bias, dtype, self.scaling[name], self.cast, *factors)[0]


class Siblings:
    """Layers that are expected to read the same input: the first that is given one answers for all.

    The others find their part if they are given the very same, and otherwise compute their own:
    what is expected wrongly takes time and changes nothing. The parts of the layers are known and
    not the layers, which know their siblings: a model that nobody needs is gone at once.

    Args:
        together: the kinds of device where they are one operation.
    """

    def __init__(self, layers: Sequence[FusedLinear], together: Collection[str]):
        self.bases: list[Any] = [layer.base_layer for layer in layers]
        self.downs: list[Any] = [layer.lora_A for layer in layers]
        self.ups: list[Any] = [layer.lora_B for layer in layers]
        self.scalings = [layer.scaling for layer in layers]
        self.together = together
        self.cast: Sequence[Tensor] = ()  # the factors of all in the base's precision, while a model is at work
        self.forget()

    def forget(self) -> None:
        self.given: Tensor | None = None
        self.asked: tuple[Any, ...] = ()
        self.answers: dict[nn.Module, Tensor] = {}

    def answer(self, x: Tensor, base: nn.Module, name: str) -> Tensor | None:
        """(..., n) to (..., m): the answer of the layer around `base`; None where they cannot be one operation."""
        version = None if x.is_inference() else x._version
        dtype = _precision(x, self.bases[0])
        asked = name, version, torch.is_grad_enabled(), dtype
        if self.given is not x or self.asked != asked or base not in self.answers:
            self.forget()
            if not (answers := self._answers(x, name, dtype)):
                return None
            self.given, self.asked, self.answers = x, asked, answers
        found = self.answers.pop(base, None)
        if not self.answers:
            self.forget()
        return found

    def _answers(self, x: Tensor, name: str, dtype: torch.dtype) -> dict[nn.Module, Tensor]:
        if x.device.type not in self.together or not all(name in factors for factors in self.downs):
            return {}
        bases = self.bases
        frozen = _frozen(bases)
        bias = None if bases[0].bias is None else one([base.bias for base in bases])
        if frozen is None or (bias is None) != (bases[0].bias is None) or bases[0].weight.device != x.device:
            return {}
        factors = [each[name].weight for each in (*self.downs, *self.ups)]
        alike = {(len(factor), scaling[name]) for factor, scaling in zip(factors, self.scalings, strict=False)}
        if len(alike) > 1:
            return {}
        found = LowRankLinear.apply(x, frozen, bias, dtype, self.scalings[0][name], self.cast, *factors)
        return dict(zip(bases, found, strict=True))

    @torch.inference_mode(False)
    def lie_together(self) -> None:
        """Lay the frozen weights that are not packed one after another; whoever moves a model takes them apart.

        A graph that is being recorded would remember where they are in memory of its own.
        """
        for kind in ("weight", "bias"):
            parts: list[Any] = [getattr(base, kind) for base in self.bases]
            if kind == "weight" and isinstance(self.bases[0], Packed):
                continue
            if any(part is None or part.is_meta or part.device.type not in self.together for part in parts):
                continue
            alike = len({(part.shape, part.dtype, part.device) for part in parts}) == 1
            recorded = parts[0].is_cuda and torch.cuda.is_current_stream_capturing()
            if alike and one(parts) is None and not recorded:
                whole = torch.cat([part.data for part in parts])
                for part, its in zip(parts, whole.split(len(parts[0])), strict=True):
                    part.data = its


def _frozen(bases: Sequence[Any]) -> Frozen | None:
    if all(isinstance(base, Packed) for base in bases):
        return partial(unpacked_together, bases)
    weight = one([base.weight for base in bases])
    return None if weight is None else weight.to


def one(parts: Sequence[Tensor]) -> Tensor | None:
    """k times (m, ...) as (km, ...), where they lie so in memory; on meta, where nothing lies anywhere, they do."""
    first, count = parts[0], len(parts)
    if len({(part.shape, part.dtype, part.device) for part in parts}) > 1:
        return None
    shape = count * len(first), *first.shape[1:]
    if first.is_meta:
        return first[:1].expand(shape)
    storage, start = first.untyped_storage().data_ptr(), first.storage_offset()
    for place, part in enumerate(parts):
        follows = part.storage_offset() == start + place * first.numel()
        if not follows or part.untyped_storage().data_ptr() != storage or not part.is_contiguous():
            return None
    return first.as_strided(shape, first.stride(), start)


def fuse(model: nn.Module, together: Collection[str] = TOGETHER) -> None:
    """Make all layers of a model that can be fused so.

    Args:
        together: the kinds of device where layers that read the same input are one operation.
    """
    layers: list[Any] = list(model.modules())
    for layer in layers:
        plain = type(layer) is lora.Linear and _is_known(layer.get_base_layer()) and not layer.lora_variant
        if plain and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()):
            layer.__class__ = FusedLinear
    groups = [group for parent in layers for group in _readers(parent)]
    for group in groups:
        siblings = Siblings(group, together)
        for layer in group:
            layer.siblings = siblings
    groups += [[layer] for layer in layers if isinstance(layer, FusedLinear) and layer.siblings is None]
    model.register_forward_pre_hook(partial(_prepare, groups, together))
    model.register_forward_hook(partial(_drop, groups), always_call=True)


def _is_known(base: nn.Module) -> bool:
    return type(base) is nn.Linear or isinstance(base, Packed)


def _readers(parent: nn.Module) -> Iterator[list[FusedLinear]]:
    """Layers of an attention that read the same input and are of one shape."""
    for names in READERS:
        alike: dict[Any, list[FusedLinear]] = {}
        for name in names[1 if getattr(parent, "is_cross_attention", False) else 0 :]:
            layer: Any = getattr(parent, name, None)
            if isinstance(layer, FusedLinear):
                base: Any = layer.base_layer
                shape = type(base), base.in_features, base.out_features, base.bias is None, computes(base)
                alike.setdefault((*shape, *layer.r.items(), *layer.scaling.items()), []).append(layer)
        yield from (layers for layers in alike.values() if len(layers) > 1)


@torch.no_grad()
def _prepare(groups: Sequence[Sequence[FusedLinear]], together: Collection[str], *_: Any) -> None:
    """Before a forward pass: siblings' weights together, and all factors in half precision where a GPU works in it."""
    for layers in groups:
        if (siblings := layers[0].siblings) is not None:
            siblings.forget()
            siblings.lie_together()
    base: Any = groups[0][0].base_layer if groups else None
    if base is not None and computes(base) in HALF and base.weight.device.type in {"cuda", *together} - {"meta"}:
        _cast(groups, computes(base))


def _cast(groups: Sequence[Sequence[FusedLinear]], dtype: torch.dtype) -> None:
    """All factors by one operation instead of two for each layer; those of siblings one below another."""
    names = {tuple(layer.active_adapters) for layers in groups for layer in layers}
    if len(names) > 1 or len(only := names.pop()) != 1:
        return
    (name,) = only
    exact: list[Any] = []
    cast: list[Tensor] = []
    for layers in groups:
        for kind in ("lora_A", "lora_B"):
            factors = [getattr(layer, kind)[name].weight for layer in layers]
            sizes = [factor.numel() for factor in factors]
            room = torch.empty(sum(sizes), dtype=dtype, device=factors[0].device)
            cast += [part.view_as(factor) for part, factor in zip(room.split(sizes), factors, strict=True)]
            exact += factors
    torch._foreach_copy_(cast, exact)  # pyright: ignore[reportPrivateImportUsage]
    parts = iter(cast)
    for layers in groups:
        downs, ups = ([next(parts) for _ in layers] for _ in range(2))
        for layer, down, up in zip(layers, downs, ups, strict=True):
            layer.cast = down, up
        if (siblings := layers[0].siblings) is not None:
            siblings.cast = [whole for whole in map(one, (downs, ups)) if whole is not None]


def _drop(groups: Sequence[Sequence[FusedLinear]], *_: Any) -> None:
    for layers in groups:
        for layer in layers:
            layer.cast = ()
        if (siblings := layers[0].siblings) is not None:
            siblings.cast = ()
            siblings.forget()


def as_kept(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, where a model needs none: it would copy what a norm reads to float32, and back."""
    kind = "cuda" if device.type == "meta" else device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    trained = {id(part) for layer in model.modules() if isinstance(layer, FusedLinear) for part in _factors(layer)}
    others = {part.dtype for part in model.parameters() if part.is_floating_point() and id(part) not in trained}
    alone = len(others) == 1 and others <= HALF
    return torch.autocast(kind, enabled=False) if alone else nullcontext()


def _factors(layer: FusedLinear) -> list[nn.Parameter]:
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
