"""The loop: resumed, accumulated and shared runs equal the plain one; what must not disturb it does not."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import lessons
import pytest
import tiny
import torch
from safetensors.torch import load_file

from finetune import checkpoint, run
from finetune.errors import UserError
from finetune.families.base import families
from finetune.methods.lora import WITHOUT_DROPOUT
from finetune.objectives import Diffusion
from finetune.trainer import NonFiniteLoss

# Five pictures and four a step: a step ends in the middle of an epoch.
HARD = {
    "steps": 6,
    "batch_size": 4,
    "accumulate": 2,
    "schedule": "cosine",
    "warmup": 1,
    "ema": 0.9,
    "min_snr_gamma": 5.0,
    "noise_offset": 0.1,
}
DRAWN = {"crop": "random", "flip": True}


def weights(at_work: run.Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in at_work.trainer.student.state_dict().items()}


def lines(at_work: run.Run) -> list[dict[str, Any]]:
    return lessons.lines(at_work.folder)


def hard(base_folder: Any, case: tuple[str, ...], output: Path, pictures: Path, **train: Any) -> Any:
    family, variant, method, way = case
    settings = dict(lessons.WAYS[method][way])
    takes_dropout = "denoiser" not in settings and settings.get("variant") not in WITHOUT_DROPOUT
    if method in ("lora", "dreambooth", "pivotal_tuning") and takes_dropout:
        settings["dropout"] = 0.2
    hardest = {name: value for name, value in HARD.items() if name != "min_snr_gamma" or has_snr(family)}
    return lessons.recipe(
        base_folder(family, variant), output, method, settings, pictures, train=hardest | train, dataset=DRAWN
    )


def has_snr(family: str) -> bool:
    return families[family].objective_class is Diffusion


# Every way once, and every family with every method.
RESUMED = [
    case for case in lessons.CASES if case[:2] == ("stable_diffusion", "epsilon") or case in lessons.FAMILY_X_METHOD
]


@pytest.mark.parametrize("case", RESUMED, ids=lessons.name)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    case: tuple[str, ...], base_folder: Any, tmp_path: Path
):
    pictures = tiny.save_pictures(tmp_path / "pictures", count=5, size=48)
    whole = run.prepare(hard(base_folder, case, tmp_path / "whole", pictures))
    whole.loop()
    recipe = hard(base_folder, case, tmp_path / "halves", pictures, checkpoint_every=1)
    first = run.prepare(recipe)
    stop_after(first, 4)
    second = run.prepare(recipe, resume=True)
    assert second.trainer.step == 4
    start = weights(second)
    second.loop()
    assert any(not torch.equal(start[name], value) for name, value in weights(second).items())
    assert lines(second) == lines(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(second).items())
    with whole.trainer.averaged(), second.trainer.averaged():
        assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(second).items())


def stop_after(at_work: run.Run, steps: int) -> None:
    """Ctrl-C while the given step is at work."""
    update = at_work.trainer._update

    def interrupted_update() -> Any:
        if at_work.trainer.step == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update()

    at_work.trainer._update = interrupted_update
    with pytest.raises(run.Stopped):
        at_work.loop()
    assert at_work.trainer.step == steps


def test_accumulation_changes_the_memory_and_not_the_result(base_folder: Any, tmp_path: Path):
    case = ("stable_diffusion", "epsilon", "lora", "plain")
    pictures = tiny.save_pictures(tmp_path / "pictures")
    runs = []
    for accumulate in (1, 2, 4):
        output = tmp_path / str(accumulate)
        at_work = run.prepare(
            lessons.recipe(
                base_folder(*case[:2]),
                output,
                *case[2:],
                pictures,
                train={"batch_size": 4, "accumulate": accumulate, "optimizer": "torch.optim.SGD"},
            )
        )
        at_work.loop()
        runs.append(at_work)
    for other in runs[1:]:
        assert [line["pictures"] for line in lines(other)] == [line["pictures"] for line in lines(runs[0])]
        for name, value in weights(other).items():
            torch.testing.assert_close(value, weights(runs[0])[name], rtol=1e-4, atol=1e-6)


def test_two_processes_see_the_samples_of_one_and_learn_the_same(base_folder: Any, tmp_path: Path):
    pictures = tiny.save_pictures(tmp_path / "pictures")
    train = {"batch_size": 4, "optimizer": "torch.optim.SGD", "learning_rate": 0.1, "max_grad_norm": 0.5}
    recipes = {
        count: lessons.recipe(
            base_folder("stable_diffusion"), tmp_path / str(count), "dreambooth", "images", pictures, train=train
        )
        for count in (1, 2)
    }
    alone = run.prepare(recipes[1])
    alone.loop()
    alone.finish()
    (tmp_path / "recipe.yaml").write_text(recipes[2].to_yaml())
    done = lessons.on_two("train", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x " in done.stdout
    together = lessons.lines(tmp_path / "2" / "run")
    for one, two in zip(lines(alone), together, strict=True):
        assert one["pictures"] == two["pictures"]
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-4)
        assert math.isclose(one["grad_norm"], two["grad_norm"], rel_tol=1e-3)
    file = "run/pytorch_lora_weights.safetensors"
    ours, theirs = load_file(tmp_path / "1" / file), load_file(tmp_path / "2" / file)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)


def test_what_a_run_took_is_told_once_and_counts_all_its_sessions(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain", train={"checkpoint_every": 2})
    at_work = run.prepare(recipe)
    at_work.trainer.cost.before = {"seconds": 100.0, "peak_gib": 77.0}
    reports = at_work.trainer.steps()
    next(reports), next(reports)
    at_work.save_checkpoint()
    at_work.output.close()
    again = run.prepare(recipe, resume=True)
    again.loop()
    text = (again.folder / "metrics.jsonl").read_text()
    [took] = [json.loads(line) for line in text.splitlines() if "seconds" in line]
    assert 100 < took["seconds"] < 200 and took["step"] == recipe.train.steps
    assert took.get("peak_gib") == (77.0 if torch.cuda.is_available() else None)


def test_validation_pictures_disturb_nothing(base_folder: Any, tmp_path: Path):
    pictures = tiny.save_pictures(tmp_path / "pictures")
    runs = []
    for every in (None, 1):
        way = {"rank": 4, "dropout": 0.3}
        recipe = lessons.recipe(
            base_folder("stable_diffusion"), tmp_path / str(every), "lora", way, pictures, validation={"every": every}
        )
        at_work = run.prepare(recipe)
        at_work.loop()
        runs.append(at_work)
    assert lines(runs[0]) == lines(runs[1])
    assert all(torch.equal(value, weights(runs[1])[name]) for name, value in weights(runs[0]).items())


def test_the_exported_weights_are_the_moving_average(base_folder: Any, tmp_path: Path):
    at_work = run.prepare(
        lessons.recipe(base_folder("stable_diffusion"), tmp_path, "textual_inversion", "one-vector", train={"ema": 0.5})
    )
    at_work.loop()
    live = next(iter(weights(at_work).values()))
    result = at_work.finish()
    (exported,) = load_file(result.files[0]).values()
    assert not torch.equal(exported, live)
    with at_work.trainer.averaged():
        assert torch.equal(exported, next(iter(weights(at_work).values())))


def test_a_run_that_diverges_stops_before_the_update_and_names_its_pictures(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain")
    at_work = run.prepare(recipe)
    report = next(at_work.trainer.steps())
    good = weights(at_work)
    at_work.family.denoiser.conv_out.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLoss, match=r"step 2: the loss is nan.*\.png"):
        at_work.loop()
    assert report.step == 1 and math.isfinite(report.loss)
    assert all(torch.equal(value, good[name]) for name, value in weights(at_work).items())
    found = checkpoint.newest(at_work.folder / run.CHECKPOINTS)
    assert found is not None and found.name == "step-000001"


def test_a_changed_recipe_cannot_resume_and_the_difference_is_named(base_folder: Any, tmp_path: Path):
    case = base_folder("stable_diffusion"), tmp_path, "lora"
    pictures = tiny.save_pictures(tmp_path / "pictures")
    at_work = run.prepare(lessons.recipe(*case, {"rank": 4}, pictures))
    stop_after(at_work, 2)
    with pytest.raises(UserError, match=r"method\.rank: was 4, is now 8"):
        run.prepare(lessons.recipe(*case, {"rank": 8}, pictures), resume=True)


def test_settings_that_have_come_since_do_not_keep_a_checkpoint_from_going_on(
    base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = lessons.recipe(
        base_folder("stable_diffusion"), tmp_path, "lora", "plain", tiny.save_pictures(tmp_path / "pictures")
    )
    older = recipe.dump()
    del older["train"]["ema"], older["method"]["variant"], older["dataset"]["buckets"]
    with monkeypatch.context() as patch:
        patch.setattr(type(recipe), "dump", lambda _: older)
        stop_after(run.prepare(recipe), 2)
    assert run.prepare(recipe, resume=True).trainer.step == 2


def test_an_earlier_run_is_never_overwritten_unasked(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain")
    run.train(recipe)
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        run.prepare(recipe)


def test_an_uneven_share_is_refused_with_the_number_that_would_do(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(
        base_folder("stable_diffusion"), tmp_path, "lora", "plain", train={"batch_size": 4, "accumulate": 2}
    )
    object.__setattr__(recipe.train, "accumulate", 3)
    with pytest.raises(UserError, match="multiple of 3"):
        run.prepare(recipe)


@pytest.mark.parametrize("case", lessons.FAMILY_X_METHOD, ids=lessons.name)
def test_a_run_in_half_precision_passes_its_own_check(case: tuple[str, ...], base_folder: Any, tmp_path: Path):
    family, variant, method, way = case
    recipe = lessons.recipe(base_folder(family, variant), tmp_path, method, way, train={"precision": "bf16"})
    recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"dtype": "float16"})})
    assert run.train(recipe).verdict.passed


def test_a_folder_with_somebodys_samples_is_not_touched(base_folder: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain")
    (tmp_path / "run" / "samples").mkdir(parents=True)
    with pytest.raises(UserError, match="samples"):
        run.prepare(recipe)
    assert (tmp_path / "run" / "samples").is_dir()


@pytest.mark.parametrize(
    "train",
    [
        {"gradient_checkpointing": True},
        {"precision": "bf16"},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "prodigy", "learning_rate": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", lessons.FAMILY_X_METHOD, ids=lessons.name)
def test_settings_of_the_loop_work_with_every_method(
    train: dict[str, Any], case: tuple[str, ...], base_folder: Any, tmp_path: Path
):
    family, variant, method, way = case
    settings = dict(lessons.WAYS[method][way])
    if method == "pivotal_tuning" and train.get("optimizer") == "prodigy":
        settings["word_learning_rate"] = train["learning_rate"]
    at_work = run.prepare(lessons.recipe(base_folder(family, variant), tmp_path, method, settings, train=train))
    at_work.loop()
    assert all(math.isfinite(line["loss"]) for line in lines(at_work))
    assert all(value.dtype == torch.float32 for value in weights(at_work).values())


SOME_BLOCKS = {
    "stable_diffusion": ["up_blocks", "down_blocks.0"],
    "stable_diffusion_xl": ["mid_block"],
    "stable_diffusion_3": ["transformer_blocks.0"],
    "flux": ["transformer_blocks", "single_transformer_blocks.0"],
    "z_image": ["layers"],
}


@pytest.mark.parametrize("family", tiny.BASES)
def test_gradient_checkpointing_of_all_blocks_or_some_changes_no_result(family: str, base_folder: Any, tmp_path: Path):
    pictures, runs, way = tiny.save_pictures(tmp_path / "pictures"), [], {"rank": 4}
    passes = Counter()
    for number, wanted in enumerate((False, True, SOME_BLOCKS[family])):
        train = {"gradient_checkpointing": wanted}
        recipe = lessons.recipe(base_folder(family), tmp_path / str(number), "lora", way, pictures, train=train)
        runs.append(run.prepare(recipe))
        block = runs[-1].family.denoiser.get_submodule(SOME_BLOCKS[family][0])
        layer = next(part for part in block.modules() if not list(part.children()))
        layer.register_forward_pre_hook(lambda *_, number=number: passes.update([number]))
        list(runs[-1].trainer.steps())
    assert (passes[0], passes[2]) == (4, 8)  # once for each step, and once more
    for other in runs[1:]:
        for name, value in weights(runs[0]).items():
            torch.testing.assert_close(value, weights(other)[name], rtol=1e-4, atol=1e-6)


def test_a_block_that_is_not_there_cannot_be_computed_anew(base_folder: Any, tmp_path: Path):
    train = {"gradient_checkpointing": ["up_block.0", "mid_block"]}
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain", train=train)
    with pytest.raises(UserError, match=r"no part is named 'up_block.0'. Did you mean 'up_blocks.0'") as caught:
        run.prepare(recipe)
    assert len(caught.value.problems) == 1


def test_zero_terminal_snr_needs_a_base_that_predicts_v(base_folder: Any, tmp_path: Path):
    train = {"zero_terminal_snr": True}
    with pytest.raises(UserError, match="predict v"):
        run.prepare(
            lessons.recipe(base_folder("stable_diffusion", "epsilon"), tmp_path / "a", "lora", "plain", train=train)
        )
    at_work = run.prepare(
        lessons.recipe(base_folder("stable_diffusion", "v_prediction"), tmp_path / "b", "lora", "plain", train=train)
    )
    assert at_work.family.objective.alphas_cumprod[-1] == 0
    assert at_work.family.pipeline.scheduler.config.timestep_spacing == "trailing"
    at_work.loop()
    assert all(math.isfinite(line["loss"]) for line in lines(at_work))
