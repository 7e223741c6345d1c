"""What processes of one run do together, on processes that are real."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from finetune import processes


def network() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(20, 3))
    net.register_parameter("apart", nn.Parameter(torch.ones(7)))  # has no part in the loss
    return net.to(memory_format=torch.channels_last)


def inputs(part: int) -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(part))


def do_its_share(process: int, at_once: int, folder: Path):
    """Of four parts, of which each process adds up two."""
    processes.AT_ONCE = at_once
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=process, world_size=2)
    net = network()
    sums = processes.Sums(list(net.parameters()))
    for _ in range(3):  # the first knows of no order yet
        net.zero_grad()
        net(inputs(2 * process)).square().mean().backward()
        with sums.summed():
            net(inputs(2 * process + 1)).square().mean().backward()
    torch.save({name: each.grad for name, each in net.named_parameters()}, folder / f"{process}.pt")
    whole = weakref.ref(net[0].weight.grad)
    net.zero_grad()
    assert is_gone(whole), "gradients stay until the next step"
    kept = weakref.ref(net[0].weight)
    del net, sums
    gc.collect()
    assert is_gone(kept), "a run that is over keeps its memory"
    torch.distributed.destroy_process_group()


def is_gone(what: weakref.ref[Tensor]) -> bool:
    """Soon, for a thread of gloo's lets go a moment after its work is done."""
    for _ in range(500):
        if what() is None:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("at_once", [1, 400, 2**25], ids=["each_by_itself", "some_together", "all_together"])
def test_gradients_are_the_sums_over_all_processes(at_once: int, tmp_path: Path):
    torch.multiprocessing.spawn(do_its_share, (at_once, tmp_path), nprocs=2)
    net = network()
    for part in range(4):
        net(inputs(part)).square().mean().backward()
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt")
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad)
            assert parameter.grad is None or found[name].stride() == parameter.grad.stride()
