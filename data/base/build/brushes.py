"""Strokes that the scenes are painted with. Everything is [n, channels, h, w]; x and y run from -1 to 1, y down."""

from __future__ import annotations

import torch
from torch import Tensor


def rgb(red: float, green: float, blue: float, like: Tensor) -> Tensor:
    """A colour from 0..255 as [1, 3, 1, 1] beside `like`."""
    return torch.tensor([red, green, blue], device=like.device, dtype=like.dtype).view(1, 3, 1, 1) / 255


def mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """`share` of the second over the first."""
    return first + (second - first) * share


def fill(distance: Tensor, y: Tensor, softness: float = 1.0) -> Tensor:
    """1 where the signed distance is negative, with an edge `softness` pixels wide."""
    return (0.5 - distance * (y.shape[-2] / 2 / softness)).clamp(0, 1)


def disk(
    x: Tensor, y: Tensor, cx: Tensor | float, cy: Tensor | float, radius: Tensor | float, flat: float = 1.0
) -> Tensor:
    """A filled disk; `flat` above 1 squashes its height."""
    return fill(((x - cx) ** 2 + ((y - cy) * flat) ** 2).sqrt() - radius, y)


def glow(x: Tensor, y: Tensor, cx: Tensor | float, cy: Tensor | float, radius: float) -> Tensor:
    """A soft round light."""
    return torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / radius**2)


def box(
    x: Tensor,
    y: Tensor,
    cx: Tensor | float,
    cy: Tensor | float,
    width: Tensor | float,
    height: Tensor | float,
) -> Tensor:
    """A filled rectangle by its centre and half sizes."""
    return fill(torch.maximum((x - cx).abs() - width, (y - cy).abs() - height), y)


def below(y: Tensor, line: Tensor | float) -> Tensor:
    """Everything under a line (a number or a height for every x)."""
    return fill(line - y, y)


def hill(x: Tensor, base: Tensor | float, height: float, waves: float, phase: Tensor) -> Tensor:
    """The y of a rolling ridge."""
    return base + height * (torch.sin(x * waves + phase * 6.283) + 0.4 * torch.sin(x * waves * 1.9 + phase * 17.0))


def fade(y: Tensor, top: Tensor, bottom: Tensor, start: float = -1.0, end: Tensor | float = 1.0) -> Tensor:
    """A vertical gradient between two colours."""
    return mix(top, bottom, ((y - start) / (end - start)).clamp(0, 1))


def scatter(draws: Tensor, number: int) -> list[tuple[Tensor, Tensor]]:
    """Well spread places: the R2 sequence moved by two draws ([n, 1, 1, 1] each)."""
    return [
        (((draws[:, 6] + i * 0.7548777) % 1) * 2.2 - 1.1, ((draws[:, 7] + i * 0.5698403) % 1) * 2 - 1)
        for i in range(number)
    ]


def cloud(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor, size: Tensor | float) -> Tensor:
    """Three round puffs on a flat bottom."""
    puffs = [
        (-0.55, 0.05, 0.32),
        (0.0, -0.12, 0.46),
        (0.5, 0.04, 0.36),
        (0.95, 0.14, 0.22),
        (-0.95, 0.16, 0.2),
    ]
    shape = torch.zeros((), device=x.device)
    for dx, dy, radius in puffs:
        shape = torch.maximum(shape, disk(x, y, cx + dx * size, cy + dy * size, radius * size))
    return shape * fill(y - cy - 0.3 * size, y)


def ridge(x: Tensor, base: Tensor | float, height: float, width: float, phase: Tensor) -> Tensor:
    """The y of pointed mountains."""
    saw = (((x / width + phase) % 1) - 0.5).abs() * 2
    tooth = (((x / width * 0.61 + phase * 3.1) % 1) - 0.5).abs() * 2
    return base - height * (0.65 * (1 - saw) + 0.35 * (1 - tooth))


def pine(x: Tensor, y: Tensor, cx: Tensor, foot: Tensor | float, height: Tensor | float) -> Tensor:
    """A fir of three tiers."""
    shape = torch.zeros((), device=x.device)
    for tier in range(3):
        low, top = foot - height * 0.26 * tier, foot - height * (0.5 + 0.25 * tier)
        half = height * (0.34 - 0.07 * tier) * (y - top) / (low - top)
        shape = torch.maximum(shape, fill((x - cx).abs() - half, y) * fill(y - low, y))
    return shape
