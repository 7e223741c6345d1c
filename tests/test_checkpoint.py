"""Checkpoints: what goes in comes out, whole or not at all, and never as pickle."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune import checkpoint
from finetune.schedule import TrainConfig, build_optimizer
from finetune.student import Group


def round_trip(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    return checkpoint.load(checkpoint.save(folder, 3, state, keep=1))


def assert_same(found: Any, expected: Any) -> None:
    """Equal values of equal types, bit for bit."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


SHARED = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"nothing": None, "yes": True, "one": 1, "half": 0.1, "text": "schön", "empty": [[], (), {}]},
        {0: "zero", 1: {2: torch.ones(2)}, "0": "text", "1": {"2": torch.zeros(2)}},
        {"betas": (0.9, 0.999), "nested": [({"a": (torch.ones(1),)},)]},
        {str(dtype): torch.tensor([1, 0, 3]).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.uint8)},
        {str(dtype): torch.tensor([1, 0, 3]).to(dtype) for dtype in (torch.float64, torch.int64, torch.bool)},
        {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "odd": torch.tensor([torch.nan, torch.inf, -0.0])},
        {"view": SHARED.T, "part": SHARED[:, 1], "same": SHARED, "again": SHARED},
        {"weights": {"unet.a/b": torch.ones(1), "unet.a": {"b": torch.zeros(1)}}},
        {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        {"large": 2**62, "small": 5e-324, "infinite": float("inf")},
    ],
    ids=lambda state: " ".join(map(str, state)) or "empty",
)
def test_a_state_comes_back_as_it_was(tmp_path: Path, state: dict[str, Any]):
    assert_same(round_trip(tmp_path, state), state)


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


SHAPES = {"large": (64, 128), "small": (7,)}  # 8-bit AdamW keeps small tensors in 32 bits


def build(weights: dict[str, nn.Parameter], name: str) -> torch.optim.Optimizer:
    groups = [Group(key, {key: weight}, 1e-2) for key, weight in weights.items()]
    return build_optimizer(groups, TrainConfig(steps=10, optimizer=name, learning_rate=1e-2))


def update(optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "prodigy"])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, name: str):
    weights = parameters()
    optimizer = build(weights, name)
    for step in range(3):
        update(optimizer, weights, step)
    state = round_trip(tmp_path, {"optimizer": optimizer.state_dict(), "weights": dict(weights)})
    restored = {key: nn.Parameter(weight) for key, weight in state["weights"].items()}
    continued = build(restored, name)
    continued.load_state_dict(state["optimizer"])
    for step in range(3, 6):
        update(optimizer, weights, step)
        update(continued, restored, step)
    for key, weight in weights.items():
        assert torch.equal(weight, restored[key])
        assert not torch.equal(weight, parameters()[key])


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [7, 9]), (9, [2, 5, 7, 9])])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int, kept: list[int]):
    for step in (2, 5, 7, 9):
        checkpoint.save(tmp_path, step, {"step": step}, keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:06d}" for step in kept]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and checkpoint.load(newest) == {"step": 9}


def test_a_millionth_step_is_newer_than_the_one_before(tmp_path: Path):
    for step in (999_999, 1_000_000):
        checkpoint.save(tmp_path, step, {"step": step}, keep=1)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and checkpoint.load(newest) == {"step": 1_000_000}


def test_a_step_may_be_saved_again(tmp_path: Path):
    state = {"step": 3, "tensor": torch.ones(2)}
    for _ in range(2):
        path = checkpoint.save(tmp_path, 3, state, keep=1)
        assert [found.name for found in tmp_path.iterdir()] == [path.name]
        assert_same(checkpoint.load(path), state)


class Unwritable:
    """Something no checkpoint can hold."""


def test_a_save_that_fails_leaves_the_checkpoints_as_they_were(tmp_path: Path):
    checkpoint.save(tmp_path, 3, {"step": 3}, keep=1)
    with pytest.raises((AssertionError, TypeError)):
        checkpoint.save(tmp_path, 4, {"step": 4, "bad": Unwritable()}, keep=1)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and checkpoint.load(newest) == {"step": 3}


def test_what_a_killed_save_left_is_no_checkpoint_and_is_swept_away(tmp_path: Path):
    whole = checkpoint.save(tmp_path, 4, {"step": 4}, keep=1)
    whole.rename(tmp_path / ".step-000004.new.77")
    (tmp_path / ".step-000004.new.77" / "state.json").unlink()
    (tmp_path / ".step-000002.old.77").mkdir()
    assert checkpoint.newest(tmp_path) is None
    checkpoint.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.REST, checkpoint.CHECKSUMS])
@pytest.mark.parametrize("harm", [_flip_a_bit, _cut_short, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(
    tmp_path: Path, file: str, harm: Any, capsys: pytest.CaptureFixture[str]
):
    for step in (3, 4):
        checkpoint.save(tmp_path, step, {"step": step, "weights": torch.ones(100)}, keep=2)
    harm(tmp_path / "step-000004" / file)
    found = checkpoint.newest(tmp_path)
    assert found is not None and checkpoint.load(found)["step"] == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-000004 is damaged" in line and "passed over" in line


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_went_back_behind_damage_replaces_it_and_keeps_what_is_whole(tmp_path: Path, keep: int):
    for step in (3, 4, 9):
        checkpoint.save(tmp_path, step, {"step": step}, keep=3)
    for damaged in ("step-000004", "step-000009"):
        _flip_a_bit(tmp_path / damaged / checkpoint.REST)
    assert checkpoint.load(checkpoint.save(tmp_path, 4, {"step": 4}, keep)) == {"step": 4}
    kept = ["step-000003", "step-000004"][-keep:]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_the_checksums_are_those_of_the_usual_tool(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, {"tensor": torch.ones(3)}, keep=1)
    done = subprocess.run(["sha256sum", "--check", checkpoint.CHECKSUMS], cwd=path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("OK") == 2


def test_what_is_not_in_tensors_can_be_read_without_them(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, {"tensor": torch.ones(3), "recipe": "text"}, keep=1)
    assert checkpoint.load(path, tensors=False) == {"tensor": None, "recipe": "text"}


@pytest.mark.parametrize("stray", ["step-notes", "step-000009.bak", "best"])
def test_a_folder_of_the_users_is_no_checkpoint_and_is_not_deleted(tmp_path: Path, stray: str):
    (tmp_path / stray).mkdir(parents=True)
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"step": step}, keep=1)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step-000002"
    assert (tmp_path / stray).is_dir()


def test_there_is_no_newest_checkpoint_where_there_is_none(tmp_path: Path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "missing") is None


def test_nothing_is_pickled(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, {"tensor": torch.ones(3), "rest": (1, None)}, keep=1)
    assert {file.name for file in path.iterdir()} == {"state.safetensors", "state.json", "SHA256SUMS"}
    contents = [file.read_bytes() for file in path.iterdir()]
    assert not any(content.startswith((b"\x80", b"PK\x03\x04")) for content in contents)
