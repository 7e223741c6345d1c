"""Where things stand: arrangements of sprites that mean what their caption says."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

from scenes import SCENES, horizon
from specification import Layer
from sprites import Sprite
from vocabulary import CONTAINERS, WEARABLES


@dataclass(frozen=True)
class Place:
    """A backdrop as the arrangements see it: the y of the ground that things stand on (None: they float)."""

    ground: float | None
    shadow: float

    @classmethod
    def of(cls, backdrop: str, draws: tuple[float, ...], rng: Random) -> Place:
        if backdrop not in SCENES:
            return cls(None, rng.choice((0.0, 0.16)) if backdrop in ("plain", "gradient") else 0.0)
        if SCENES[backdrop].horizon is None:
            return cls(None, 0.0)
        line = horizon(backdrop, draws[0])
        return cls(rng.uniform(min(line + 0.28, 0.86), 0.92), 0.34)


@dataclass(frozen=True)
class Arranger:
    """Puts sprites into a place. `sprites` are the world's, an index names one."""

    sprites: list[Sprite]
    place: Place
    rng: Random

    def jitter(self, reach: float) -> float:
        return self.rng.uniform(-reach, reach)

    def stand(self, index: int, scale: float, x: float, foot: float, shadow: float | None = None, **kw) -> Layer:
        """A sprite whose drawn part is centred at x and ends at y = foot."""
        left, _, right, bottom = self.sprites[index].box
        strength = self.place.shadow if shadow is None else shadow
        return Layer(index, scale, x - scale * (left + right) / 2, foot - scale * bottom, shadow=strength, **kw)

    def height(self, index: int) -> float:
        _, top, _, bottom = self.sprites[index].box
        return bottom - top

    def foot(self, index: int, scale: float) -> float:
        """The ground, or a foot that leaves a floating sprite near the middle."""
        tall = scale * self.height(index)
        if self.place.ground is not None:
            return max(self.place.ground, min(tall - 0.96, 0.97))
        room = max(0.0, 0.96 - tall / 2)
        return tall / 2 + self.jitter(room * 0.6)

    def single(self, index: int, scale: float, tint: int = 0, upside_down: bool = False) -> list[Layer]:
        foot, reach = self.foot(index, scale), max(0.0, 0.9 - scale) * 0.75
        turn = math.pi if upside_down else self.jitter(0.22) if self.rng.random() < 0.35 else 0.0
        flip = self.rng.random() < 0.3
        layer = self.stand(index, scale, self.jitter(reach), foot, turn=turn, flip=flip, tint=tint)
        return [layer]

    def close_up(self, index: int, tint: int = 0) -> list[Layer]:
        """So near that the picture's edges cut it."""
        return [Layer(index, self.rng.uniform(1.2, 1.5), self.jitter(0.25), self.jitter(0.25), tint=tint)]

    def several(self, index: int, number: int, tint: int = 0) -> list[Layer]:
        """2 to 6 of the same, in one or two rows, the back row first."""
        scale = {2: 0.42, 3: 0.32, 4: 0.32, 5: 0.28, 6: 0.28}[number] * self.rng.uniform(0.9, 1.05)
        rows = [number] if number <= 3 else [number // 2, number - number // 2]
        tall = scale * self.height(index)
        last = (
            self.foot(index, scale)
            if self.place.ground is not None
            else tall / 2 + (0.48 if len(rows) > 1 else self.jitter(0.3))
        )
        layers = []
        for row, count in enumerate(rows):
            gap = {1: 0.0, 2: 0.98, 3: 0.64}[count] * self.rng.uniform(0.94, 1.0)
            foot = last - (len(rows) - 1 - row) * max(0.62, tall * 1.06)
            for i in range(count):
                x = (i - (count - 1) / 2) * gap + self.jitter(0.02)
                layers.append(self.stand(index, scale, x, foot + self.jitter(0.03), tint=tint))
        return layers

    def beside(self, left: int, right: int) -> list[Layer]:
        scale = self.rng.uniform(0.36, 0.46)
        foot = max(self.foot(left, scale), self.foot(right, scale))
        other = foot if self.place.ground is not None else self.foot(right, scale)
        gap = self.rng.uniform(0.44, 0.5)
        return [
            self.stand(left, scale, -gap, foot),
            self.stand(right, scale * self.rng.uniform(0.9, 1.1), gap, other),
        ]

    def stacked(self, upper: int, lower: int) -> list[Layer]:
        scale, small = self.rng.uniform(0.44, 0.5), self.rng.uniform(0.34, 0.4)
        x = self.jitter(0.25)
        foot = max(self.foot(lower, scale), 0.8) if self.place.ground is not None else 0.9
        base = self.stand(lower, scale, x, foot)
        top = base.y + scale * self.sprites[lower].crown
        return [base, self.stand(upper, small, x + self.jitter(0.05), top + 0.07 * small, shadow=0.0)]

    def overlapped(self, front: int, back: int) -> list[Layer]:
        side = self.rng.choice((-1, 1))
        big, small = self.rng.uniform(0.56, 0.64), self.rng.uniform(0.38, 0.44)
        foot = self.foot(back, big) if self.place.ground is not None else 0.6
        behind = self.stand(back, big, side * 0.22, min(foot, 0.8))
        return [behind, self.stand(front, small, side * -0.22, min(foot, 0.8) + 0.14)]

    def between(self, middle: int, sides: int) -> list[Layer]:
        scale = self.rng.uniform(0.29, 0.33)
        foot = self.foot(middle, scale) if self.place.ground is not None else 0.35 + self.jitter(0.2)
        outer = [self.stand(sides, scale, x, foot) for x in (-0.64, 0.64)]
        return [*outer, self.stand(middle, scale, 0.0, foot)]

    def inside(self, index: int, container: int) -> list[Layer]:
        """The container, the thing, and the container's front again."""
        _, floor, front = CONTAINERS[self.sprites[container].label]
        scale, x = self.rng.uniform(0.56, 0.64), self.jitter(0.2)
        base = self.stand(container, scale, x, max(self.foot(container, scale), 0.8))
        _, top, _, bottom = self.sprites[container].box
        level = lambda share: (top + bottom) / 2 + share * (bottom - top) / 2  # noqa: E731
        thing = self.stand(index, scale * 0.58, x, base.y + scale * level(floor), shadow=0.0)
        cover = Layer(container, scale, base.x, base.y, clip=level(front))
        return [base, thing, cover]

    def holding(self, holder: int, thing: int, tint: int = 0) -> list[Layer]:
        scale, side = self.rng.uniform(0.5, 0.6), self.rng.choice((-1, 1))
        body = self.stand(holder, scale, -side * 0.16, self.foot(holder, scale), tint=tint)
        left, _, right, bottom = self.sprites[holder].box
        x = -side * 0.16 + side * scale * (right - left) / 2 * 0.86
        foot = body.y + scale * (bottom - 0.12 * self.height(holder)) + 0.04
        return [body, self.stand(thing, scale * 0.5, x, foot, shadow=0.0)]

    def wearing(self, wearer: int, item: int, tint: int = 0, scale: float | None = None) -> list[Layer]:
        scale = scale or self.rng.uniform(0.48, 0.62)
        _, where, share = WEARABLES[self.sprites[item].label]
        left, top, right, bottom = self.sprites[wearer].box
        foot = self.foot(wearer, scale)
        if self.place.ground is None and where == "top":
            foot = max(foot, scale * self.height(wearer) - 0.5)
        body = self.stand(wearer, scale, self.jitter(0.2), min(foot, 0.95), tint=tint)
        wide = self.sprites[item].box[2] - self.sprites[item].box[0]
        size = share * scale * (right - left) / wide
        tall, x = size * self.height(item), body.x + scale * (left + right) / 2
        if where == "top":
            end = body.y + scale * self.sprites[wearer].crown + 0.3 * tall
        else:
            end = body.y + scale * ((top + bottom) / 2 - 0.06 * (bottom - top)) + tall / 2
        return _inside_the_picture([body, self.stand(item, size, x, end, shadow=0.0)], end - tall, end)


def _inside_the_picture(layers: list[Layer], top: float, bottom: float) -> list[Layer]:
    """The layers moved up or down together, so that what spans top to bottom is not cut off."""
    move = max(0.0, -0.97 - top) - max(0.0, bottom - 0.97)
    return [replace(layer, y=layer.y + move) for layer in layers]
