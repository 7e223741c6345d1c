"""Objectives against the papers' numbers, diffusers' schedulers, and predictors that are known to be optimal."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest
import tiny
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import Tensor

from finetune.errors import UserError
from finetune.objectives import Diffusion, Flow
from finetune.render import use_ddim

# Stable Diffusion's schedule, as its checkpoints write it.
CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
Prediction = Literal["epsilon", "v_prediction"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction")
EVERY_TIME = torch.arange(1000)


def objective(prediction: str = "epsilon", gamma: float | None = None, zero_terminal_snr: bool = False) -> Diffusion:
    config = {**CONFIG, "prediction_type": prediction}
    return Diffusion.from_scheduler(config, min_snr_gamma=gamma, zero_terminal_snr=zero_terminal_snr)


def draw(batch: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise and time."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn((2, batch, 4, 8, 8), generator=generator)
    return latents, noise, torch.randint(1000, (batch,), generator=generator)


@pytest.mark.parametrize(
    ("zero_terminal_snr", "values"),
    [
        (False, {0: 0.99915, 100: 0.894223, 500: 0.276333, 999: 0.00466010}),
        (True, {0: 0.99915, 500: 0.241019, 999: 0.0}),
    ],
    ids=["as trained", "zero terminal SNR"],
)
def test_the_noise_schedule_has_the_papers_values(zero_terminal_snr: bool, values: dict[int, float]):
    alphas = objective("v_prediction", zero_terminal_snr=zero_terminal_snr).alphas_cumprod
    assert alphas[list(values)].tolist() == pytest.approx(list(values.values()), rel=1e-5, abs=1e-12)
    assert alphas.dtype == torch.float32
    assert (alphas.diff() < 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noising_and_targets_equal_those_of_diffusers(prediction: Prediction, zero_terminal_snr: bool):
    scheduler: Any = DDPMScheduler(
        **CONFIG, clip_sample=False, prediction_type=prediction, rescale_betas_zero_snr=zero_terminal_snr
    )
    ours, (latents, noise, time) = objective(prediction, zero_terminal_snr=zero_terminal_snr), draw()
    # diffusers rescales through the betas, which costs it some digits.
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-3 if zero_terminal_snr else 0)
    close(ours.add_noise(latents, noise, time), scheduler.add_noise(latents, noise, time))
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, time)
    close(ours.target(latents, noise, time), target)


def test_a_checkpoint_that_was_trained_with_zero_terminal_snr_stays_so():
    config = {**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    found = Diffusion.from_scheduler(config, min_snr_gamma=None, zero_terminal_snr=False)
    torch.testing.assert_close(found.alphas_cumprod, objective(zero_terminal_snr=True).alphas_cumprod)


def test_v_gives_back_the_picture_and_the_noise():
    ours, (latents, noise, time) = objective("v_prediction"), draw()
    alpha = ours.alphas_cumprod[time].view(-1, 1, 1, 1)
    noised, v = ours.add_noise(latents, noise, time), ours.target(latents, noise, time)
    torch.testing.assert_close(alpha.sqrt() * noised - (1 - alpha).sqrt() * v, latents)
    torch.testing.assert_close((1 - alpha).sqrt() * noised + alpha.sqrt() * v, noise)


def test_a_prediction_that_is_neither_epsilon_nor_v_is_refused():
    with pytest.raises(UserError, match="sample"):
        objective("sample")


@pytest.mark.parametrize(("prediction", "mean"), [("epsilon", 0.916571), ("v_prediction", 0.294330)])
def test_min_snr_weights_have_the_papers_mean(prediction: str, mean: float):
    assert float(objective(prediction, 5).weight(EVERY_TIME).double().mean()) == pytest.approx(mean, abs=1e-6)


def test_min_snr_clips_the_first_147_levels():
    assert (objective("epsilon", 5).weight(EVERY_TIME) < 1).nonzero().flatten().tolist() == list(range(147))


@pytest.mark.parametrize("gamma", [1, 5, 20])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_min_snr_weighs_v_by_the_clipped_snr_over_snr_plus_one(gamma: float, zero_terminal_snr: bool):
    ours = objective("v_prediction", gamma, zero_terminal_snr)
    snr = ours.alphas_cumprod.double() / (1 - ours.alphas_cumprod.double())
    expected = snr.clamp(max=gamma) / (snr + 1)
    torch.testing.assert_close(ours.weight(EVERY_TIME).double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_without_gamma_every_level_weighs_one(prediction: str):
    weight = objective(prediction).weight(EVERY_TIME)
    assert weight.dtype == torch.float32 and (weight == 1).all()


@pytest.mark.parametrize("time", [0, 100, 500, 999])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_best_predictor_of_gaussian_latents_reaches_the_oracles_error(prediction: str, time: int):
    ours = objective(prediction)
    latents, noise = torch.randn((2, 64, 4, 32, 32), generator=torch.Generator().manual_seed(0))
    times = torch.full((64,), time)
    noised, alpha = ours.add_noise(latents, noise, times), float(ours.alphas_cumprod[time])
    # E[e | x_t] = sqrt(1 - ab) x_t leaves an error of ab; v is independent of x_t, which leaves all of its 1.
    guess, error = ((1 - alpha) ** 0.5 * noised, alpha) if prediction == "epsilon" else (0 * noised, 1.0)
    assert float((guess - ours.target(latents, noise, times)).square().mean()) == pytest.approx(error, rel=0.02)


def test_times_are_drawn_evenly_from_all_levels_and_from_the_generator_alone():
    ours, generator = objective(), torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    times = torch.cat([ours.sample_time(generator, torch.Size([1, 4, 8, 8])) for _ in range(20_000)])
    assert torch.equal(torch.get_rng_state(), state)
    assert (int(times.min()), int(times.max())) == (0, 999)
    assert float(times.float().mean()) == pytest.approx(499.5, abs=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noising_keeps_the_precision_of_the_latents(dtype: torch.dtype):
    latents, noise, time = draw()
    assert objective().add_noise(latents.to(dtype), noise.to(dtype), time).dtype == dtype


def sampler(scheduler: Any = None, zero_terminal_snr: bool = False) -> DDIMScheduler:
    pipeline = tiny.stable_diffusion("v_prediction")
    pipeline.scheduler = scheduler or pipeline.scheduler
    use_ddim(pipeline, zero_terminal_snr=zero_terminal_snr)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    return pipeline.scheduler


@pytest.mark.parametrize(
    "scheduler",
    [None, PNDMScheduler(**CONFIG, skip_prk_steps=True), EulerDiscreteScheduler(**CONFIG)],
    ids=["DDIM", "PNDM", "Euler"],
)
def test_fifty_ddim_steps_visit_981_to_1_whatever_sampler_the_base_came_with(scheduler: Any):
    ddim = sampler(scheduler)
    ddim.set_timesteps(50)
    assert ddim.timesteps.tolist() == list(range(981, 0, -20))
    torch.testing.assert_close(ddim.alphas_cumprod, objective().alphas_cumprod)


def test_a_ddim_step_follows_the_formula():
    ddim, (latents, noise, _) = sampler(), draw()
    ddim.set_timesteps(50)
    for time in (981, 501, 21, 1):
        alpha, before = ddim.alphas_cumprod[time], ddim.alphas_cumprod[max(time - 20, 0)]
        v = objective("v_prediction").target(latents, noise, torch.full((len(latents),), time))
        noised = objective().add_noise(latents, noise, torch.full((len(latents),), time))
        stepped = ddim.step(v, time, noised, return_dict=False)[0]
        torch.testing.assert_close(stepped, before.sqrt() * latents + (1 - before).sqrt() * noise, rtol=0, atol=1e-4)
        assert alpha < before


def test_zero_terminal_snr_samples_from_the_last_level_on_the_schedule_that_was_trained():
    ddim = sampler(zero_terminal_snr=True)
    ddim.set_timesteps(50)
    assert ddim.timesteps[0] == 999
    assert float(ddim.alphas_cumprod[-1]) == 0
    expected = objective(zero_terminal_snr=True).alphas_cumprod
    torch.testing.assert_close(ddim.alphas_cumprod, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_flow_times_are_shifted_as_stable_diffusion_3_is_sampled(seed: int):
    shape = torch.Size([1, 16, 64, 64])
    without, with_shift = (flow.sample_time(torch.Generator().manual_seed(seed), shape) for flow in (Flow(1), Flow(3)))
    torch.testing.assert_close(with_shift, 3 * without / (1 + 2 * without))
    torch.testing.assert_close(torch.logit(with_shift), torch.logit(without) + torch.log(torch.tensor(3.0)))


@pytest.mark.parametrize(("pixels", "shift"), [(512, 1.87761), (1024, 3.15819)])
def test_flow_shift_grows_with_the_number_of_patches_as_in_flux(pixels: int, shift: float):
    flow = Flow.from_scheduler({"use_dynamic_shifting": True}, min_snr_gamma=None, zero_terminal_snr=False)
    assert flow.shift_for(torch.Size([1, 16, pixels // 8, pixels // 8])) == pytest.approx(shift, rel=1e-5)


def test_flow_ends_in_the_picture_and_in_noise_and_its_target_is_the_way_between():
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    flow = Flow()
    assert torch.equal(flow.add_noise(clean, noise, torch.zeros(2)), clean)
    assert torch.equal(flow.add_noise(clean, noise, torch.ones(2)), noise)
    level = torch.tensor([0.3, 0.8])
    noised = flow.add_noise(clean, noise, level)
    torch.testing.assert_close(noised - level.view(-1, 1, 1, 1) * flow.target(clean, noise, level), clean)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_the_best_flow_prediction_on_gaussian_data_errs_by_the_known_amount(level: float):
    """x_0, e ~ N(0, 1): the best guess of e - x_0 given x_t is linear, and errs by 1 / ((1 - t)^2 + t^2)."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, 4, 128, 128, generator=generator) for _ in range(2))
    time, flow = torch.full((4,), level), Flow()
    noised, spread = flow.add_noise(clean, noise, time), (1 - level) ** 2 + level**2
    error = (flow.target(clean, noise, time) - (2 * level - 1) / spread * noised).square().mean()
    assert float(error) == pytest.approx(1 / spread, rel=0.01)
