"""Styles that are made of any drawing: what a picture of the world looks like in another technique.

Pictures are [3, h, w] in 0..1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
NAVY, CREAM = (0.10, 0.12, 0.36), (1.0, 0.93, 0.76)
BLUE, CHALK = (0.07, 0.24, 0.55), (0.88, 0.94, 1.0)
PAPER, GRAPHITE = (0.97, 0.96, 0.92), (0.22, 0.22, 0.24)
HEAT = ((0.0, 0.0, 0.15), (0.35, 0.0, 0.55), (0.85, 0.15, 0.25), (1.0, 0.65, 0.1), (1.0, 1.0, 0.85))
GLOW = 9  # pixels


def neon(picture: Tensor) -> Tensor:
    """Outlines that glow in the colours of what they are around, in the dark."""
    colour = picture / picture.amax(0).clamp(min=0.1)
    lines = outlines(picture)
    glow = F.avg_pool2d(lines[None, None], GLOW, 1, GLOW // 2)[0, 0]
    return (colour.square() * (0.06 + 0.9 * lines + 0.8 * glow)).clamp(0, 1)


def blueprint(picture: Tensor) -> Tensor:
    """Outlines in white on blue."""
    return between(BLUE, CHALK, outlines(picture))


def pencil(picture: Tensor) -> Tensor:
    """Outlines in grey on paper, and a little shade where it is dark."""
    return between(PAPER, GRAPHITE, (outlines(picture) + 0.3 * (1 - brightness(picture))).clamp(max=1))


def duotone(picture: Tensor) -> Tensor:
    """Dark is navy and light is cream."""
    return between(NAVY, CREAM, brightness(picture))


def thermal(picture: Tensor) -> Tensor:
    """As an infrared camera shows heat, with light for warm."""
    heat = torch.tensor(HEAT)
    place = brightness(picture) * (len(heat) - 1)
    below = place.long().clamp(max=len(heat) - 2)
    share = (place - below)[..., None]
    return (heat[below] * (1 - share) + heat[below + 1] * share).permute(2, 0, 1)


def brightness(picture: Tensor) -> Tensor:
    """[h, w]"""
    return (picture * torch.tensor(LUMA).view(3, 1, 1)).sum(0)


def outlines(picture: Tensor) -> Tensor:
    """How much of an edge, of any channel, is at each place: [h, w] in 0..1."""
    across = torch.tensor(SOBEL)
    kernels = torch.stack([across, across.T])[:, None]
    padded = F.pad(picture[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernels).square().sum(1).sqrt().amax(0).clamp(max=1)


def between(none: tuple[float, ...], full: tuple[float, ...], share: Tensor) -> Tensor:
    """Colours [3, h, w] by shares [h, w]."""
    start, end = (torch.tensor(colour).view(3, 1, 1) for colour in (none, full))
    return start + (end - start) * share
