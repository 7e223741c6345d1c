"""One process per accelerator, and one that compiles ahead of them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable

import torch
from team import Team

Step = Callable[[], None]


def set_up(team: Team) -> None:
    """The same arithmetic in every process: the cache of compiled code is keyed by it."""
    torch.manual_seed(1 + team.rank)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def entry(rank: int, size: int, work: Callable[..., None], arguments: tuple) -> None:
    """A spawned process: its place in the team comes from the environment."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
    work(*arguments)


def compile_ahead(warm: Step) -> None:
    set_up(Team(0, 1, torch.device("cuda", 0)))
    warm()


def launch(work: Callable[..., None], arguments: tuple, prepare: Step, warm: Step | None) -> None:
    """Run `work(*arguments)` for every accelerator while `prepare` runs here; on the CPU, one after the other."""
    size = torch.cuda.device_count()
    if not size:
        prepare()
        return work(*arguments)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    spawn = multiprocessing.get_context("spawn")
    jobs = [spawn.Process(target=entry, args=(rank, size, work, arguments)) for rank in range(size)]
    ahead = [spawn.Process(target=compile_ahead, args=(warm,))] if warm else []
    for number, job in enumerate(jobs + ahead):  # each sees one accelerator, as number 0: all share compiled code
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % size)
        job.start()
    prepare()
    for job in jobs:
        job.join()
    if any(job.exitcode for job in jobs):
        raise SystemExit("a training process failed: see its log")
    return None
