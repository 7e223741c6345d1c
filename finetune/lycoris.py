"""LyCORIS' products (2309.14859) as plain low-rank factors, exactly.

Shapes: m outputs, n inputs, k the side of a convolution's kernel, r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from finetune.errors import UserError

MOST_NUMBERS = 2**28  # four times those of the largest layer of FLUX.1
Factors = tuple[Tensor, Tensor]  # up (m, R) and down (R, n) or (R, n, k, k)


def from_hadamard(roles: Mapping[str, Tensor]) -> tuple[Factors, int]:
    """LoHa, `(A1 B1) * (A2 B2)`: its factors of rank r * r, which are row-wise Khatri-Rao products, and r."""
    (up1, down1), (up2, down2) = (_hadamard_half(roles, half) for half in (1, 2))
    _check_size("LoHa", len(down1) * len(down2), len(up1), down1[0].numel())
    up = torch.einsum("mi,mj->mij", up1, up2).flatten(1)
    down = torch.einsum("i...,j...->ij...", down1, down2).flatten(0, 1)
    return (up, down), len(down1)


def _hadamard_half(roles: Mapping[str, Tensor], half: int) -> Factors:
    up, down = roles[f"hada_w{half}_a"].float(), roles[f"hada_w{half}_b"].float()
    core = roles.get(f"hada_t{half}")
    if core is None:
        return up, down
    return up.T, _tucker(core, down)  # its outer factors are transposed


def from_kronecker(roles: Mapping[str, Tensor]) -> tuple[Factors, int | None]:
    """LoKr, `W1 (x) W2`: its factors are the Kronecker products of theirs; and the rank that scales it, if any.

    Raises:
        UserError: as a LoRA it would be larger than the layer.
    """
    (up1, down1), rank1 = _kronecker_half(roles, 1)
    (up2, down2), rank2 = _kronecker_half(roles, 2)
    rank, m, n = up1.shape[1] * up2.shape[1], len(up1) * len(up2), down1.shape[1] * down2[0].numel()
    if rank * (m + n) > m * n:
        raise UserError(
            f"a LoKr of {m} x {n} has rank {rank}: as a LoRA it would be larger than the layer itself. "
            "Use it where LyCORIS is understood (ComfyUI, A1111)."
        )
    _check_size("LoKr", rank, m, n)
    down = torch.kron(down1, down2.flatten(1))
    down = down.reshape(len(down), -1, *down2.shape[2:])
    return (torch.kron(up1, up2), down), rank1 or rank2


def _kronecker_half(roles: Mapping[str, Tensor], half: int) -> tuple[Factors, int | None]:
    """Factors of W1 or W2, and the rank it is stored with, if it is not stored whole."""
    if (matrix := roles.get(f"lokr_w{half}")) is not None:
        matrix = matrix.float()
        m, n = len(matrix), matrix[0].numel()
        if m < n:
            return (torch.eye(m), matrix), None
        return (matrix.flatten(1), torch.eye(n).reshape(n, *matrix.shape[1:])), None
    up, down = roles[f"lokr_w{half}_a"].float(), roles[f"lokr_w{half}_b"].float()
    core = roles.get(f"lokr_t{half}")
    if core is not None:
        up, down = up.T, _tucker(core, down)
    return (up, down), len(down)


def _check_size(kind: str, rank: int, m: int, n: int) -> None:
    """Raises: UserError when the product of small factors has more numbers than the layers of any known model."""
    if rank * (m + n) > MOST_NUMBERS:
        raise UserError(f"a {kind} of {m} x {n} has rank {rank}: as a LoRA it has {rank * (m + n):,} numbers, too many")


def from_tucker(mid: Tensor, down: Tensor) -> Tensor:
    """LoCon's `mid` (r, r, k, k) and `down` (r, n, 1, 1) as one `down` (r, n, k, k)."""
    return _tucker(mid, down.float().flatten(1))


def _tucker(core: Tensor, down: Tensor) -> Tensor:
    """Tucker's form, a core (r, s, k, k) and its outer factor (s, n), as (r, n, k, k)."""
    if core.numel() // core.shape[1] * down.shape[1] > MOST_NUMBERS:
        raise UserError(f"a core {tuple(core.shape)} times {tuple(down.shape)} has more numbers than any layer")
    return torch.einsum("ij...,jn->in...", core.float(), down)


def as_convolution(factors: Factors, side: int) -> Factors:
    """Factors (m, R) and (R, n * k * k), in which LyCORIS keeps a convolution, in a convolution's shapes.

    Raises:
        UserError: the inputs are no multiple of the kernel, or the outputs have one.
    """
    up, down = factors
    if down.ndim == 2:
        if down.shape[1] % side**2:
            raise UserError(f"{down.shape[1]} inputs are not a multiple of a kernel of {side} x {side}")
        down = down.reshape(len(down), -1, side, side)
    if math.prod(up.shape[2:]) != 1:
        raise UserError(f"outputs of shape {tuple(up.shape)} are not those of a convolution")
    return up.reshape(*up.shape[:2], 1, 1), down
