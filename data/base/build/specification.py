"""What a picture shows, as data: layers, backdrop, caption and the facts that measurements are judged by."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scenes import PATTERNS, SCENE_NAMES
from torch import Tensor
from vocabulary import TREATMENT_NAMES

BACKDROPS = (*PATTERNS, *SCENE_NAMES)
MAX_LAYERS = 7


@dataclass(frozen=True)
class Layer:
    """One sprite in the picture.

    Attributes:
        scale: the sprite's half size where the picture's is 1.
        x, y: its centre, from -1 to 1, y down.
        turn: radians.
        tint: row of `TINTS` plus one, 0 for its own colours.
        clip: only what is below this y of the sprite's own box is drawn; -1 for all.
        shadow: strength of the shadow on the ground under it.
    """

    sprite: int
    scale: float
    x: float = 0.0
    y: float = 0.0
    turn: float = 0.0
    flip: bool = False
    tint: int = 0
    clip: float = -1.0
    shadow: float = 0.0


@dataclass
class Facts:
    """The truth about a picture, for judging pictures made from its caption. Empty where the caption says nothing."""

    thing: str = ""
    noun: str = ""
    count: int = 1
    colour: str = ""  # of the backdrop
    tint: str = ""  # of the thing
    scene: str = ""
    style: str = ""
    treatment: str = ""
    relation: str = ""


@dataclass
class Picture:
    """A picture before it is drawn."""

    layers: list[Layer]
    backdrop: str
    colours: tuple[int, int] = (0, 0)
    draws: tuple[float, ...] = (0.5,) * 8
    treatment: str = "none"
    caption: str = ""
    facts: Facts = field(default_factory=Facts)


LAYER_FIELDS = 9
GROUND_FIELDS = 12


def pack(pictures: list[Picture]) -> tuple[np.ndarray, np.ndarray]:
    """Layers float32 [n, MAX_LAYERS, 9] (sprite -1 where there is none) and grounds float32 [n, 12]."""
    layers = np.full((len(pictures), MAX_LAYERS, LAYER_FIELDS), -1, np.float32)
    grounds = np.empty((len(pictures), GROUND_FIELDS), np.float32)
    for row, picture in enumerate(pictures):
        for place, s in enumerate(picture.layers):
            layers[row, place] = (
                s.sprite,
                s.scale,
                s.x,
                s.y,
                s.turn,
                -1 if s.flip else 1,
                s.tint,
                s.clip,
                s.shadow,
            )
        kind, treatment = BACKDROPS.index(picture.backdrop), TREATMENT_NAMES.index(picture.treatment)
        grounds[row] = (kind, *picture.colours, treatment, *picture.draws)
    return layers, grounds


def unpack(layers: np.ndarray, grounds: np.ndarray, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """The arrays of `pack` as tensors on a device."""
    return torch.as_tensor(layers, device=device), torch.as_tensor(grounds, device=device)
