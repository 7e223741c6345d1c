"""The edge map that the ControlNet follows: white lines on black, in the look of Canny, by plain arithmetic.

1. gray = 0.299 R + 0.587 G + 0.114 B, from 0 to 1;
2. blurred by the kernel (1, 4, 6, 4, 1) / 16 down and across;
3. slopes by Sobel's kernels, divided by 4: a step from black to white has slope 1 before the blur;
4. a pixel is a ridge where no neighbour across the line (of four directions) has a greater slope;
5. ridges above HIGH are lines, and so are ridges above LOW that touch a line, ROUNDS times over.

The outermost four pixels are black. Only slices and arithmetic are used, so that the same lines run on a NumPy array
and on a tensor of any device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

Array = Any  # a NumPy array or a torch.Tensor, [..., h, w]

LOW, HIGH, ROUNDS, BORDER = 0.035, 0.08, 12, 4


def edge_map(image: Image.Image) -> Image.Image:
    """The conditioning picture of a picture, at the same size, RGB."""
    red, green, blue = np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    return Image.fromarray(lines(gray(red, green, blue)).astype(np.uint8) * 255).convert("RGB")


def gray(red: Array, green: Array, blue: Array) -> Array:
    return 0.299 * red + 0.587 * green + 0.114 * blue


def lines(bright: Array) -> Array:
    """Booleans [..., h, w] of a gray picture [..., h, w] in 0..1."""
    down, across = slopes(blur(bright))
    found = ridges(down, across)
    weak, strong = found > LOW, found > HIGH
    for _ in range(ROUNDS):
        strong = weak & grown(strong)
    out = bright > 9.0  # all false, in the kind of the input
    out[..., BORDER:-BORDER, BORDER:-BORDER] = strong
    return out


def blur(bright: Array) -> Array:
    """[..., h - 4, w - 4]"""
    for _ in range(2):  # down, then across by turning the picture
        mixed = bright[..., :-4, :] + bright[..., 4:, :] + 4 * (bright[..., 1:-3, :] + bright[..., 3:-1, :])
        bright = ((mixed + 6 * bright[..., 2:-2, :]) / 16).swapaxes(-1, -2)
    return bright


def slopes(bright: Array) -> tuple[Array, Array]:
    """Sobel's slopes down and across, [..., h - 2, w - 2]."""
    rows = (bright[..., :-2, :] + 2 * bright[..., 1:-1, :] + bright[..., 2:, :]) / 4
    columns = (bright[..., :-2] + 2 * bright[..., 1:-1] + bright[..., 2:]) / 4
    return columns[..., 2:, :] - columns[..., :-2, :], rows[..., 2:] - rows[..., :-2]


def ridges(down: Array, across: Array) -> Array:
    """The slope's size where it is greatest across the line, else 0: [..., h - 2, w - 2]."""
    size = (down**2 + across**2) ** 0.5
    middle, v, u = size[..., 1:-1, 1:-1], down[..., 1:-1, 1:-1], across[..., 1:-1, 1:-1]
    flat, steep = abs(v) <= 0.4142 * abs(u), abs(u) <= 0.4142 * abs(v)
    falling = (u * v > 0) & ~flat & ~steep
    rising = ~(flat | steep | falling)
    kept = flat & peak(size, 0, 1) | steep & peak(size, 1, 0) | falling & peak(size, 1, 1) | rising & peak(size, 1, -1)
    return middle * kept


def peak(size: Array, y: int, x: int) -> Array:
    """Where a pixel is above the neighbour before and not below the one after it: [..., h - 2, w - 2]."""
    h, w = size.shape[-2:]
    middle, before = size[..., 1:-1, 1:-1], size[..., 1 - y : h - 1 - y, 1 - x : w - 1 - x]
    return (middle > before) & (middle >= size[..., 1 + y : h - 1 + y, 1 + x : w - 1 + x])


def grown(mask: Array) -> Array:
    """True where the pixel or one of its eight neighbours is; the outermost pixels stay."""
    out = mask | False  # a copy
    tall = mask[..., :-2, :] | mask[..., 1:-1, :] | mask[..., 2:, :]
    out[..., 1:-1, 1:-1] = tall[..., :-2] | tall[..., 1:-1] | tall[..., 2:]
    return out
