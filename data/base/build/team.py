"""One process per accelerator: who am I, and what do we all agree on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Team:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device
    start: float = field(default_factory=time.time)

    @classmethod
    def join(cls, start: float) -> Team:
        """Read what the launcher put into the environment; alone without it."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=20))
        return cls(rank, size, device, start)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def elapsed(self) -> float:
        return time.time() - self.start

    def log(self, *words: object) -> None:
        if self.leads:
            print(f"[{self.elapsed():6.0f}s]", *words, flush=True)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, number: float) -> float:
        """The leader's number."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], device=self.device, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return shared.item()

    def share(self, count: int) -> slice:
        """This process's part of `count` things, the same length for all."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def average(self, gradients: list[Tensor]) -> None:
        """Replace gradients by their mean over all processes, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        pieces = flat.div_(self.size).split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [p.view(g.shape) for p, g in zip(pieces, gradients, strict=True)])

    def ticks(self, seconds: float, steps: int = 0, every: int = 10) -> Iterator[tuple[int, float]]:
        """(step, share of the time gone) until the leader's clock says `seconds`, or for `steps` steps.

        The clock starts after the first step, which compiles. All processes see the same shares, so that none
        waits for a step that another does not take.
        """
        step, gone, start = 0, 0.0, 0.0
        while True:
            yield step, gone
            step += 1
            if steps:
                gone = step / steps
            elif step == 1:
                self.wait()
                start = time.time()
            elif step % every == 0:
                gone = self.agree((time.time() - start) / seconds)
            if gone >= 1:
                return


def schedule(gone: float, step: int, warmup: int = 100, hold: float = 0.4) -> float:
    """Learning rate factor: a short warm-up, a plateau, then a straight line to zero at the end of the time."""
    return min(1.0, (step + 1) / warmup) * min(1.0, (1 - gone) / (1 - hold))


class Average:
    """An exponential moving average of a module's weights."""

    def __init__(self, module: nn.Module, limit: float = 0.999) -> None:
        self.module, self.limit, self.count = module, limit, 0
        self.weights = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.limit, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(list(self.weights.values()), [p.data for p in self.module.parameters()], 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict({**module.state_dict(), **self.weights})
