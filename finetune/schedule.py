"""The recipe's `train` section: how long, how fast, with which optimizer."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from finetune.config import Fraction, PositiveFloat, PositiveInt, Section
from finetune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from finetune.student import Group

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "prodigy": "prodigyopt.Prodigy",
}
Schedule = Literal["constant", "linear", "cosine"]


def _all_or_some(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ValueError(f"expected true, false or a list of the denoiser's parts, got {value!r}.")


def _named(optimizer: str) -> str:
    if optimizer not in OPTIMIZERS and not re.fullmatch(r"\w+(\.\w+)+", optimizer):
        raise ValueError(f"unknown {optimizer!r}. {did_you_mean(optimizer, OPTIMIZERS)}")
    return optimizer


class TrainConfig(Section):
    """Counts are optimizer updates ("steps") and pictures; nothing multiplies behind the user's back."""

    steps: PositiveInt
    batch_size: PositiveInt = 1
    """Pictures of the concept in one step, over all processes; class images come on top, one for each."""
    accumulate: PositiveInt = 1
    """Parts that each process works through one after the other, to save memory."""
    learning_rate: PositiveFloat = 1e-4
    schedule: Schedule = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate grows from 0."""
    optimizer: Annotated[str, AfterValidator(_named)] = "adamw"
    """adamw, adamw_8bit, prodigy, or the import path of any class, such as torch.optim.SGD."""
    optimizer_options: dict[str, Any] = {}
    max_grad_norm: PositiveFloat = 1.0
    precision: Annotated[
        Literal["no", "fp16", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)
    ] = "no"  # YAML reads a bare `no` as false
    gradient_checkpointing: Annotated[bool | tuple[str, ...], BeforeValidator(_all_or_some)] = False
    """Compute activations anew instead of keeping them: of all blocks, or of these parts of the denoiser, such as
    [up_blocks.3, transformer_blocks]."""
    capture: bool = True
    """On a GPU, replay a step as one CUDA graph, and the denoiser while pictures are drawn as another."""
    min_snr_gamma: PositiveFloat | None = None
    zero_terminal_snr: bool = False
    noise_offset: Annotated[float, Field(ge=0)] = 0.0
    ema: Fraction | None = None
    """Decay of an exponential moving average of the weights, which is what is then exported."""
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2

    @property
    def computes(self) -> str:
        """What a step computes in, by torch's name for it."""
        return {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[self.precision]

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        problems = []
        if self.warmup >= self.steps:
            problems.append(f"warmup: {self.warmup} steps leave none of the {self.steps} for training")
        if self.batch_size % self.accumulate:
            problems.append(
                f"accumulate: {self.batch_size} pictures cannot be split into {self.accumulate} equal parts. "
                "Make batch_size a multiple of it."
            )
        if problems:
            raise UserError(problems)
        return self


def build_optimizer(groups: Sequence[Group], config: TrainConfig) -> Optimizer:
    """The optimizer over the groups, each with its own learning rate.

    Raises:
        UserError: it cannot be imported, or does not take the options.
    """
    from torch.optim import Adam, AdamW

    optimizer = find_optimizer(config)
    parameters = [{"params": list(group.parameters.values()), "lr": group.learning_rate} for group in groups]
    options = dict(config.optimizer_options)
    meta = any(parameter.is_meta for group in groups for parameter in group.parameters.values())
    if optimizer in (Adam, AdamW) and not meta and not {"foreach", "fused"} & options.keys():
        options["fused"] = True
    try:
        return optimizer(parameters, lr=config.learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"train.optimizer_options: {config.optimizer} does not take them ({error})") from None


def find_optimizer(config: TrainConfig) -> Any:
    """The optimizer's class.

    Raises:
        UserError: it cannot be imported.
    """
    from torch.optim import Optimizer

    module, _, name = OPTIMIZERS.get(config.optimizer, config.optimizer).rpartition(".")
    try:
        optimizer = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"train.optimizer: {config.optimizer} cannot be imported ({error})") from None
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise UserError(f"train.optimizer: {config.optimizer} is no optimizer of torch")
    return optimizer


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, and work on as this machine does, whichever way the other one did."""
    for settings, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        settings |= {name: own[name] for name in ("lr", "foreach", "fused", "capturable") if name in own}
    optimizer.load_state_dict(state)


def multiplier(config: TrainConfig, step: int, until: float = 1.0) -> float:
    """What the learning rate is multiplied by at a step (from 0): a function of the step alone.

    A group that rests after a share of the steps keeps its place on the schedule until then.
    """
    if step >= math.ceil(until * config.steps - 1e-9):  # 0.07 * 100 is a little more than 7
        return 0.0
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / (config.steps - config.warmup)
    if config.schedule == "linear":
        return 1 - progress
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0
