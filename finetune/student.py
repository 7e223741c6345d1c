"""The module that is trained: a family seen through exactly the parameters that a method changes.

Shapes: B samples, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from finetune.batch import Batch
from finetune.families.base import Family, Prompt
from finetune.fused import as_kept

if TYPE_CHECKING:
    from finetune.methods.base import Method


LEAST = 1e-6  # of a mask's sum, that nothing is divided by 0


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    until: float = 1.0  # share of the steps after which they are frozen


class Student(nn.Module):
    """What is trained, and nothing else.

    The family is kept out of sight, so `parameters()` is what the optimizer
    sees and `state_dict()` what a checkpoint holds. Whatever is trained is
    float32, whatever the base's precision.
    """

    def __init__(
        self,
        method: Method,
        family: Family,
        groups: Sequence[Group],
        frozen: Callable[[], AbstractContextManager] = nullcontext,
        exported: Callable[[], AbstractContextManager] = nullcontext,
    ):
        super().__init__()
        for group in groups:
            for parameter in group.parameters.values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self.trained = nn.ModuleDict(
            {
                group.name: nn.ParameterDict({k.replace(".", "/"): p for k, p in group.parameters.items()})
                for group in groups
            }
        )
        self.method = method
        self.groups = groups
        self.frozen = frozen  # a context in which the family is the base again
        self.exported = exported  # one in which it is what goes out
        self._hidden = (family,)  # a tuple keeps nn.Module from registering its parts

    @property
    def family(self) -> Family:
        return self._hidden[0]

    def forward(self, batch: Batch) -> Tensor:
        """(B,) losses."""
        return self.method.losses(self, batch)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def predict(family: Family, batch: Batch) -> Tensor:
    """What the denoiser says of a batch: (B, C, H, W), float32."""
    noised = family.objective.add_noise(batch.latents, batch.noise, batch.time)
    prompt = batch.prompt if isinstance(batch.prompt, Prompt) else family.encode_prompt(batch.prompt)
    with as_kept(family.denoiser, family.device):
        return family.denoise(noised, batch.time, prompt, batch.geometry).float()


def denoising_errors(family: Family, batch: Batch, target: Tensor | None = None) -> Tensor:
    """The objective's weighted squared error, one value for each sample: (B,).

    Where there is a mask it is the error's mean weighted by it; a crop that shows nothing of its mask teaches nothing.
    """
    objective = family.objective
    if target is None:
        target = objective.target(batch.latents, batch.noise, batch.time)
    error = (predict(family, batch) - target).square()
    if batch.mask is None:
        return objective.weight(batch.time) * error.flatten(1).mean(1)
    error, mask = error.mean(1).flatten(1), batch.mask.flatten(1)
    return objective.weight(batch.time) * (mask * error).sum(1) / mask.sum(1).clamp(min=LEAST)


def frozen_prediction(student: Student, batch: Batch) -> Tensor:
    """What the untouched base says of the same noised latents: (B, C, H, W)."""
    with torch.no_grad(), student.frozen():
        return predict(student.family, batch)
