"""LoRA's kin: what each starts from, what of it goes out, and what is refused before it is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import lessons
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune import run
from finetune.config import build
from finetune.errors import UserError
from finetune.export import LORA_FILE
from finetune.load import load_adapters
from finetune.methods.lora import LoRA, Variant

VARIANTS = get_args(get_args(Variant)[0])


def prepare(base: Path, output: Path, **settings: Any) -> run.Run:
    return run.prepare(lessons.recipe(base, output, "lora", at_toy_size(settings)))


def train_to_float16(base: Path, output: Path, train: dict[str, Any], **settings: Any) -> run.Result:
    half = {"dtype": "float16"}
    return run.train(lessons.recipe(base, output, "lora", at_toy_size(settings), train=train, output=half))


def at_toy_size(settings: dict[str, Any]) -> dict[str, Any]:
    """The toy layers have 16 inputs, where a LoKr is small at rank 1 alone."""
    small = {"rank": 1, "factor": 2} if settings.get("variant") == "lokr" else {"rank": 2}
    return {**small, **settings}


def test_every_variant_is_in_the_matrix_of_methods():
    assert {way.get("variant", "lora") for way in lessons.WAYS["lora"].values()} == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_begins_at_the_base_and_can_always_return_to_it(variant: str, base_folder: Any, tmp_path: Path):
    at_work = prepare(base_folder("stable_diffusion"), tmp_path, variant=variant)
    base = at_work.probe(run.load_family(at_work.recipe))
    torch.testing.assert_close(at_work.probe(at_work.family), base, atol=1e-5, rtol=1e-4)
    at_work.loop()
    assert not torch.allclose(at_work.probe(at_work.family), base, atol=1e-3)
    with at_work.trainer.student.frozen():
        assert torch.equal(at_work.probe(at_work.family), base)
    trainable = {name for name, value in at_work.family.denoiser.named_parameters() if value.requires_grad}
    assert len(trainable) == len(list(at_work.trainer.student.parameters()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_file_in_half_precision_holds_what_was_learnt(variant: str, precision: str, base_folder: Any, tmp_path: Path):
    result = train_to_float16(base_folder("stable_diffusion"), tmp_path, {"precision": precision}, variant=variant)
    assert result.verdict.error < 0.005


def test_pissa_trains_the_principal_part_of_the_weight(base_folder: Any, tmp_path: Path):
    at_work = prepare(base_folder("stable_diffusion"), tmp_path, variant="pissa", alpha=4.0)
    layer = next(module for module in at_work.family.denoiser.modules() if hasattr(module, "lora_A"))
    weight = layer.get_base_layer().weight
    u, s, vh = torch.linalg.svd(weight)
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(product, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5, rtol=1e-4)


def test_pissa_goes_out_as_a_lora_of_twice_the_rank(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", {"rank": 2, "variant": "pissa"})
    weights = load_file(run.train(recipe).files[0])
    assert {len(value) for name, value in weights.items() if "lora_A" in name} == {4}


def test_rslora_scales_by_the_square_root_of_each_rank(base_folder: Any, tmp_path: Path):
    ranks = {"rank": 4, "alpha": 6.0, "rank_pattern": {"to_q": 9}}
    at_work = prepare(base_folder("stable_diffusion"), tmp_path, variant="rslora", **ranks)
    layers = {name: part for name, part in at_work.family.denoiser.named_modules() if hasattr(part, "lora_A")}
    for name, layer in layers.items():
        rank = 9 if name.endswith("to_q") else 4
        assert layer.scaling["default"] == pytest.approx(6 / math.sqrt(rank))


def update(file: Path) -> Tensor:
    """All that a file adds to the base, in one row."""
    held = load_file(file)
    downs = sorted(name for name in held if name.endswith("lora_A.weight"))
    products = [held[name.replace("lora_A", "lora_B")].flatten(1) @ held[name].flatten(1) for name in downs]
    return torch.cat([product.flatten() for product in products])


@pytest.mark.parametrize("variant", [each for each in VARIANTS if each != "dora"])
def test_an_export_at_a_weight_is_that_share_of_the_way_from_the_base(variant: str, base_folder: Any, tmp_path: Path):
    base, found, losses = base_folder("stable_diffusion"), {}, {}
    for weight in (1.0, 0.25):
        settings = at_toy_size({"variant": variant, "text_encoder": True, "export_weight": weight})
        folder, ema = tmp_path / str(weight), {"ema": 0.5, "batch_size": 1, "steps": 3}
        result = run.train(lessons.recipe(base, folder, "lora", settings, train=ema))
        assert result.verdict.passed
        taught = [line["loss"] for line in lessons.lines(folder / "run") if "loss" in line]
        found[weight], losses[weight] = update(result.files[0]), taught
    assert losses[1.0] == losses[0.25]  # what is trained is the same
    torch.testing.assert_close(found[0.25], found[1.0] / 4, rtol=1e-4, atol=1e-6)


def test_what_is_judged_on_the_way_is_what_would_go_out(base_folder: Any, tmp_path: Path):
    at_work = run.prepare(lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", {"export_weight": 0.25}))
    at_work.loop()
    with at_work.trainer.averaged():
        shown = at_work.probe(at_work.family)
    at_work.finish()
    fresh = run.load_family(at_work.recipe)
    load_adapters(fresh.pipeline, [tmp_path / "run" / LORA_FILE])
    torch.testing.assert_close(at_work.probe(fresh), shown, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(at_work.probe(at_work.family), shown, atol=1e-3)  # training could go on from where it was


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_has_the_rank_of_its_pattern(variant: str, base_folder: Any, tmp_path: Path):
    ranks = {"rank": 2, "rank_pattern": {"up_blocks": 1, "mid_block.attentions": 3}}
    at_work = prepare(base_folder("stable_diffusion"), tmp_path, variant=variant, **ranks)
    found = {
        name.split(".")[0]: part.r["default"]
        for name, part in at_work.family.denoiser.named_modules()
        if isinstance(getattr(part, "r", None), dict)
    }
    assert found == {"down_blocks": 2, "mid_block": 3, "up_blocks": 1}


def test_a_pattern_that_names_nothing_is_refused(base_folder: Any, tmp_path: Path):
    patterns = {"rank_pattern": {"down_blocks.9": 8, "to_q": 8}, "alpha_pattern": {"q_proj": 1.0}}
    with pytest.raises(UserError) as error:
        prepare(base_folder("stable_diffusion"), tmp_path, **patterns)
    assert [problem.split(" names")[0] for problem in error.value.problems] == [
        "method.rank_pattern: 'down_blocks.9'",
        "method.alpha_pattern: 'q_proj'",
    ]


def test_the_lengths_of_a_dora_stay_in_full_precision(base_folder: Any, tmp_path: Path):
    result = train_to_float16(base_folder("stable_diffusion"), tmp_path, {}, variant="dora", text_encoder=True)
    weights = load_file(result.files[0])
    assert all((value.dtype == torch.float32) == ("magnitude" in name) for name, value in weights.items())
    assert any(name.startswith("text_encoder") and "magnitude" in name for name in weights)


def test_a_lokr_that_is_no_small_file_is_refused_before_it_is_trained(base_folder: Any, tmp_path: Path):
    with pytest.raises(UserError, match=r"method\.variant: .*larger than the layer itself.*method\.rank"):
        prepare(base_folder("stable_diffusion"), tmp_path, variant="lokr", rank=64)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"variant": "oft"}, "variant: oft turns the base's weights"),
        ({"variant": "dorra"}, "variant: "),
        ({"variant": "pissa", "dropout": 0.1}, "dropout: with variant: pissa"),
        ({"variant": "lokr", "dropout": 0.1}, "dropout: with variant: lokr"),
        ({"variant": "dora", "factor": 8}, "factor: is for variant: lokr"),
    ],
)
def test_settings_that_a_variant_cannot_have_are_refused_with_the_reason(settings: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        build(LoRA, {"name": "lora", **settings})
