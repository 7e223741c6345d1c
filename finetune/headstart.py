"""While the libraries are imported, the base's files come from the disk, and what is not needed is left out."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any, cast

from finetune.outline import outline
from finetune.recipe import BaseConfig, Recipe
from finetune.schedule import OPTIMIZERS

# Two libraries ask for it as they are imported, and each answer reads what is said of all that is installed.
_distributions = cache(metadata.packages_distributions)
PIECE = 2**20  # bytes; of a wish for more the system fulfils a part
MOST = 0.5  # of the memory: what is read ahead of more would have to give way before it is used
READ = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors"  # and no variant, such as `model.fp16.safetensors`


@contextmanager
def head_start(base: BaseConfig) -> Iterator[None]:
    """`importing` the libraries of a run, with its base on the way into memory and the GPU awake."""
    for task in (partial(_read_ahead, base), _wake):
        Thread(target=task, daemon=True).start()
    with importing():
        yield


def unused(recipe: Recipe[Any]) -> list[str]:
    """Libraries that others import wherever they are, and that a run of the recipe does without.

    Of bitsandbytes that saves a fifth of all imports, as it brings a compiler.
    """
    optimizer = OPTIMIZERS.get(recipe.train.optimizer, recipe.train.optimizer)
    packs = recipe.base.quantize in ("nf4", "int8") or not optimizer.startswith(("torch.optim.", "prodigyopt."))
    return ["sklearn"] if packs else ["sklearn", "bitsandbytes"]


@contextmanager
def hidden(libraries: Sequence[str]) -> Iterator[None]:
    """As if they were not installed; they can be imported afterwards."""
    known: dict[str, object] = cast(Any, sys.modules)
    absent = dict.fromkeys(library for library in libraries if library not in known)
    known.update(absent)
    try:
        yield
    finally:
        for library in absent:
            del known[library]


@contextmanager
def importing() -> Iterator[None]:
    """What is imported stays, so Python need not look for garbage in it: not meanwhile, not later, not at the end.

    It would each time that there is a quarter more to look through, and then again in the middle of steps.
    """
    metadata.packages_distributions = _distributions
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def weights(base: BaseConfig) -> list[Path]:
    """The files that are read to load a base, as far as it is on this machine."""
    if base.is_single_file:
        return [Path(base.source)]
    if (found := outline(base)) is None:
        return []
    parts = [part for part in found.index if found.has(part) and part not in found.stated["without"]]
    files = (file for part in parts for file in sorted((found.weights / part).glob("*.safetensors")))
    return [file for file in files if re.fullmatch(READ, file.name)]


def _read_ahead(base: BaseConfig) -> None:
    """Wish for all of a base at once: read as its pages are touched, one after the other, it takes longer."""
    with contextlib.suppress(OSError):
        sizes = {file: file.stat().st_size for file in weights(base)}
        if sys.platform != "linux" or sum(sizes.values()) > MOST * _memory():
            return
        for file, size in sizes.items():
            with file.open("rb") as stream:
                for place in range(0, size, PIECE):
                    os.posix_fadvise(stream.fileno(), place, PIECE, os.POSIX_FADV_WILLNEED)


def _wake() -> None:
    """Have the GPU's libraries loaded, which takes seconds that need no Python, by one operation of each kind."""
    import torch

    from finetune.gpu import has_kernels

    with contextlib.suppress(RuntimeError):  # what is wrong with the GPU is said by the run itself
        if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("false", "0", "no"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            for dtype in (torch.bfloat16, torch.float32):
                pixels = torch.zeros(1, 8, 8, 8, device=device, dtype=dtype, requires_grad=True)
                kernel = torch.zeros(8, 8, 3, 3, device=device, dtype=dtype)
                torch.conv2d(pixels, kernel).flatten(1).mm(kernel.view(288, 2)).sum().backward()
            with torch.cuda.device(device):
                has_kernels()  # Triton reads all of itself before its first one


def _memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
