"""Work as one CUDA graph: recorded once for each shape of what it is given, then replayed without Python in between.

Where batches are small a GPU waits for Python most of the time: a step of Stable Diffusion 1.5
is thousands of kernels, each of which takes longer to launch than to run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from finetune.errors import reason, warn

MOST = 16  # shapes that are recorded; those after them run as usual


class Given(Protocol):
    """What work is done on."""

    @property
    def form(self) -> Hashable:
        """The same where nothing differs but what is in the tensors."""
        ...

    def tensors(self) -> list[Tensor]: ...

    def map(self, change: Callable[[Tensor], Tensor]) -> Self: ...


T = TypeVar("T", bound=Given)


@dataclass(frozen=True)
class Recording(Generic[T]):
    """One graph with what it reads and what it leaves."""

    graph: torch.cuda.CUDAGraph
    given: Sequence[T]  # its own memory, from which it reads
    result: Any
    gradients: Sequence[Tensor | None]  # None where the work has used them up

    def read(self, given: Sequence[T]) -> None:
        for own, new in zip(self.given, given, strict=True):
            for kept, value in zip(own.tensors(), new.tensors(), strict=True):
                kept.copy_(value, non_blocking=True)


class Captured(Generic[T]):
    """Work that is a pure function of tensors, by a CUDA graph from its second time on.

    The first time of each shape runs as usual, which warms up what may not be recorded, and is
    real work: nothing is done twice. What cannot be recorded goes on as usual, and one line says why.

    Args:
        work: no value of it may be asked for by the host, and it changes nothing but `parameters`, their
            gradients and an optimizer's tensors. What it returns is overwritten by the next time.
        name: of what is done, for the line that says why it cannot be recorded.
    """

    def __init__(self, work: Callable[[Sequence[T]], Any], parameters: Sequence[nn.Parameter], name: str):
        self.name = name
        self.work = work
        self.parameters = parameters
        self.stream = _stream(torch.cuda.current_device())
        self.pool = torch.cuda.graph_pool_handle()
        self.recordings: dict[Hashable, Recording[T]] = {}
        self.seen: set[Hashable] = set()
        self.given_up = False
        self.expected: Sequence[T] | None = None  # what a recording has read already

    def expect(self, given: Sequence[T]) -> None:
        """Have what is given next time read while the device is at work, so that it need not wait for that then."""
        if (recording := self.recordings.get(_shape(given))) is not None:
            recording.read(given)
            self.expected = given

    def __call__(self, given: Sequence[T]) -> Any:
        shape = _shape(given)
        if shape in self.recordings:
            return self._replay(self.recordings[shape], given)
        if shape in self.seen and not self.given_up and len(self.recordings) < MOST:
            try:
                self.recordings[shape] = self._record(given)
            except Exception as error:  # libraries below refuse in ways of their own
                self._give_up(error)
            else:
                return self._replay(self.recordings[shape], given)
        self.seen.add(shape)
        return self._run(given)

    def _run(self, given: Sequence[T]) -> Any:
        """As usual, on the stream that is recorded later: autograd remembers where a parameter was used first."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.work(given)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _record(self, given: Sequence[T]) -> Recording[T]:
        self._forget_gradients()
        torch.cuda.empty_cache()  # what the usual step has left is of no use to a graph, which has memory of its own
        graph, own = torch.cuda.CUDAGraph(), [each.map(torch.clone) for each in given]
        with (
            _nothing_is_freed(),
            # NCCL's watchdog asks the device how it is all the time, which is no fault of this thread.
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = self.work(own)
        gradients = [parameter.grad for parameter in self.parameters]
        return Recording(graph, own, result, gradients)

    def _replay(self, recording: Recording[T], given: Sequence[T]) -> Any:
        if self.expected is not given:
            recording.read(given)
        self.expected = None
        recording.graph.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return recording.result

    def _give_up(self, error: Exception) -> None:
        self.given_up = True
        self._forget_gradients()
        _renew_generator()
        warn(f"{self.name} runs as usual and not as one CUDA graph: {reason(error)}")

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _shape(given: Sequence[Given]) -> Hashable:
    return tuple(each.form for each in given)


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all runs of a process: for each that it is given, cuBLAS keeps memory that is never freed."""
    return torch.cuda.Stream(device)


@contextmanager
def _nothing_is_freed() -> Iterator[None]:
    """What an earlier run has left, collected now, would end the recording."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _renew_generator() -> None:
    """The device's generator: a recording that failed leaves it believing that it is still recorded."""
    device = torch.cuda.current_device()
    fresh = torch.Generator(device=f"cuda:{device}")
    torch.cuda.default_generators[device].graphsafe_set_state(fresh.graphsafe_get_state())
