"""Half-precision weights, float32 arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from finetune.export import probe
from finetune.families.base import Source, families


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.BASES)
def test_a_prediction_is_that_of_the_same_weights_in_full(family: str, dtype: torch.dtype, base_folder: Any):
    def load() -> Any:
        source = Source(str(base_folder(family)), dtype=dtype)
        return families[family].load(source, min_snr_gamma=None, zero_terminal_snr=False)

    half, full = load(), load()
    full.pipeline.to(torch.float32)
    before = {name: value.clone() for name, value in half.denoiser.state_dict().items()}
    captions = ["a thing", "another"]
    rounding = _difference(_plain(half, captions), _plain(full, captions))
    with half.looking(), full.looking():
        error = _difference(probe(half, captions, tiny.SIZE), probe(full, captions, tiny.SIZE))
    assert error < rounding / 4
    assert half.dtype == dtype
    assert all(torch.equal(value, before[name]) for name, value in half.denoiser.state_dict().items())


def _plain(family: Any, captions: list[str]) -> torch.Tensor:
    with family.looking():
        return family.encode_prompt(family.tokenize(captions)).embeds.float()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
