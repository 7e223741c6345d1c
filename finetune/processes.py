"""What processes of one run do together. With one alone there is nothing to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

AT_ONCE = 2**25  # numbers that are sent together: enough to outweigh the way, and little memory


class Sums:
    """Gradients become their sums over all processes, while autograd is at work on those of earlier layers.

    The last layers' are there first, so buckets are filled from the end (2006.15704). Each process
    sends them in the same order. A CUDA graph can hold all of it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.buckets = list(_buckets(parameters[::-1])) if _are_several() else []
        self.missing: list[int] = []  # gradients that each bucket waits for, while there is something to sum up
        self.sent: list[Any] = []
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))

    @contextmanager
    def summed(self) -> Iterator[None]:
        """What the parameters' gradients are after the backward pass in it, they are summed up."""
        self.missing, self.sent = [len(bucket) for bucket in self.buckets], []
        try:
            yield
            for bucket in self.buckets[len(self.sent) :]:  # some parameter had no part in the loss
                self._send(bucket)
            for work in self.sent:
                if work is not None:
                    work.wait()
        finally:
            self.missing, self.sent = [], []

    def _arrived(self, number: int) -> None:
        if not self.missing:  # a part of a step that others are added to
            return
        self.missing[number] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send(self.buckets[len(self.sent)])

    @torch.no_grad()
    def _send(self, bucket: Sequence[nn.Parameter]) -> None:
        """Gradients turn into parts of what is sent, so that there is no second copy of them."""
        there = [(parameter, parameter.grad) for parameter in bucket if parameter.grad is not None]
        if not there:
            self.sent.append(None)
            return
        whole, place = torch.cat([grad.as_strided([grad.numel()], [1]) for _, grad in there]), 0
        for parameter, grad in there:
            parameter.grad = whole.as_strided(grad.shape, grad.stride(), place)
            place += grad.numel()
        self.sent.append(torch.distributed.all_reduce(whole, async_op=True))


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


def _are_several() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
