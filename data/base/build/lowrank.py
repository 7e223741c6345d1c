"""Weights that are a function of what is trained: float8 roundings, and low-rank differences to a frozen base.

Both write the weights into a plain module before the forward pass and take the gradients out of it after the backward
pass, so that the module itself stays as diffusers made it and compiles as such.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finetune.companions import narrowed, widened

FLOAT8 = torch.float8_e4m3fn


def rounded(weight: Tensor) -> Tensor:
    """The value that the exported file holds: float8 for matrices and kernels, float16 for vectors."""
    return weight.to(FLOAT8 if weight.ndim > 1 else torch.float16).to(weight.dtype)


class Rounded:
    """Trains a module through its export's rounding, which the gradient passes over (a straight-through estimate)."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = [p.data for p in module.parameters() if p.ndim > 1]
        self.exact = [w.clone() for w in self.weights]

    @torch.no_grad()
    def write(self) -> None:
        torch._foreach_copy_(self.exact, self.weights)
        torch._foreach_copy_(self.weights, [rounded(w) for w in self.exact])

    @torch.no_grad()
    def pull(self) -> None:
        torch._foreach_copy_(self.weights, self.exact)


class Difference(nn.Module):
    """What a companion has beside the base: two thin factors for each shared matrix, and some weights whole.

    Whole are the weights that the base lacks, vectors, and matrices that are no smaller as factors.
    """

    def __init__(self, module: nn.Module, base: Mapping[str, Tensor], rank: int) -> None:
        super().__init__()
        self.names, self.base, self.weights = [], [], []
        self.up, self.down, self.whole = nn.ParameterList(), nn.ParameterList(), nn.ParameterDict()
        self.module_weights = dict(module.named_parameters())
        for name, weight in self.module_weights.items():
            weight.requires_grad_(True)
            rows, columns = (weight.shape[0], weight[0].numel()) if weight.ndim > 1 else (1, 1)
            same = name in base and base[name].shape == weight.shape
            if not same or weight.ndim < 2 or rank * (rows + columns) >= rows * columns:
                self.whole[name.replace(".", "/")] = nn.Parameter(weight.data.clone())
                continue
            self.names.append(name)
            self.base.append(base[name].to(weight))
            self.up.append(torch.zeros(rows, rank, device=weight.device))
            self.down.append(torch.randn(rank, columns, device=weight.device) / columns**0.5)

    def write(self) -> None:
        """Put base plus difference into the module."""
        self.made = [b + (u @ d).view(b.shape) for b, u, d in zip(self.base, self.up, self.down, strict=True)]
        with torch.no_grad():
            torch._foreach_copy_([self.module_weights[n].data for n in self.names], self.made)
            pairs = [(self.module_weights[n.replace("/", ".")].data, w.data) for n, w in self.whole.items()]
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))

    def pull(self) -> None:
        """Turn the module's gradients into those of the factors, and drop them there."""
        grads = [self.module_weights[n].grad for n in self.names]
        torch.autograd.backward(self.made, grads)
        for name, weight in self.whole.items():
            weight.grad = self.module_weights[name.replace("/", ".")].grad
        for weight in self.module_weights.values():
            weight.grad = None

    def stored(self) -> dict[str, Tensor]:
        """The tensors of `companions.FILE`."""
        out = {n.replace("/", "."): w.detach().half().cpu().contiguous() for n, w in self.whole.items()}
        for name, up, down in zip(self.names, self.up, self.down, strict=True):
            size = (up.norm() / down.norm()).clamp(min=1e-4).sqrt()  # both of one size: nothing is lost in float16
            out |= narrowed((up / size).detach().cpu(), f"{name}.up")
            out |= narrowed((down * size).detach().cpu(), f"{name}.down")
        return out

    @torch.no_grad()
    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Take back what `stored` made."""
        for name, weight in self.whole.items():
            weight.copy_(stored[name.replace("/", ".")])
        for name, up, down in zip(self.names, self.up, self.down, strict=True):
            up.copy_(widened(stored, f"{name}.up"))
            down.copy_(widened(stored, f"{name}.down"))
