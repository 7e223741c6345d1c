"""What a frozen encoder says, computed once, in groups of one size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from tqdm import tqdm

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
R = TypeVar("R")

KEPT_BYTES = 4 * 2**30


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

    def fill(self, wanted: Mapping[K, V], *, title: str | None = None) -> bool:
        """Encode all that is not kept yet. False where there is no room for all: they are encoded when asked for.

        Args:
            title: of a progress bar.
        """
        new = [key for key in wanted if key not in self.kept]
        with tqdm(total=len(new), desc=title, disable=title is None, leave=False) as bar:
            for group in self._groups({key: wanted[key] for key in new}):
                found = self._encode_group(group)
                if self._size(next(iter(found.values()))) * len(wanted) > KEPT_BYTES:
                    return False
                self.kept |= found
                bar.update(len(found))
        return True

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
