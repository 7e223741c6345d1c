"""The prior-preservation loss at every batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lessons
import pytest
import torch

from finetune import run
from finetune.config import build
from finetune.methods.base import methods
from finetune.request import cache_folder


def dreambooth(**settings: Any) -> Any:
    return build(methods["dreambooth"], {"name": "dreambooth", "class_prompt": "a thing", **settings})


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_loss_is_the_mean_of_the_concept_plus_lambda_times_the_mean_of_the_prior(size: int):
    concept, prior = torch.rand(size), torch.rand(size)
    loss = dreambooth(prior_weight=0.3).reduce(torch.cat([concept, prior]), num_prior=size)
    torch.testing.assert_close(loss, concept.mean() + 0.3 * prior.mean())


def test_an_empty_prior_is_no_term_and_not_nan():
    concept = torch.rand(2)
    torch.testing.assert_close(dreambooth().reduce(concept, num_prior=0), concept.mean())


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("prior", ["images", "prediction"])
def test_captions_and_pictures_stay_together_whatever_the_batch_size(
    batch_size: int, prior: str, base_folder: Any, tmp_path: Path
):
    # Five pictures, three class images: no batch size divides both, so epochs end within a batch.
    way = {"prior": prior, "class_prompt": "a thing", "num_class_images": 3}
    recipe = lessons.recipe(
        base_folder("stable_diffusion"), tmp_path, "dreambooth", way, train={"batch_size": batch_size}
    )
    for report in run.prepare(recipe).trainer.steps():
        concept, class_half = report.draws[:batch_size], report.draws[batch_size:]
        assert len(concept) == len(class_half) == batch_size
        assert all(draw.caption == "a <it> thing" and "pictures" in draw.path for draw in concept)
        assert all(draw.caption == "a thing" for draw in class_half)
        assert all(("class-images" in draw.path) == (prior == "images") for draw in class_half)


def test_both_halves_have_noise_and_time_of_their_own(base_folder: Any, tmp_path: Path):
    way = {"prior": "prediction", "class_prompt": "a thing"}
    trainer = run.prepare(lessons.recipe(base_folder("stable_diffusion"), tmp_path, "dreambooth", way)).trainer
    batch = trainer._drawn(0)[1][0]
    assert len({tuple(noise.flatten()[:4].tolist()) for noise in batch.noise}) == 4


@pytest.mark.parametrize(("method", "way"), [("dreambooth", {}), ("pivotal_tuning", {"init": "thing"})])
def test_before_the_first_step_the_base_agrees_with_itself_on_the_class_prompt(
    method: str, way: dict[str, str], base_folder: Any, tmp_path: Path
):
    way = {"prior": "prediction", "class_prompt": "a thing", **way}
    trainer = run.prepare(lessons.recipe(base_folder("stable_diffusion"), tmp_path, method, way)).trainer
    losses = trainer.student(trainer._drawn(0)[1][0])
    assert torch.all(losses[2:].abs() < 1e-10) and torch.all(losses[:2] > 1e-3)


def test_pivotal_tuning_disturbs_its_class_less_with_a_prior_than_without(base_folder: Any, tmp_path: Path):
    left = {}
    for prior in ("none", "prediction"):
        way = {"rank": 4, "init": "thing", "prior": prior, "class_prompt": "a thing", "prior_weight": 10.0}
        train = {"steps": 12, "learning_rate": 0.003}
        recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path / prior, "pivotal_tuning", way, train=train)
        trainer = run.prepare(recipe).trainer
        family = trainer.student.family
        ids = family.tokenize(["a thing"])
        noised, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])

        def answer(family: Any = family, ids: Any = ids, noised: Any = noised, time: Any = time) -> torch.Tensor:
            with family.looking():
                return family.denoise(noised, time, family.encode_prompt(ids), torch.zeros(1, 6))

        before = answer()
        for _ in trainer.steps():
            pass
        left[prior] = (answer() - before).square().mean()
    assert 0 < left["prediction"] < 0.5 * left["none"]


def test_min_snr_weights_both_halves_sample_by_sample(base_folder: Any, tmp_path: Path):
    case = base_folder("stable_diffusion"), tmp_path, "dreambooth", "images"
    trainer = run.prepare(lessons.recipe(*case, train={"min_snr_gamma": 5.0, "batch_size": 3})).trainer
    batch = trainer._drawn(0)[1][0]
    losses = trainer.student(batch)
    assert losses.shape == (6,)
    trainer.student.family.objective = type(trainer.student.family.objective)(
        trainer.student.family.objective.alphas_cumprod
    )
    plain = trainer.student(batch)
    alpha = trainer.student.family.objective.alphas_cumprod[batch.time]
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(losses, plain * snr.clamp(max=5) / snr)


def test_class_images_are_made_once_for_two_runs(base_folder: Any, tmp_path: Path):
    made = []
    for attempt in ("first", "second"):
        recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path / attempt, "dreambooth", "images")
        run.prepare(recipe)
        made.append({path: path.stat().st_mtime_ns for path in cache_folder().rglob("*.png")})
    assert made[0] == made[1] and len(made[0]) == 3
