"""Muon: momentum whose matrix is made orthogonal before it is applied; AdamW for what is no matrix.

Keller Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon/). Steps are scaled to AdamW's size as in
"Muon is scalable for LLM training" (arXiv:2502.16982), so that one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to a stack [n, rows, columns], roughly, by a Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Optimizes a module's hidden matrices and convolution kernels by Muon, everything else by AdamW.

    Args:
        edges: name fragments of input, output and embedding layers, which AdamW takes.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        edges: Iterable[str] = (),
    ) -> None:
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.groups: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        others = []
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1 and not any(edge in name for edge in edges):
                self.groups[tuple(parameter.flatten(1).shape)].append(parameter)
            elif parameter.requires_grad:
                others.append(parameter)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }
        fused = bool(others) and others[0].is_cuda
        self.adam = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the learning rate; gradients are dropped."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor
        self.adam.step()
        for shape, group in self.groups.items():
            gradient = torch.stack([p.grad.flatten(1) for p in group])
            buffer = self.buffers[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp_(buffer, self.momentum)) * (0.2 * max(shape) ** 0.5 * self.lr * factor)
            torch._foreach_mul_(group, 1 - self.lr * factor * self.weight_decay)
            torch._foreach_sub_(group, [u.view(p.shape) for u, p in zip(update, group, strict=True)])
        for parameter in self.parameters:
            parameter.grad = None
