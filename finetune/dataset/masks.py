"""Which part of a picture is learnt: the white of a mask beside it, or what is not transparent in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from finetune.dataset.pixels import Size, read_alpha, read_mask

ENDING = ".mask"  # of a mask's stem: dog.mask.png belongs to dog.jpg


def is_mask(path: Path) -> bool:
    return path.stem.lower().endswith(ENDING)


def pair(pictures: Iterable[Path], masks: Sequence[Path], wanted: bool, problems: list[str]) -> dict[Path, Path]:
    """Each picture's mask, of those that have one.

    Args:
        wanted: whether masks beside pictures are asked for at all.
    """
    owners: defaultdict[Path, list[Path]] = defaultdict(list)
    for picture in pictures:
        owners[picture.with_suffix("")].append(picture)
    found: dict[Path, Path] = {}
    for mask in masks:
        owned = owners.get(mask.with_name(mask.stem[: -len(ENDING)]), [])
        if not wanted:
            problems.append(f"{mask}: is named as a mask. Set dataset.mask: file, or give it another name.")
        elif not owned:
            problems.append(f"{mask}: belongs to no picture. Give it the name of one, or remove it.")
        for picture in owned:
            if picture in found:
                problems.append(f"{picture}: has the masks {found[picture].name} and {mask.name}. Keep one of them.")
            found[picture] = mask
    return found


def check(content: bytes, size: Size, *, alpha: bool) -> bool:
    """Whether there is a mask; none is where a picture is all opaque.

    Raises:
        ValueError: it is of another size than its picture, or nothing would be learnt.
    """
    mask = read_alpha(content) if alpha else read_mask(content)
    if mask is None:
        return False
    if mask.size != size:
        raise ValueError(f"is {mask.width} x {mask.height}, and its picture {size[0]} x {size[1]}. Make it as large.")
    if not np.asarray(mask).any():
        raise ValueError(f"is {'transparent' if alpha else 'black'} all over, so nothing would be learnt. Remove it.")
    return True
