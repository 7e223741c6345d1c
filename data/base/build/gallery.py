"""The pictures that training samples from: drawn once by worker processes, painted once, kept on the accelerator."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from composer import Composer
from edits import draw_edits
from scenes import SCENE_NAMES
from settings import Settings
from specification import Picture, pack
from sprites import Sprite
from team import Team
from tokens import encode
from torch import Tensor
from vocabulary import COLOURS, STYLES
from world import World

CHUNK = 2000
COLOUR_NAMES, STYLE_NAMES = list(COLOURS), list(STYLES.values())
JUDGED = ("colour", "count", "scene", "style")


def truths(picture: Picture) -> list[int]:
    """(backdrop colour, count, scene, style) as class numbers, -1 where the caption does not say."""
    facts = picture.facts
    index = lambda names, name: names.index(name) if name in names else -1  # noqa: E731
    count = facts.count - 1 if not facts.relation else -1
    return [index(COLOUR_NAMES, facts.colour), count, index(SCENE_NAMES, facts.scene), index(STYLE_NAMES, facts.style)]


def draw_chunk(job: tuple[list[Sprite], int, int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """One worker's pictures: packed layers, grounds, captions."""
    sprites, seed, count = job
    world, rng = World(sprites), Random(seed)
    pictures = [world.picture(rng) for _ in range(count)]
    return (*pack(pictures), [p.caption for p in pictures])


def draw_pairs(job: tuple[list[Sprite], int, int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """One worker's edits: packed sources and, after all of them, packed targets; instructions."""
    edits = draw_edits(*job)
    return (*pack([e.source for e in edits] + [e.target for e in edits]), [e.instruction for e in edits])


def draw_specifications(
    sprites: list[Sprite], count: int, settings: Settings, tokenizer, path: Path, draw=draw_chunk, seed: int = 1000
) -> None:
    """Specifications and token ids in one .npz: layers [k, n, ...] and grounds [k, n, 12], k = 2 for pairs, else 1.

    Workers are forked, before any accelerator is touched.
    """
    chunks = [(sprites, seed + i, min(CHUNK, count - i)) for i in range(0, count, CHUNK)]
    if settings.workers > 1:
        with multiprocessing.get_context("fork").Pool(settings.workers) as pool:
            parts = pool.map(draw, chunks, chunksize=1)
    else:
        parts = [draw(chunk) for chunk in chunks]
    captions = [caption for part in parts for caption in part[2]]
    ids = np.concatenate([encode(tokenizer, captions[i : i + 20_000]) for i in range(0, len(captions), 20_000)])
    layers, grounds = ([part[i].reshape(-1, len(part[2]), *part[i].shape[1:]) for part in parts] for i in range(2))
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, ids=ids, layers=np.concatenate(layers, 1), grounds=np.concatenate(grounds, 1))
    partial.rename(path)


@dataclass
class Gallery:
    """This process's share of the pictures.

    Attributes:
        pictures: uint8 [n, 3, h, w].
        ids: token ids int16 [n, 77].
    """

    pictures: Tensor
    ids: Tensor

    @classmethod
    def paint(cls, path: Path, composer: Composer, team: Team, batch: int = 256) -> Gallery:
        """Pictures with the same backdrop are painted together: thousands of small kernels fewer."""
        stored = np.load(path)
        mine = team.share(len(stored["ids"]))
        layers, grounds, ids = stored["layers"][0, mine], stored["grounds"][0, mine], stored["ids"][mine]
        order = np.argsort(grounds[:, 0], kind="stable")
        layers, grounds, ids = layers[order], grounds[order], ids[order]
        size = composer.size
        pictures = torch.empty(len(ids), 3, size, size, dtype=torch.uint8, device=team.device)
        for i in range(0, len(ids), batch):
            part = [torch.as_tensor(a[i : i + batch]).to(team.device, non_blocking=True) for a in (layers, grounds)]
            pictures[i : i + batch] = (composer.compose(*part) * 255).round().byte()
        return cls(pictures, torch.as_tensor(ids).to(team.device))

    def __len__(self) -> int:
        return len(self.ids)

    def some(self, count: int) -> Tensor:
        """Random row numbers."""
        return torch.randint(0, len(self), (count,), device=self.ids.device)

    def whole(self, rows: Tensor) -> Tensor:
        """[n, 3, h, w] from -1 to 1."""
        return self.pictures[rows].float() / 127.5 - 1

    def small(self, rows: Tensor, size: int) -> Tensor:
        """Averaged down to `size`, from -1 to 1."""
        return F.avg_pool2d(self.whole(rows), self.pictures.shape[-1] // size)
