"""How fast, and with which optimizer: values by hand, optimizers that really step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.schedule import TrainConfig, build_optimizer, multiplier
from finetune.student import Group

STEPS = 20


def curve(steps: int = STEPS, until: float = 1.0, **settings: object) -> list[float]:
    config = TrainConfig.model_validate({"steps": steps, **settings})
    return [multiplier(config, step, until) for step in range(steps)]


def group(learning_rate: float = 1e-2, *, name: str = "unet", size: int = 8192) -> Group:
    weight = nn.Parameter(torch.linspace(-1, 1, size).view(64, -1))
    return Group(name, {"weight": weight}, learning_rate)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda progress: 1.0),
        ("linear", lambda progress: 1 - progress),
        ("cosine", lambda progress: (1 + math.cos(math.pi * progress)) / 2),
    ],
)
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_rate_grows_over_the_warm_up_and_then_follows_the_schedule(schedule: str, expected, warmup: int):
    rates = curve(schedule=schedule, warmup=warmup)
    assert rates[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)])
    rest = STEPS - warmup
    assert rates[warmup:] == pytest.approx([expected(step / rest) for step in range(rest)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 19])
def test_every_step_trains_and_none_faster_than_asked_for(schedule: str, warmup: int):
    assert all(0 < rate <= 1 for rate in curve(schedule=schedule, warmup=warmup))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_group_keeps_its_place_on_the_schedule_until_it_rests(schedule: str):
    whole, half = curve(schedule=schedule, warmup=3), curve(schedule=schedule, warmup=3, until=0.5)
    assert half == whole[:10] + [0.0] * 10


@pytest.mark.parametrize(
    ("steps", "share", "trained"),
    [(20, 0.5, 10), (20, 0, 0), (20, 1, 20), (100, 0.07, 7), (100, 0.29, 29), (3, 0.5, 2)],
)
def test_a_group_trains_for_its_share_of_the_steps(steps: int, share: float, trained: int):
    assert sum(rate > 0 for rate in curve(steps, share)) == trained


@pytest.mark.parametrize(
    ("name", "kind", "learning_rate"),
    [
        ("adamw", "AdamW", 1e-2),
        ("adamw_8bit", "AdamW8bit", 1e-2),
        ("prodigy", "Prodigy", 1.0),
        ("torch.optim.SGD", "SGD", 1e-2),
        ("torch.optim.adagrad.Adagrad", "Adagrad", 1e-2),
    ],
)
def test_an_optimizer_really_lowers_a_loss(name: str, kind: str, learning_rate: float):
    one = group(learning_rate)
    weight = one.parameters["weight"]
    config = TrainConfig(steps=STEPS, optimizer=name, learning_rate=learning_rate)
    optimizer = build_optimizer([one], config)
    assert type(optimizer).__name__ == kind
    losses = []
    for _ in range(STEPS):
        loss = weight.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_eight_bit_adamw_keeps_its_state_in_eight_bits():
    one = group()
    optimizer = build_optimizer([one], TrainConfig(steps=STEPS, optimizer="adamw_8bit"))
    one.parameters["weight"].square().sum().backward()
    optimizer.step()
    state = optimizer.state[one.parameters["weight"]]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8


def test_every_group_has_its_own_rate_and_the_options_reach_all():
    config = TrainConfig(steps=STEPS, learning_rate=1e-3, optimizer_options={"weight_decay": 0.3})
    optimizer = build_optimizer([group(), group(2e-2, name="words")], config)
    assert [(found["lr"], found["weight_decay"]) for found in optimizer.param_groups] == [(1e-2, 0.3), (2e-2, 0.3)]


@pytest.mark.parametrize(
    ("optimizer", "options", "mentions"),
    [
        ("nowhere.SGD", {}, ["train.optimizer", "nowhere.SGD", "imported"]),
        ("torch.optim.SGDD", {}, ["train.optimizer", "torch.optim.SGDD", "imported"]),
        ("os.path.join", {}, ["train.optimizer: os.path.join"]),
        ("builtins.dict", {}, ["train.optimizer: builtins.dict"]),
        ("torch.nn.Linear", {}, ["train.optimizer: torch.nn.Linear"]),
        ("adamw", {"momentum": 0.9}, ["train.optimizer_options", "adamw", "momentum"]),
        ("adamw", {"betas": [2, 3]}, ["train.optimizer_options", "adamw", "2"]),
        ("adamw", {"lr": 3}, ["train.optimizer_options", "adamw", "lr"]),
        ("adamw", {"betas": 3}, ["train.optimizer_options", "adamw"]),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_refused_with_the_setting_at_fault(
    optimizer: str, options: dict, mentions: list[str]
):
    with pytest.raises(UserError) as error:
        build_optimizer([group()], TrainConfig(steps=STEPS, optimizer=optimizer, optimizer_options=options))
    assert all(mention in str(error.value) for mention in mentions)
