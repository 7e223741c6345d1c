"""A step as one CUDA graph: recorded once for each shape of its batches, then replayed without Python in between.

Where batches are small a GPU waits for Python most of the time: a step of Stable Diffusion 1.5
is thousands of kernels, each of which takes longer to launch than to run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from finetune.batch import Batch
from finetune.errors import reason, warn

Work = Callable[[Sequence[Batch]], Tensor]
MOST = 16  # shapes that are recorded; those after them run as usual


@dataclass(frozen=True)
class Recording:
    """One graph with what it reads and what it leaves."""

    graph: torch.cuda.CUDAGraph
    batches: Sequence[Batch]  # its own memory, from which it reads
    result: Tensor
    gradients: Sequence[Tensor | None]  # None where the work has used them up


class Captured:
    """Work on batches that is a pure function of tensors, by a CUDA graph from its second time on.

    The first time of each shape runs as usual, which warms up what may not be recorded, and is
    real work: nothing is done twice. What cannot be recorded goes on as usual, and one line says why.

    Args:
        work: no value of it may be asked for by the host, and it changes nothing but `parameters`, their
            gradients and an optimizer's tensors.
    """

    def __init__(self, work: Work, parameters: Sequence[nn.Parameter]):
        self.work = work
        self.parameters = parameters
        self.stream = _stream(torch.cuda.current_device())
        self.pool = torch.cuda.graph_pool_handle()
        self.recordings: dict[Hashable, Recording] = {}
        self.seen: set[Hashable] = set()
        self.given_up = False

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        shape = tuple(batch.form for batch in batches)
        if shape in self.recordings:
            return self._replay(self.recordings[shape], batches)
        if shape in self.seen and not self.given_up and len(self.recordings) < MOST:
            try:
                self.recordings[shape] = self._record(batches)
            except Exception as error:  # libraries below refuse in ways of their own
                self._give_up(error)
            else:
                return self._replay(self.recordings[shape], batches)
        self.seen.add(shape)
        return self._run(batches)

    def _run(self, batches: Sequence[Batch]) -> Tensor:
        """As usual, on the stream that is recorded later: autograd remembers where a parameter was used first."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.work(batches)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _record(self, batches: Sequence[Batch]) -> Recording:
        self._forget_gradients()
        torch.cuda.empty_cache()  # what the usual step has left is of no use to a graph, which has memory of its own
        graph, own = torch.cuda.CUDAGraph(), [batch.map(torch.clone) for batch in batches]
        with (
            _nothing_is_freed(),
            # NCCL's watchdog asks the device how it is all the time, which is no fault of this thread.
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = self.work(own)
        gradients = [parameter.grad for parameter in self.parameters]
        return Recording(graph, own, result, gradients)

    def _replay(self, recording: Recording, batches: Sequence[Batch]) -> Tensor:
        for own, new in zip(recording.batches, batches, strict=True):
            for kept, value in zip(own.tensors(), new.tensors(), strict=True):
                kept.copy_(value, non_blocking=True)
        recording.graph.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return recording.result

    def _give_up(self, error: Exception) -> None:
        self.given_up = True
        self._forget_gradients()
        _renew_generator()
        warn(f"the step runs as usual and not as one CUDA graph: {reason(error)}")

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


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
