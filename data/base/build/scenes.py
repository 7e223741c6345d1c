"""The places of the world: how they are said, where things stand in them, and in what light."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import brushes as b
import landscapes as paint
import torch
from brushes import mix
from torch import Tensor

Paint = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scene:
    """A place.

    Attributes:
        phrases: ways to say it, after the thing.
        paint: (x, y, horizon, draws [n, 8, 1, 1, 1]) -> [n, 3, h, w].
        horizon: range of the horizon's y; things stand below it. None: things float.
        light: what colours are multiplied by.
    """

    phrases: tuple[str, ...]
    paint: Paint
    horizon: tuple[float, float] | None = (0.1, 0.4)
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)


SCENES = {
    "meadow": Scene(("in a meadow", "on the grass", "in a green field"), paint.meadow),
    "beach": Scene(("on the beach", "at the beach", "by the sea"), paint.beach, (0.2, 0.42)),
    "snow": Scene(("in the snow", "on a snowy hill", "in winter"), paint.snow),
    "night": Scene(("at night", "under the stars", "in the moonlight"), paint.night, light=(0.78, 0.82, 1.0)),
    "desert": Scene(("in the desert", "on a sand dune"), paint.desert, light=(1.04, 0.99, 0.92)),
    "sunset": Scene(
        ("at sunset", "at dusk", "in front of the setting sun"), paint.sunset, (0.15, 0.35), (1.04, 0.88, 0.82)
    ),
    "under water": Scene(
        ("under water", "in the deep sea", "at the bottom of the sea"), paint.under_water, None, (0.84, 0.96, 1.04)
    ),
    "sky": Scene(("in the sky", "among the clouds"), paint.sky, None),
    "forest": Scene(("in a forest", "in the woods", "among the trees"), paint.forest, light=(0.96, 1.0, 0.95)),
    "city": Scene(("in the city", "in front of a skyline", "on a street"), paint.city, (0.15, 0.35)),
    "mountains": Scene(("in the mountains", "in front of mountains"), paint.mountains),
    "space": Scene(("in space", "in outer space"), paint.space, None, (0.94, 0.92, 1.02)),
    "rain": Scene(("in the rain", "on a rainy day"), paint.rain, light=(0.88, 0.92, 0.97)),
    "room": Scene(("in a room", "at home", "in a living room"), paint.room, (0.3, 0.5)),
    "table": Scene(("on a table", "on a wooden table"), paint.table, (0.1, 0.35)),
    "stage": Scene(("on a stage", "in the spotlight"), paint.stage, (0.25, 0.45), (1.03, 0.98, 0.9)),
    "garden": Scene(("in a garden", "among flowers"), paint.garden),
    "lake": Scene(("by a lake", "at the lake"), paint.lake),
    "autumn": Scene(("in autumn", "in an autumn park"), paint.autumn, light=(1.03, 0.98, 0.92)),
    "moon": Scene(("on the moon",), paint.moon, light=(0.92, 0.93, 1.0)),
    "volcano": Scene(("in front of a volcano", "near a volcano"), paint.volcano, (0.25, 0.45), (1.04, 0.86, 0.8)),
    "rainbow": Scene(("under a rainbow", "in front of a rainbow"), paint.rainbow, (0.3, 0.5)),
    "aurora": Scene(("under the northern lights",), paint.aurora, light=(0.8, 0.94, 0.98)),
    "party": Scene(("at a party", "at a birthday party"), paint.party, (0.45, 0.6)),
}
SCENE_NAMES = list(SCENES)


def horizon(name: str, draw: float) -> float:
    """The y of the scene's horizon for a draw from 0 to 1; floating scenes have theirs out of the picture."""
    span = SCENES[name].horizon
    return 1.0 if span is None else span[0] + (span[1] - span[0]) * draw


def paint_scene(name: str, draws: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[n, 3, h, w] in 0..1 from draws [n, 8]; the first draw sets the horizon."""
    low, high = SCENES[name].horizon or (1.0, 1.0)
    line = (low + (high - low) * draws[:, 0]).view(-1, 1, 1, 1)
    picture = SCENES[name].paint(x, y, line, draws.view(-1, 8, 1, 1, 1))
    return picture.expand(draws.shape[0], 3, y.shape[-2], x.shape[-1]).clamp(0, 1)


PATTERNS = ("plain", "striped", "dotted", "checkered", "gradient")


def paint_pattern(name: str, first: Tensor, second: Tensor, draws: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A studio backdrop in one or two colours ([n, 3] each); plain ones fall off a little towards the floor."""
    one, two = first.view(-1, 3, 1, 1), second.view(-1, 3, 1, 1)
    d = draws.view(-1, 8, 1, 1, 1)
    if name == "plain":
        return one * (1 - 0.07 * ((y + 0.2).clamp(0, 1)) * d[:, 1]).expand(-1, 3, y.shape[-2], x.shape[-1])
    if name == "gradient":
        return mix(one, two, (y + 1) / 2 + 0 * x)
    across = torch.where(d[:, 1] > 0.5, x + 0 * y, y + 0 * x)
    if name == "striped":
        return mix(one, two, b.fill(((across * 2) % 1 - 0.5).abs() / 2 - 0.125, y))
    cx, cy = ((x * 3) % 1 - 0.5) / 3, ((y * 3) % 1 - 0.5) / 3
    if name == "dotted":
        return mix(one, two, b.disk(cx, cy, 0.0, 0.0, 0.09))
    odd = ((x * 2).floor() + (y * 2).floor()) % 2
    return mix(one, two, odd)
