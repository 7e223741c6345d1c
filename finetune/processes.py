"""What processes of one run do together. With one alone there is nothing to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed
from torch import Tensor

AT_ONCE = 2**25  # numbers that are sent together: enough to outweigh the way, and little memory


def average(parts: Sequence[Tensor]) -> None:
    """Each becomes its mean over all processes, in place. A CUDA graph can hold it."""
    if not _are_several():
        return
    for bucket in _buckets(parts):
        whole = torch.cat([part.flatten() for part in bucket])
        torch.distributed.all_reduce(whole)
        whole /= torch.distributed.get_world_size()
        means = whole.split([part.numel() for part in bucket])
        shaped = [mean.view_as(part) for mean, part in zip(means, bucket, strict=True)]
        torch._foreach_copy_(list(bucket), shaped)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def agree(parts: Sequence[Tensor]) -> None:
    """Each becomes what the main process has."""
    if _are_several():
        for part in parts:
            torch.distributed.broadcast(part.data, src=0)


def is_main() -> bool:
    """Whether this is the process that speaks for all."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _buckets(parts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In the given order, each bucket of one precision and, but for a single part, of at most so many numbers."""
    bucket: list[Tensor] = []
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
