"""How each place of the world looks: one function a place, from eight draws.

Every function takes x [1, 1, 1, w] and y [1, 1, h, 1] from -1 to 1 (y down), the horizon h [n, 1, 1, 1] and the draws
d [n, 8, 1, 1, 1] from 0 to 1, and returns [n, 3, h, w]. Smooth shapes only: an autoencoder blurs speckle into dirt.
"""

from __future__ import annotations

import brushes as b
import torch
from brushes import mix, rgb
from torch import Tensor


def _sky(y: Tensor, horizon: Tensor) -> Tensor:
    return b.fade(y, rgb(92, 170, 244, y), rgb(206, 234, 252, y), end=horizon)


def _two_clouds(x: Tensor, y: Tensor, d: Tensor, size: float = 0.3) -> Tensor:
    first = b.cloud(x, y, d[:, 2] * 2 - 1, -0.78 + d[:, 3] * 0.25, size)
    return torch.maximum(first, b.cloud(x, y, (d[:, 2] * 2 + 1.1) % 2.4 - 1.2, -0.5 + d[:, 4] * 0.25, size * 0.7))


def meadow(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = mix(_sky(y, h), rgb(255, 255, 255, y), _two_clouds(x, y, d) * 0.9)
    out = mix(out, rgb(146, 206, 118, y), b.below(y, b.hill(x, h - 0.1, 0.07, 2.4, d[:, 1])))
    return mix(
        out,
        b.fade(y, rgb(112, 190, 84, y), rgb(66, 150, 62, y), 0.0),
        b.below(y, b.hill(x, h, 0.04, 1.6, d[:, 5])),
    )


def beach(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = mix(_sky(y, h - 0.3), rgb(255, 255, 255, y), _two_clouds(x, y, d) * 0.9)
    sea = b.fade(y, rgb(36, 130, 200, y), rgb(92, 200, 222, y), -0.3, h)
    out = mix(out, sea, b.below(y, h - 0.32))
    shore = b.hill(x, h, 0.025, 3.0, d[:, 1])
    out = mix(out, rgb(240, 252, 252, y), b.below(y, shore - 0.05))
    return mix(out, b.fade(y, rgb(246, 222, 166, y), rgb(232, 196, 130, y), 0.0), b.below(y, shore))


def snow(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(150, 184, 220, y), rgb(222, 234, 246, y), end=h)
    out = mix(out, rgb(214, 228, 242, y), b.below(y, b.hill(x, h - 0.12, 0.07, 2.2, d[:, 1])))
    for i, (cx, _) in enumerate(b.scatter(d, 2)):
        out = mix(out, rgb(74, 118, 124, y), b.pine(x, y, cx, h + 0.06, 0.4 + 0.1 * i))
    out = mix(
        out,
        b.fade(y, rgb(250, 252, 255, y), rgb(218, 230, 246, y), 0.1),
        b.below(y, b.hill(x, h, 0.03, 1.8, d[:, 5])),
    )
    for cx, cy in b.scatter(d, 12):
        out = mix(out, rgb(255, 255, 255, y), b.disk(x, y, cx, cy, 0.026))
    return out


def _stars(out: Tensor, x: Tensor, y: Tensor, d: Tensor, number: int) -> Tensor:
    for i, (cx, cy) in enumerate(b.scatter(d, number)):
        out = mix(out, rgb(255, 250, 214, y), b.disk(x, y, cx, cy, 0.014 + 0.008 * (i % 3)))
    return out


def night(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = _stars(b.fade(y, rgb(14, 18, 58, y), rgb(58, 66, 132, y), end=h), x, y, d, 14)
    mx, my = d[:, 2] * 1.5 - 0.75, -0.68 + d[:, 3] * 0.2
    out = mix(out, rgb(255, 244, 196, y), b.glow(x, y, mx, my, 0.36) * 0.3)
    moon = b.disk(x, y, mx, my, 0.19) * (1 - b.disk(x, y, mx + 0.1, my - 0.05, 0.17))
    out = mix(out, rgb(255, 240, 190, y), moon)
    out = mix(out, rgb(34, 44, 92, y), b.below(y, b.hill(x, h - 0.09, 0.07, 2.1, d[:, 1])))
    return mix(
        out,
        b.fade(y, rgb(30, 54, 74, y), rgb(16, 30, 48, y), 0.1),
        b.below(y, b.hill(x, h, 0.03, 1.7, d[:, 5])),
    )


def desert(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(116, 190, 232, y), rgb(252, 232, 190, y), end=h)
    out = mix(out, rgb(255, 246, 200, y), b.disk(x, y, d[:, 2] * 1.4 - 0.7, -0.65 + d[:, 3] * 0.2, 0.16))
    out = mix(out, rgb(232, 178, 106, y), b.below(y, b.hill(x, h - 0.12, 0.1, 1.9, d[:, 1])))
    out = mix(out, rgb(220, 158, 86, y), b.below(y, b.hill(x, h - 0.02, 0.06, 2.6, d[:, 4])))
    return mix(
        out,
        b.fade(y, rgb(240, 190, 114, y), rgb(216, 150, 78, y), 0.1),
        b.below(y, b.hill(x, h + 0.06, 0.03, 1.5, d[:, 5])),
    )


def sunset(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(94, 60, 140, y), rgb(255, 120, 92, y), end=h - 0.3)
    out = mix(out, rgb(255, 206, 110, y), ((y - h + 0.5) / 0.5).clamp(0, 1) * 0.85)
    sx = d[:, 2] * 1.2 - 0.6
    out = mix(out, rgb(255, 236, 160, y), b.glow(x, y, sx, h - 0.16, 0.5) * 0.5)
    out = mix(out, rgb(255, 240, 170, y), b.disk(x, y, sx, h - 0.16, 0.2))
    sea = b.fade(y, rgb(240, 138, 104, y), rgb(96, 62, 124, y), 0.0, 0.9)
    sea = mix(sea, rgb(255, 214, 130, y), b.glow(x, y * 0.3, sx, h * 0.3, 0.16) * 0.5)
    return mix(out, sea, b.below(y, h - 0.1))


def under_water(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(84, 200, 226, y), rgb(16, 74, 142, y))
    for i in range(3):
        beam = (x - (d[:, 2] * 1.6 - 0.8 + 0.5 * i - 0.5) + (y + 1) * 0.35).abs() - 0.07 * (y + 1.6)
        out = mix(out, rgb(190, 240, 248, y), b.fill(beam, y, 12) * (0.22 * (0.6 - y)).clamp(0, 0.3))
    for i, (cx, cy) in enumerate(b.scatter(d, 7)):
        out = mix(out, rgb(206, 242, 250, y), b.disk(x, y, cx, cy, 0.03 + 0.012 * (i % 3)) * 0.75)
    return mix(
        out,
        b.fade(y, rgb(206, 192, 140, y), rgb(150, 146, 118, y), 0.7),
        b.below(y, b.hill(x, 0.8, 0.04, 2.4, d[:, 1])),
    )


def sky(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(80, 162, 242, y), rgb(190, 226, 252, y))
    for i, (cx, cy) in enumerate(b.scatter(d, 5)):
        out = mix(out, rgb(255, 255, 255, y), b.cloud(x, y, cx, cy, 0.26 + 0.08 * (i % 3)) * 0.92)
    return out


def forest(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(196, 228, 220, y), rgb(232, 244, 214, y), end=h)
    for row, (colour, size) in enumerate((((132, 182, 156), 0.8), ((74, 142, 106), 0.95), ((38, 104, 74), 1.0))):
        for i in range(4):
            cx = (d[:, 1 + row] * 2.4 + i * 0.62 + row * 0.2) % 2.5 - 1.25
            out = mix(out, rgb(*colour, y), b.pine(x, y, cx, h + 0.02 * row, size * (0.85 + 0.15 * ((i + row) % 2))))
    return mix(
        out,
        b.fade(y, rgb(96, 148, 74, y), rgb(58, 104, 52, y), 0.1),
        b.below(y, b.hill(x, h, 0.02, 2.0, d[:, 5])),
    )


def city(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = mix(_sky(y, h), rgb(255, 255, 255, y), _two_clouds(x, y, d, 0.24) * 0.8)
    for row, colour in enumerate(((166, 184, 208), (112, 132, 168))):
        for i in range(5):
            cx = (i - 2) * 0.48 + d[:, 1 + row] * 0.3 - 0.15 + 0.22 * row
            top = h - 0.3 - 0.55 * ((d[:, 3 + row] + i * 0.618) % 1) + 0.2 * row
            tower = b.box(x, y, cx, (top + h + 0.1) / 2, 0.17, (h + 0.1 - top) / 2)
            out = mix(out, rgb(*colour, y), tower)
            if row:
                panes = b.box(((x - cx + 2) % 0.11) - 0.055, ((y + 2) % 0.13) - 0.065, 0, 0, 0.026, 0.034)
                inside = b.box(x, y, cx, (top + h + 0.1) / 2, 0.135, (h + 0.1 - top) / 2 - 0.04)
                out = mix(out, rgb(252, 232, 160, y), panes * inside * 0.9)
    out = mix(out, rgb(190, 192, 198, y), b.below(y, h))
    return mix(out, b.fade(y, rgb(104, 108, 120, y), rgb(78, 82, 94, y), 0.1), b.below(y, h + 0.1))


def mountains(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = _sky(y, h)
    far = b.ridge(x, h - 0.05, 0.75, 1.15, d[:, 1])
    out = mix(out, rgb(142, 160, 196, y), b.below(y, far))
    out = mix(out, rgb(248, 250, 255, y), b.below(y, far) * b.fill(y - h + 0.5, y))
    out = mix(out, rgb(104, 130, 150, y), b.below(y, b.ridge(x, h, 0.36, 0.9, d[:, 2])))
    return mix(
        out,
        b.fade(y, rgb(122, 184, 98, y), rgb(76, 142, 70, y), 0.1),
        b.below(y, b.hill(x, h, 0.035, 2.0, d[:, 5])),
    )


def space(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(18, 12, 44, y), rgb(42, 24, 84, y))
    out = mix(out, rgb(150, 64, 170, y), b.glow(x, y, d[:, 1] * 2 - 1, d[:, 2] * 2 - 1, 0.8) * 0.5)
    out = mix(out, rgb(40, 120, 190, y), b.glow(x, y, d[:, 3] * 2 - 1, d[:, 1] * 2 - 1, 0.6) * 0.45)
    out = _stars(out, x, y, d, 18)
    px, py = d[:, 4] * 1.6 - 0.8, -0.72 + d[:, 5] * 0.16
    planet = b.disk(x, y, px, py, 0.2)
    out = mix(out, b.fade(y, rgb(250, 190, 120, y), rgb(190, 96, 90, y), -0.95, -0.4), planet)
    ring = (((x - px) ** 2 + ((y - py + (x - px) * 0.3) * 3.6) ** 2).sqrt() - 0.33).abs() - 0.03
    return mix(out, rgb(244, 224, 180, y), b.fill(ring, y) * (1 - planet * b.fill(y - py, y)))


def rain(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(112, 132, 156, y), rgb(176, 190, 204, y), end=h)
    for i in range(3):
        out = mix(
            out,
            rgb(88, 104, 128, y),
            b.cloud(x, y, d[:, 2] * 0.8 - 1.2 + 0.8 * i, -0.84 + 0.1 * d[:, 3 + i], 0.46),
        )
    out = mix(
        out,
        b.fade(y, rgb(112, 138, 128, y), rgb(80, 104, 100, y), 0.1),
        b.below(y, b.hill(x, h, 0.02, 2.0, d[:, 5])),
    )
    for cx, cy in b.scatter(d, 3):
        out = mix(out, rgb(160, 186, 204, y), b.disk(x, y, cx, 0.72 + cy * 0.2, 0.24, 5.0))
    for cx, cy in b.scatter(d, 20):
        drop = torch.maximum((x - cx + (y - cy) * 0.2).abs() - 0.012, (y - cy).abs() - 0.075)
        out = mix(out, rgb(206, 226, 244, y), b.fill(drop, y) * 0.85)
    return out


def room(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    walls = torch.tensor(
        [[246, 222, 196], [206, 226, 220], [226, 214, 236], [250, 232, 186]], device=y.device, dtype=y.dtype
    )
    out = (walls[(d[:, 1].flatten() * 3.99).long()] / 255).view(-1, 3, 1, 1) * b.fade(
        y, rgb(244, 244, 244, y), rgb(255, 255, 255, y)
    )
    wx = torch.where(d[:, 2] > 0.5, -0.55, 0.55) + d[:, 3] * 0.1
    out = mix(out, rgb(250, 250, 250, y), b.box(x, y, wx, -0.45, 0.34, 0.38))
    view = mix(rgb(150, 208, 246, y), rgb(140, 200, 120, y), b.below(y, b.hill(x, -0.25, 0.04, 4.0, d[:, 4])))
    out = mix(out, view, b.box(x, y, wx, -0.45, 0.29, 0.33))
    out = mix(
        out,
        rgb(250, 250, 250, y),
        torch.maximum(b.box(x, y, wx, -0.45, 0.02, 0.35), b.box(x, y, wx, -0.45, 0.3, 0.02)),
    )
    floor = b.fade(y, rgb(196, 146, 100, y), rgb(164, 114, 74, y), 0.1)
    floor = mix(floor, rgb(138, 94, 60, y), b.fill((((y - h) * 6) % 1 - 0.5).abs() - 0.03, y, 4) * 0.5)
    out = mix(out, floor, b.below(y, h))
    return mix(out, rgb(250, 246, 240, y), b.box(x, y, 0.0, h - 0.02, 2.0, 0.035))


def table(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    top, low = b.rgb(224, 204, 176, y), b.rgb(248, 236, 214, y)
    out = b.fade(y, mix(top, b.rgb(176, 200, 208, y), d[:, 1]), mix(low, b.rgb(226, 236, 238, y), d[:, 1]), end=h)
    wood = b.fade(y, rgb(190, 128, 78, y), rgb(150, 94, 52, y), 0.1)
    for i in range(3):
        grain = (y - b.hill(x, h + 0.2 + 0.24 * i, 0.015, 2.0, d[:, 2 + i])).abs() - 0.008
        wood = mix(wood, rgb(126, 76, 42, y), b.fill(grain, y, 3) * 0.45)
    out = mix(out, wood, b.below(y, h))
    return mix(out, rgb(222, 164, 110, y), b.box(x, y, 0.0, h, 2.0, 0.025))


def stage(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    folds = 0.5 + 0.5 * torch.sin(x * 16 + d[:, 1] * 6.283)
    out = mix(rgb(112, 16, 36, y), rgb(188, 36, 52, y), folds)
    sx = d[:, 2] * 0.4 - 0.2
    beam = (x - sx).abs() - 0.16 - (y + 1) * 0.3
    floor = b.fade(y, rgb(122, 78, 48, y), rgb(84, 50, 32, y), 0.2)
    out = mix(out, floor, b.below(y, h))
    out = out * 0.72 + rgb(255, 236, 180, y) * 0.34 * b.fill(beam, y, 14)
    return mix(out, rgb(255, 236, 190, y), b.disk(x, y, sx, 0.74, 0.62, 3.4) * 0.45)


def garden(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = mix(_sky(y, h), rgb(255, 255, 255, y), _two_clouds(x, y, d) * 0.9)
    out = mix(out, rgb(92, 160, 84, y), b.below(y, b.hill(x, h - 0.16, 0.05, 5.0, d[:, 1])))
    out = mix(out, b.fade(y, rgb(134, 200, 96, y), rgb(90, 164, 72, y), 0.1), b.below(y, h))
    petals = ((240, 92, 120), (255, 206, 84), (178, 116, 224), (255, 255, 255), (250, 148, 76))
    for i in range(10):
        cx, cy = (
            (d[:, 6] + i * 0.7548777) % 1 * 2.3 - 1.15,
            h + 0.06 + (1 - h) * ((d[:, 7] + i * 0.5698403) % 1),
        )
        out = mix(out, rgb(*petals[i % 5], y), b.disk(x, y, cx, cy, 0.055))
        out = mix(out, rgb(255, 236, 150, y), b.disk(x, y, cx, cy, 0.02))
    return out


def lake(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = _sky(y, h - 0.2)
    ridge = b.hill(x, h - 0.42, 0.1, 2.2, d[:, 1])
    out = mix(out, rgb(104, 160, 128, y), b.below(y, ridge))
    mirrored = b.fill(y - (2 * (h - 0.3) - ridge), y, 5)
    water = b.fade(y, rgb(112, 186, 220, y), rgb(70, 140, 196, y), -0.2, 0.6)
    out = mix(out, mix(water, rgb(78, 146, 150, y), mirrored * 0.7), b.below(y, h - 0.3))
    shore = b.hill(x, h + 0.1, 0.04, 2.0, d[:, 5])
    return mix(out, b.fade(y, rgb(126, 184, 92, y), rgb(82, 142, 66, y), 0.2), b.below(y, shore))


def autumn(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(184, 216, 228, y), rgb(252, 238, 206, y), end=h)
    crowns = ((226, 118, 44), (244, 176, 56), (200, 74, 46))
    for i in range(4):
        cx, size = (d[:, 1] * 2.4 + i * 0.64) % 2.6 - 1.3, 0.3 + 0.06 * (i % 2)
        out = mix(out, rgb(112, 74, 52, y), b.box(x, y, cx, h - 0.12, 0.035, 0.2))
        out = mix(out, rgb(*crowns[i % 3], y), b.disk(x, y, cx, h - 0.5, size))
    out = mix(
        out,
        b.fade(y, rgb(222, 164, 84, y), rgb(182, 116, 58, y), 0.1),
        b.below(y, b.hill(x, h, 0.03, 1.8, d[:, 5])),
    )
    for i in range(9):
        cx, cy = (d[:, 6] + i * 0.7548777) % 1 * 2.2 - 1.1, (d[:, 7] + i * 0.5698403) % 1 * 2 - 1
        out = mix(out, rgb(*crowns[(i + 1) % 3], y), b.disk(x + 0.5 * (y - cy), y, cx, cy, 0.042, 1.7))
    return out


def moon(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = _stars(b.fade(y, rgb(8, 8, 24, y), rgb(30, 30, 62, y), end=h), x, y, d, 14)
    ex, ey = d[:, 2] * 1.3 - 0.65, -0.62 + d[:, 3] * 0.15
    earth = b.disk(x, y, ex, ey, 0.22)
    out = mix(out, rgb(58, 134, 220, y), earth)
    land = torch.maximum(b.disk(x, y, ex - 0.08, ey - 0.05, 0.1), b.disk(x, y, ex + 0.1, ey + 0.1, 0.08))
    out = mix(out, rgb(96, 190, 110, y), land * earth)
    out = mix(
        out,
        b.fade(y, rgb(198, 200, 208, y), rgb(146, 148, 160, y), 0.1),
        b.below(y, b.hill(x, h, 0.04, 1.8, d[:, 1])),
    )
    for cx, cy in b.scatter(d, 5):
        low = h + 0.2 + (cy + 1) * 0.25
        out = mix(out, rgb(138, 140, 152, y), b.disk(x, y, cx, low, 0.13, 3.0))
        out = mix(out, rgb(168, 170, 180, y), b.disk(x, y, cx, low + 0.012, 0.11, 3.2))
    return out


def volcano(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(70, 34, 52, y), rgb(236, 110, 62, y), end=h)
    vx = d[:, 2] * 1.1 - 0.55
    out = mix(out, rgb(255, 190, 90, y), b.glow(x, y, vx, h - 0.95, 0.4) * 0.7)
    cone = (x - vx).abs() - 0.1 - (y - h + 0.85) * 0.62
    body = b.fill(torch.maximum(cone, h - 0.85 - y), y)
    out = mix(out, rgb(86, 56, 62, y), body)
    lava = (x - vx - 0.04 * torch.sin(y * 14)).abs() - 0.035 - (y - h + 0.85) * 0.1
    out = mix(out, rgb(255, 146, 44, y), b.fill(lava, y) * body)
    return mix(
        out,
        b.fade(y, rgb(92, 60, 58, y), rgb(58, 38, 42, y), 0.1),
        b.below(y, b.hill(x, h, 0.03, 2.0, d[:, 5])),
    )


def rainbow(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = mix(_sky(y, h), rgb(255, 255, 255, y), _two_clouds(x, y, d, 0.2) * 0.8)
    away = ((x - (d[:, 1] * 0.4 - 0.2)) ** 2 + (y - h - 0.1) ** 2).sqrt()
    for i, colour in enumerate(
        ((238, 82, 82), (250, 158, 66), (254, 222, 92), (110, 196, 108), (84, 152, 236), (158, 104, 212))
    ):
        out = mix(out, rgb(*colour, y), b.fill((away - 1.06 + 0.06 * i).abs() - 0.032, y) * 0.9)
    return mix(
        out,
        b.fade(y, rgb(118, 196, 96, y), rgb(72, 156, 70, y), 0.1),
        b.below(y, b.hill(x, h, 0.04, 1.7, d[:, 5])),
    )


def aurora(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(8, 16, 48, y), rgb(24, 56, 92, y), end=h)
    for i, colour in enumerate(((70, 240, 170), (90, 200, 240), (190, 110, 240))):
        curve = b.hill(x, -0.35 - 0.2 * i, 0.13, 2.0 + 0.4 * i, d[:, 1 + i])
        light = torch.exp(-(((y - curve) * torch.where(y > curve, 9.0, 2.6)) ** 2))
        out = mix(out, rgb(*colour, y), light * 0.62)
    out = _stars(out, x, y, d, 8)
    return mix(
        out,
        b.fade(y, rgb(208, 226, 244, y), rgb(142, 172, 208, y), 0.1),
        b.below(y, b.hill(x, h, 0.04, 1.9, d[:, 5])),
    )


def party(x: Tensor, y: Tensor, h: Tensor, d: Tensor) -> Tensor:
    out = b.fade(y, rgb(255, 224, 236, y), rgb(255, 244, 222, y))
    colours = ((240, 84, 108), (255, 198, 66), (84, 178, 236), (120, 200, 110), (170, 112, 220))
    string = -0.86 + 0.12 * (1 - x**2)
    for i in range(7):
        cx = (i - 3) * 0.32 + d[:, 1] * 0.1 - 0.05
        flag = torch.maximum((x - cx).abs() * 2.1 + y - string - 0.26, string - y)
        out = mix(out, rgb(*colours[i % 5], y), b.fill(flag, y))
    out = mix(out, rgb(150, 110, 130, y), b.fill((y - string).abs() - 0.01, y))
    for i, (cx, cy) in enumerate(b.scatter(d, 14)):
        out = mix(out, rgb(*colours[(i * 2) % 5], y), b.disk(x, y, cx, -0.35 + (cy + 1) * 0.66, 0.028))
    return mix(out, b.fade(y, rgb(244, 190, 170, y), rgb(226, 158, 148, y), 0.4), b.below(y, h))
