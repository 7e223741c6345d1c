"""What processes of one run do together. With one alone there is nothing to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakMethod

import torch
import torch.distributed
from torch import Tensor, nn

PEER_IS_GONE = "another process of this run has ended; its own message says why"
AT_ONCE = 2**22  # numbers that are sent together: enough to outweigh the way, and soon there


class Sums:
    """Gradients become their sums over all processes, while autograd is at work on those of earlier layers.

    They are sent in buckets, as DistributedDataParallel does (2006.15704): in the order in which the
    first backward pass had them, on each process the same. A CUDA graph can hold all of it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters) if _are_several() else []
        self.arrived: dict[int, None] = {}  # parameters by their number, in the order of their gradients
        self.buckets: list[list[nn.Parameter]] = []  # none before the first pass is over
        self.place: dict[int, int] = {}  # parameter -> bucket
        self.missing: list[int] = []  # gradients that each bucket waits for
        self.sent: list[Any] = []
        self.is_last = False  # whether what arrives is whole
        met = WeakMethod(self._note)  # or parameters would keep themselves for ever, which Python cannot see
        for number, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(_tell, met, number))

    @contextmanager
    def summed(self) -> Iterator[None]:
        """What the parameters' gradients are after the backward pass in it, they are summed up."""
        self.missing, self.sent, self.arrived = [len(bucket) for bucket in self.buckets], [], {}
        self.is_last = True
        try:
            yield
            if not self.buckets and self.parameters:
                self._fill()
            for bucket in self.buckets[len(self.sent) :]:  # some parameter had no part in the loss
                self._send(bucket)
            for work in self.sent:
                if work is not None:
                    work.wait()
        finally:
            self.is_last, self.sent = False, []  # they keep what was sent

    def _note(self, number: int) -> None:
        if not self.is_last:  # a part of a step that others are added to
            return
        if not self.buckets:
            self.arrived[number] = None
            return
        self.missing[self.place[number]] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send(self.buckets[len(self.sent)])

    def _fill(self) -> None:
        """As the main process met them, so that no process waits for another's."""
        everything = self.arrived | dict.fromkeys(range(len(self.parameters)))
        order = torch.tensor(list(everything), device=self.parameters[0].device)
        agree([order])
        numbers = order.tolist()
        self.buckets = list(_buckets([self.parameters[number] for number in numbers]))
        places = [place for place, bucket in enumerate(self.buckets) for _ in bucket]
        self.place = dict(zip(numbers, places, strict=True))

    @torch.no_grad()
    def _send(self, bucket: Sequence[nn.Parameter]) -> None:
        """Several gradients turn into parts of what is sent, so that there is no second copy of them."""
        there = [(parameter, parameter.grad) for parameter in bucket if parameter.grad is not None]
        flat, place = [grad.as_strided([grad.numel()], [1]) for _, grad in there], 0
        if len(flat) > 1:
            whole = torch.cat(flat)
            for parameter, grad in there:
                parameter.grad = whole.as_strided(grad.shape, grad.stride(), place)
                place += grad.numel()
            flat = [whole]
        self.sent.append(torch.distributed.all_reduce(flat[0], async_op=True) if flat else None)


def _tell(met: WeakMethod[Callable[[int], None]], number: int, _: Tensor) -> None:
    if (note := met()) is not None:
        note(number)


def add_up(number: Tensor) -> None:
    """It becomes its sum over all processes, in place."""
    if _are_several():
        torch.distributed.all_reduce(number)


@torch.no_grad()
def agree(parts: Sequence[Tensor]) -> None:
    """Each becomes what the main process has."""
    if _are_several():
        for part in parts:
            torch.distributed.broadcast(part.data, src=0)


def is_main() -> bool:
    """Whether this is the process that speaks for all."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _buckets(parts: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In the given order, each bucket of one precision and, but for a single part, of at most so many numbers."""
    bucket: list[nn.Parameter] = []
    for part in parts:
        full = sum(each.numel() for each in bucket) + part.numel() > AT_ONCE
        if bucket and (full or part.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(part)
    if bucket:
        yield bucket


def has_lost_peer(error: BaseException) -> bool:
    """Whether it is what torch says where another process is gone."""
    said = isinstance(error, RuntimeError) and re.search(r"gloo|NCCL|closed by peer|reset by peer", str(error))
    return bool(said) and _are_several()


def _are_several() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
