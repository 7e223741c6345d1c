"""The estimate of GPU memory: against peaks measured on an H200, against a real step, and by what must change it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lessons
import pytest
import real_shapes
import tiny
import torch
from torch.nn import functional as F

from finetune import cli
from finetune.config import build
from finetune.duration import Machine, duration
from finetune.errors import UserError
from finetune.families.base import families
from finetune.forecast import Disk, Forecast
from finetune.memory import Memory, estimate, table
from finetune.methods.base import methods
from finetune.quantize import layers
from finetune.recipe import Recipe
from finetune.rehearsal import Ledger, LikeGpu
from finetune.skeleton import build as build_skeleton

GIB = 2**30
WHOLE = {"denoiser": "whole", "prior": "none"}
# Published counts, in millions, and what they are of.
COUNTS = {
    "stable_diffusion": {"unet": 859.5, "text_encoder": 123.1, "vae": 83.7},
    "stable_diffusion_xl": {"unet": 2567, "text_encoder": 123.1, "text_encoder_2": 694.7, "vae": 83.7},
    "stable_diffusion_3": {"transformer": 2243, "text_encoder_2": 694.7, "text_encoder_3": 4762, "vae": 83.8},
    "flux": {"transformer": 11901, "text_encoder": 123.1, "text_encoder_2": 4762, "vae": 83.8},
    "z_image": {"transformer": 6155, "text_encoder": 4022, "vae": 83.8},
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe[Any]]:
    """Recipes on the configs of real bases, a LoRA unless they say otherwise."""
    folder = tmp_path_factory.mktemp("real")
    folders = cache(lambda family: real_shapes.BASES[family](folder / family))

    def recipe(family: str, resolution: int = 512, batch: int = 1, dtype: str = "auto", **method: Any) -> Recipe[Any]:
        method = method or {"name": "lora", "rank": 16}
        tree = {
            "name": "memory",
            "base": {"source": str(folders(family)), "dtype": dtype},
            "method": method,
            "dataset": {"folder": str(folder), "resolution": resolution},
            "train": {"steps": 1, "batch_size": batch, "precision": "bf16"},
            "output": {"folder": str(folder / "run")},
        }
        return build(Recipe[methods[method["name"]]], tree)

    return recipe


@pytest.fixture(scope="module")
def measure(real: Any) -> Callable[..., Memory]:
    """Estimates of them with the layers of peft, which is what was measured, each made once."""

    def estimated(*arguments: Any) -> Memory:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("finetune.variants.fuse", lambda _: None)
            return estimate(real(*arguments))

    return cache(estimated)


@pytest.fixture(scope="module")
def toy(base_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Memory]:
    """Estimates of short lessons on toys, each made once: by family, method and settings of the sections."""
    folder, known = tmp_path_factory.mktemp("toys"), dict[str, Memory]()

    def toy(family: str = "stable_diffusion", method: str = "lora", way: Any = "plain", **sections: Any) -> Memory:
        recipe = lessons.recipe(base_folder(family), folder, method, way, folder, **sections)
        if recipe.digest() not in known:
            known[recipe.digest()] = estimate(recipe)
        return known[recipe.digest()]

    return toy


@pytest.mark.parametrize("family", real_shapes.BASES)
def test_a_real_base_without_weights_has_the_published_number_of_parameters(family: str, real: Any):
    pipeline = build_skeleton(real(family), torch.device("meta")).pipeline
    for name, millions in COUNTS[family].items():
        counted = sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
        assert counted / 1e6 == pytest.approx(millions, rel=1e-3), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.BASES)
def test_a_base_without_weights_has_the_shapes_and_precisions_of_the_loaded_one(
    family: str, dtype: torch.dtype, base_folder: Any, tmp_path: Path
):
    kept = {"dtype": str(dtype).removeprefix("torch.")}
    recipe = lessons.recipe(base_folder(family), tmp_path, "lora", "plain", tmp_path, base=kept)
    skeleton = build_skeleton(recipe, torch.device("meta"))
    source = type(skeleton.source)(str(base_folder(family)), dtype=dtype)
    loaded = families[family].load(source, min_snr_gamma=None, zero_terminal_snr=False)
    for ours, theirs in zip(skeleton.parts(), loaded.parts(), strict=True):
        described = [{name: (p.shape, p.dtype) for name, p in part.named_parameters()} for part in (ours, theirs)]
        assert described[0] == described[1]
        assert all(parameter.is_meta for parameter in ours.parameters())


# Measured on one H200 with random weights: bf16, LoRA of rank 16 on q, k, v and out, AdamW, 512 and 1024 px.
@pytest.mark.parametrize(
    ("family", "resolution", "alone", "more", "together"),
    [("stable_diffusion", 512, 2.8, 7, 10.6), ("stable_diffusion_xl", 1024, 12.7, 3, 34.5)],
)
def test_a_bare_step_is_within_5_percent_of_what_was_measured(
    family: str, resolution: int, alone: float, more: int, together: float, measure: Any
):
    """Of one picture and of several, with the denoiser alone on the GPU."""
    memory = measure(family, resolution)
    assert set(memory.resting) == memory.weights.keys() - {"unet"}
    assert memory.step / GIB == pytest.approx(alone, rel=0.05)
    assert (memory.step + more * memory.activations) / GIB == pytest.approx(together, rel=0.05)


# The fullest moment of a step on one H200 as torch counted it, with all that is fused; torch 2.11, 2026-11-23.
MEASURED = {
    ("stable_diffusion", 512, 1): 2.39,
    ("stable_diffusion", 512, 8): 6.87,
    ("stable_diffusion_xl", 1024, 1): 9.71,
    ("stable_diffusion_xl", 1024, 4): 22.66,
}


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_a_fused_step_takes_no_more_than_is_said_and_not_much_less(case: tuple[Any, ...], real: Any):
    said = estimate(real(*case)).step / GIB
    assert 0.98 * MEASURED[case] < said < 1.2 * MEASURED[case]


@pytest.mark.parametrize(("optimizer", "measured"), [("adamw", 13.43), ("adamw_8bit", 8.70)])
def test_a_whole_unet_takes_what_was_measured(optimizer: str, measured: float, real: Any):
    recipe = real("stable_diffusion", dtype="float32", name="dreambooth", **WHOLE)
    train = recipe.train.model_copy(update={"optimizer": optimizer})
    said = estimate(recipe.model_copy(update={"train": train})).step / GIB
    assert said == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("family", "resolution", "measured", "tolerance"),
    [
        # 1 GiB above the bare step, of which the VAE and the text encoder are 0.4; the rest is not explained.
        ("stable_diffusion", 512, 3.8, 0.2),
        ("stable_diffusion_xl", 1024, 13.8, 0.05),
    ],
)
def test_a_script_with_all_parts_on_the_gpu_is_near_what_was_measured(
    family: str, resolution: int, measured: float, tolerance: float, measure: Any
):
    """diffusers' train_dreambooth_lora.py and its like for SDXL, one picture."""
    memory = measure(family, resolution)
    everything = memory.step + sum(memory.weights[name] for name in memory.resting)
    assert everything / GIB == pytest.approx(measured, rel=tolerance)


# Counted by another program (calflops and formulas), in TFLOP of one picture: a pass, a step of a LoRA, the VAE.
FLOPS = {("stable_diffusion", 512): (0.803, 1.72, 1.12), ("stable_diffusion_xl", 1024): (6.76, 14.19, 4.88)}


@pytest.mark.parametrize("base", FLOPS)
def test_the_work_of_a_step_is_within_5_percent_of_what_was_counted_elsewhere(base: tuple[str, int], measure: Any):
    work = measure(*base).work
    counted = (work["pass"].flops / 2, work["step"].flops, work["picture"].flops)
    assert [flops / 1e12 for flops in counted] == pytest.approx(FLOPS[base], rel=0.05)


H200 = Machine("H200", "cuda", 790e12)


@pytest.mark.parametrize(
    ("family", "resolution", "batch", "plain", "captured"),
    [
        ("stable_diffusion", 512, 1, 167, 17.1),
        ("stable_diffusion", 512, 8, 167, 56.8),
        ("stable_diffusion_xl", 1024, 1, 439, 68.9),
        ("stable_diffusion_xl", 1024, 4, 369, 169),
    ],
)
def test_the_time_of_a_step_is_as_near_to_what_was_measured_as_is_said(
    family: str, resolution: int, batch: int, plain: float, captured: float, measure: Any, real: Any
):
    """Milliseconds on one H200; plain with the layers of peft, captured with all that is fused."""

    def said(memory: Memory, capture: bool) -> float:
        work = dict(memory.work)
        if capture is False:
            work["step"] = work["step"].times(batch, 1)  # several pictures are as many operations, each a larger one
        recipe = real(family, resolution)
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"capture": capture})})
        expected = Forecast({(resolution, resolution): 1}, 0, 0.0, None, Disk(0, 0, 0, 0, 0, 0))
        return 1000 * duration(recipe, work, expected, 1, H200).phases["steps"]

    assert said(measure(family, resolution), capture=False) == pytest.approx(plain, rel=0.34)
    assert said(estimate(real(family, resolution, batch)), capture=True) == pytest.approx(captured, rel=0.4)


def test_what_is_trained_and_kept_equals_a_real_step_on_the_cpu(base_folder: Any, tmp_path: Path):
    """The toy's own numbers: parameters, optimizer state and what autograd keeps for the backward pass."""
    from finetune import run

    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain")
    memory = estimate(recipe)
    trainer = run.prepare(recipe).trainer
    family, student = trainer.student.family, trainer.student
    weights = {id(tensor.untyped_storage()) for part in family.parts() for tensor in part.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next(trainer.steps())
    state = [value for held in trainer.optimizer.state.values() for value in held.values() if value.numel() > 1]
    assert memory.trained == 4 * student.num_parameters()
    assert memory.optimizer == sum(value.nbytes for value in state)
    saved = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    assert memory.activations == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("family", tiny.BASES)
def test_every_family_can_be_estimated_with_its_text_encoders(family: str, toy: Any):
    memory = toy(family, "textual_inversion", "one-vector", train={"precision": "bf16"})
    assert min(memory.trained, memory.optimizer, memory.activations) > 0
    assert (
        memory.run >= memory.step > sum(memory.weights[name] for name in memory.weights if name not in memory.resting)
    )


@pytest.mark.parametrize(("method", "way"), [(method, way) for method, ways in lessons.WAYS.items() for way in ways])
def test_every_way_of_every_method_can_be_estimated(method: str, way: str, toy: Any):
    memory = toy(method=method, way=way)
    assert memory.trained > 0 and 0 <= memory.gradients <= memory.trained


def test_parts_that_no_step_needs_are_not_counted_in_it(toy: Any):
    frozen, taught = toy(), toy(method="textual_inversion", way="one-vector")
    assert (frozen.resting, taught.resting) == (("vae", "text_encoder"), ("vae",))
    rest = frozen.trained + frozen.optimizer + frozen.activations + frozen.gradients + frozen.transient
    assert frozen.step - rest == frozen.weights["unet"]


def test_attention_never_counts_a_square_matrix(toy: Any):
    small, large = (toy(dataset={"resolution": size}).activations for size in (32, 64))
    assert large == pytest.approx(4 * small, rel=0.1)


def test_a_micro_batch_is_what_counts(toy: Any):
    half, whole, parts = (toy(train=train) for train in ({}, {"batch_size": 4}, {"batch_size": 4, "accumulate": 2}))
    assert parts.activations == half.activations
    assert whole.activations == pytest.approx(2 * half.activations, rel=0.01)
    assert parts.gradients >= parts.trained  # those of the first part are there all through the second


def test_the_prior_half_of_a_batch_counts(toy: Any):
    without, images = toy(), toy(method="dreambooth", way="images")
    assert images.activations == pytest.approx(2 * without.activations, rel=0.1)


@pytest.mark.parametrize(("family", "some"), [("stable_diffusion", "up_blocks"), ("flux", "transformer_blocks")])
def test_gradient_checkpointing_keeps_less_and_computes_a_block_anew(family: str, some: str, toy: Any):
    plain, partly, checked = (
        toy(family, train={"gradient_checkpointing": wanted, "precision": "bf16"}) for wanted in (False, [some], True)
    )
    assert checked.activations < 0.7 * plain.activations
    assert partly.activations < 0.9 * plain.activations
    assert checked.transient > plain.transient
    assert checked.step < plain.step


@pytest.mark.parametrize(("optimizer", "bytes_each"), [("prodigy", 16), ("torch.optim.SGD", 0), ("adamw_8bit", 2)])
def test_the_state_of_each_optimizer_is_its_own(optimizer: str, bytes_each: int, toy: Any):
    way = {"rank": 512, "targets": ["attention"]}  # 8-bit AdamW keeps small tensors in 32 bits
    memory = toy(way=way, train={"optimizer": optimizer, "learning_rate": 1.0})
    assert memory.optimizer / (memory.trained / 4) == pytest.approx(bytes_each, rel=0.15)


def test_an_average_takes_as_much_as_what_it_is_of(toy: Any):
    assert toy().average == 0
    memory = toy(train={"ema": 0.9})
    assert memory.average == memory.trained


def test_a_whole_denoiser_is_trained_in_float32_beside_its_base(toy: Any):
    memory = toy(method="dreambooth", way=WHOLE, train={"precision": "bf16"})
    assert memory.trained == 4 * sum(part.numel() for part in tiny.stable_diffusion().unet.parameters())
    assert memory.weights["unet"] == 0  # it waits on the CPU


@pytest.mark.parametrize(("quantize", "bits"), [("nf4", 4.127), ("int8", 8), ("fp8", 8)])
def test_packed_weights_take_their_bits(quantize: str, bits: float, toy: Any, base_folder: Any):
    settings = {"train": {"precision": "bf16"}, "base": {"source": str(base_folder("flux"))}}
    plain = toy("flux", **settings)
    settings["base"]["quantize"] = quantize
    packed = toy("flux", **settings)
    transformer = build_skeleton(
        lessons.recipe(base_folder("flux"), Path(), "lora", "plain", Path()), torch.device("meta")
    )
    numbers = sum(transformer.denoiser.get_submodule(name).weight.numel() for name in layers(transformer.denoiser))
    saved = plain.weights["transformer"] - packed.weights["transformer"]
    assert saved == pytest.approx(numbers * (16 - bits) / 8, rel=0.01)
    assert packed.weights["text_encoder_2"] < plain.weights["text_encoder_2"]


def test_a_longer_caption_takes_more_of_z_image(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("z_image"), tmp_path, "lora", "plain", tmp_path)
    short, long = (estimate(recipe, ["a {}" + count * " red"]).activations for count in (1, 60))
    assert long > 1.2 * short


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: F.linear(x, torch.empty(4, 8, device=x.device)),
    "conv2d": lambda x: F.conv2d(x, torch.empty(4, 32, 3, 3, device=x.device)),
    "matmul": lambda x: torch.matmul(x, x),
    "@": lambda x: x @ x,
    "einsum": lambda x: torch.einsum("abcd,abed->abce", x, x),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x, 4),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "softmax": lambda x: x.softmax(-1),
    "pow": lambda x: x.pow(2),
    "square": lambda x: x.square(),
    "**": lambda x: x**2,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "sum": lambda x: x.sum(),
    "cumsum": lambda x: x.cumsum(-1),
    "norm": lambda x: x.norm(),
    "mse_loss": lambda x: F.mse_loss(x, x),
    "mean": lambda x: x.mean(),
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "cat": lambda x: torch.cat([x, x]),
    "pad": lambda x: F.pad(x, (1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_decides_as_torchs_own_does_on_a_gpu(name: str, dtype: torch.dtype):
    """Torch's own runs here on tensors that only claim to be on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shape = (2, 32, 8, 8)
    gpu = LikeGpu(torch.bfloat16)
    with gpu, gpu.autocast():
        ours = FUNCTIONS[name](torch.empty(shape, dtype=dtype, device="meta")).dtype
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            assert ours == FUNCTIONS[name](torch.empty(shape, dtype=dtype, device="cuda")).dtype
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_a_trained_weight_is_cast_once_for_a_forward_pass():
    ledger, gpu = Ledger(), LikeGpu(torch.bfloat16)
    weight = torch.nn.Parameter(torch.empty(64, 64, device="meta"))
    inputs = torch.empty(1, 64, dtype=torch.bfloat16, device="meta")
    with ledger, gpu, gpu.autocast():
        F.linear(inputs, weight)
        F.linear(inputs, weight)
        assert ledger.held.total() == 2 * weight.numel()
        gpu.end_forward()
        F.linear(inputs, weight)
        assert ledger.held.total() == 0


def test_a_single_file_is_estimated_by_its_config(base_folder: Any, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.touch()
    base = {"source": str(file), "config": str(base_folder("flux")), "family": "flux"}
    recipe = lessons.recipe(base_folder("flux"), tmp_path, "lora", "plain", tmp_path, base=base)
    assert estimate(recipe).weights["transformer"] > 0


@pytest.mark.parametrize("family", ["auto", "flux"])
def test_a_base_whose_configs_cannot_be_had_is_named(family: str, tmp_path: Path):
    base = {"source": "someone/a-model", "family": family}
    recipe = lessons.recipe(tmp_path, tmp_path, "lora", "plain", tmp_path, base=base)
    with pytest.raises(UserError, match=r"base\.source: .*someone/a-model"):
        estimate(recipe)


def test_the_table_has_all_that_is_there_and_the_most(toy: Any):
    memory = toy(way={"rank": 512})
    lines = {line.split()[0]: line for line in table(memory)[1:]}
    assert {"unet", "vae", "trained", "optimizer", "activations", "step", "drawing", "run"} <= lines.keys()
    assert "average" not in lines
    assert "waits on the CPU" in lines["vae"]
    assert f"{memory.run / GIB:.2f}" in lines["run"]


def test_check_prints_it_when_asked(base_folder: Any, tmp_path: Path, monkeypatch: Any, capsys: Any):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain")
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    for options, shown in (([], False), (["--memory"], True)):
        monkeypatch.setattr("sys.argv", ["finetune", "check", str(path), *options])
        with pytest.raises(SystemExit):
            cli.main()
        printed = capsys.readouterr().out
        assert ("GiB" in printed) == ("\ntime " in printed) == ("CPU thread" in printed) == shown
