"""What a frozen encoder says, computed once, in groups of one size; in memory, or in a file where it is much."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
R = TypeVar("R")

IN_MEMORY = 4 * 2**30  # bytes of one cache
OF_DISK = 0.5  # of what is free where temporary files are
SEGMENT = 2**28  # bytes of a file
ALIGNED = 64  # bytes, as torch has its own tensors


class Cache(Generic[K, V, R]):
    """Results by all that they depend on, so that neither a shuffle nor a renamed file can match them up wrongly.

    Groups are filled up to one size: what an encoder says of an item may depend on the
    group's size in the last bit, and a run that is continued groups what is left anew.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[V]], Sequence[R]],
        size: Callable[[R], int],
        group: int,
        kind: Callable[[V], Hashable] = lambda _: None,
    ):
        self.kept: dict[K, R] = {}
        self._encode = encode
        self._size = size  # bytes of a result
        self._group = group
        self._kind = kind  # what all of a group must have in common
        self._shelf = Shelf()

    def fill(self, wanted: Mapping[K, V], *, title: str | None = None) -> bool:
        """Encode all that is not kept yet. False where there is room for all neither in memory nor in a file.

        What is not kept is encoded when it is asked for.

        Args:
            title: of a progress bar.
        """
        new = [key for key in wanted if key not in self.kept]
        with tqdm(total=len(new), desc=title, disable=title is None, leave=False) as bar:
            for group in self._groups({key: wanted[key] for key in new}):
                found = self._encode_group(group)
                whole = self._size(next(iter(found.values()))) * len(wanted)
                if whole > IN_MEMORY and (found := self._laid(found, whole)) is None:
                    return False
                self.kept |= found
                bar.update(len(found))
        return True

    def _laid(self, found: dict[K, R], whole: int) -> dict[K, R] | None:
        """The results in a file; None where that would leave the disk too full."""
        if whole > OF_DISK * (shutil.disk_usage(tempfile.gettempdir()).free + self._shelf.num_bytes):
            return None
        try:
            return {key: self._shelf.lay(result) for key, result in found.items()}
        except OSError:  # others have filled it up
            return None

    def get(self, wanted: Mapping[K, V]) -> dict[K, R]:
        """The results, each kept or encoded now."""
        found = {key: self.kept[key] for key in wanted if key in self.kept}
        for group in self._groups({key: value for key, value in wanted.items() if key not in found}):
            found |= self._encode_group(group)
        return found

    def _groups(self, items: Mapping[K, V]) -> Iterator[dict[K, V]]:
        kinds: dict[Hashable, dict[K, V]] = {}
        for key, value in items.items():
            kinds.setdefault(self._kind(value), {})[key] = value
        for alike in kinds.values():
            keys = list(alike)
            for start in range(0, len(keys), self._group):
                yield {key: alike[key] for key in keys[start : start + self._group]}

    def _encode_group(self, items: Mapping[K, V]) -> dict[K, R]:
        values = list(items.values())
        results = self._encode(values + values[-1:] * (self._group - len(values)))
        return dict(zip(items, results, strict=False))


class Shelf:
    """Tensors in files without a name, which are gone with the process.

    They are mapped into memory, so the system reads them as they are used, and forgets them as it needs the room.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._segment, self._used = np.empty(0, np.uint8), 0

    def lay(self, result: Any) -> Any:
        """The same tensor in a file, or the same of what has several and maps them.

        Raises:
            OSError: the disk is full.
        """
        if not isinstance(result, Tensor):
            return result.map(self.lay)
        size = result.nbytes
        if self._used + size > len(self._segment):
            self._segment, self._used = _segment(max(size, SEGMENT)), 0
            self.num_bytes += len(self._segment)
        place = torch.from_numpy(self._segment[self._used : self._used + size])
        self._used += -(-size // ALIGNED) * ALIGNED
        return place.view(result.dtype).view(result.shape).copy_(result)


def _segment(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # where room is only promised, a full disk ends the process
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, np.uint8, "r+", shape=(size,))
