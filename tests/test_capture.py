"""A step as one CUDA graph: the same losses as the plain step, which it goes back to where it cannot be one.

And a denoiser that draws.

What needs a GPU is skipped without one.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import lessons
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from finetune import run
from finetune.batch import Batch
from finetune.capture import Captured, Recording
from finetune.errors import UserError
from finetune.families.base import Prompt
from finetune.methods.lora import LoRA
from finetune.render import render, use_ddim
from finetune.replay import Call, replayed

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA GPU")
METHODS = {
    "lora": {"rank": 2},
    "textual_inversion": {"init": "thing"},
    "pivotal_tuning": {"rank": 2, "init": "thing", "prior": "prediction", "class_prompt": "a thing"},
    "dreambooth": {"rank": 2, "prior": "prediction", "class_prompt": "a thing"},
}


def losses(base: Path, output: Path, method: str, **train: Any) -> tuple[list[float], run.Run]:
    settings = {"steps": 6, "precision": "bf16", **train}
    at_work = run.prepare(lessons.recipe(base, output, method, METHODS[method], train=settings))
    return [report.loss for report in at_work.trainer.steps()], at_work


def batch(count: int = 2) -> Batch:
    latents = torch.randn(count, 4, 8, 8)
    prompt = Prompt(torch.randn(count, 5, 16), pooled=torch.randn(count, 16))
    return Batch(latents, torch.randn_like(latents), torch.arange(count), prompt, torch.zeros(count, 6), 1)


def test_batches_have_one_form_where_all_their_tensors_have():
    one, mask = batch(), torch.ones(2, 1, 8, 8)
    assert one.form == batch().form and len(one.tensors()) == 6
    different = [batch(3), replace(one, num_prior=0), replace(one, mask=mask), replace(one, prompt={"text": mask})]
    different.append(one.map(torch.Tensor.half))
    assert len({one.form, *(other.form for other in different)}) == 6


def test_a_change_reaches_each_tensor_of_a_batch():
    one = replace(batch(), mask=torch.ones(2, 1, 8, 8))
    doubled = one.map(lambda part: part * 2)
    assert all(torch.equal(2 * old, new) for old, new in zip(one.tensors(), doubled.tensors(), strict=True))
    assert [part.shape[0] for part in one.ends(0, 1).tensors()] == [1] * 7


class Doubling:
    """A recording's graph without a GPU: it reads what was laid for it, and writes where its answer is looked for."""

    def __init__(self, count: int):
        self.given, self.answer = [batch(count)], torch.empty(count, 4, 8, 8)

    def replay(self) -> None:
        self.answer.copy_(2 * self.given[0].latents)


def test_a_recording_works_on_what_it_is_given_whatever_was_expected():
    known = Captured.__new__(Captured)
    known.parameters, known.recordings, known.expected = (), {}, None
    for graph in (Doubling(2), Doubling(3)):
        recording: Any = Recording(graph, graph.given, graph.answer, ())  # pyright: ignore[reportArgumentType]
        known.recordings[(graph.given[0].form,)] = recording
    expected, another, larger = [batch()], [batch()], [batch(3)]
    for given in (expected, another, larger, expected, expected):
        known.expect(expected)
        assert torch.equal(known(given), 2 * given[0].latents)
    known.expect(larger)
    for given in (expected, larger, another):
        assert torch.equal(known(given), 2 * given[0].latents)
    known.expect([batch(4)])  # which nothing is recorded for
    assert torch.equal(known(another), 2 * another[0].latents)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_step_runs_as_usual(base_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = base_folder("stable_diffusion")
    plain, _ = losses(base, tmp_path / "plain", "lora", capture=False)
    asked, _ = losses(base, tmp_path / "asked", "lora", capture=True)
    assert asked == plain
    assert "train.capture" not in capsys.readouterr().err


@ON_A_GPU
@pytest.mark.parametrize("train", [{}, {"accumulate": 2}, {"optimizer": "adamw_8bit"}, {"precision": "fp16"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_losses_are_those_of_the_plain_step(method: str, train: dict[str, Any], base_folder: Any, tmp_path: Path):
    base = base_folder("stable_diffusion")
    plain, _ = losses(base, tmp_path / "plain", method, capture=False, **train)
    found, at_work = losses(base, tmp_path / "captured", method, capture=True, **train)
    assert len(at_work.trainer.work.recordings) == 1
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-5)
    assert at_work.finish().verdict.passed


@ON_A_GPU
def test_what_cannot_be_captured_runs_as_usual_and_says_why(
    base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base = base_folder("stable_diffusion")
    plain, _ = losses(base, tmp_path / "plain", "lora", capture=False)
    reduce = LoRA.reduce
    monkeypatch.setattr(LoRA, "reduce", lambda *args: reduce(*args) + 0 * float(args[1].sum()))
    found, at_work = losses(base, tmp_path / "asked", "lora", capture=True)
    torch.testing.assert_close(found, plain)
    assert not at_work.trainer.work.recordings
    assert capsys.readouterr().err.count("the step runs as usual and not as one CUDA graph") == 1
    assert torch.rand(2, device="cuda").isfinite().all()  # which a generator that believes in a recording refuses


@ON_A_GPU
def test_many_runs_of_one_process_are_captured_alike_and_leave_nothing_behind(base_folder: Any, tmp_path: Path):
    base, found, left = base_folder("stable_diffusion"), [], []
    thresholds = gc.get_threshold()
    try:
        for count in range(6):
            gc.set_threshold(100, 1, 1)  # what the run before has left is collected anywhere
            own, at_work = losses(base, tmp_path / str(count), "lora")
            gc.set_threshold(*thresholds)
            assert len(at_work.trainer.work.recordings) == 1
            found.append(own)
            del at_work
            gc.collect()
            torch.cuda.empty_cache()
            left.append(torch.cuda.memory_reserved())
    finally:
        gc.set_threshold(*thresholds)
    assert found == [found[0]] * 6
    assert left[-1] <= left[1]


def test_pictures_that_find_no_room_take_that_of_the_recorded_step(
    base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    at_work = run.prepare(lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain"))
    expected, tries = at_work.samples.render, []

    def want_more(indices: Any) -> Any:
        tries.append(at_work.trainer.work)
        if len(tries) != 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return expected(indices)

    monkeypatch.setattr(at_work.samples, "render", want_more)
    at_work.trainer.work = recorded = Captured.__new__(Captured)
    at_work.draw(range(1))
    assert tries == [recorded, None] and at_work.samples.paths(0)[0].exists()
    with pytest.raises(UserError, match="the validation pictures of step 0: the GPU is out of memory"):
        at_work.draw(range(1))
    assert len(tries) == 3


def call(count: int = 2, text: Tensor | None = None, **more: Any) -> Call:
    return Call.of(torch.ones(count, 4), 7, encoder_hidden_states=text, added={"ids": [torch.zeros(count)]}, **more)


def test_calls_of_a_denoiser_have_one_form_where_nothing_differs_but_what_is_in_their_tensors():
    one = call()
    assert one.form == call().form == one.map(lambda part: part + 1).form and len(one.tensors()) == 2
    different = [call(3), call(text=torch.ones(2)), call(return_dict=False), one.map(Tensor.half)]
    assert len({one.form, *(other.form for other in different)}) == 5


def test_a_call_is_carried_out_as_it_was_made():
    found = call(return_dict=False).map(lambda part: part * 2).carry_out(lambda *args, **kwargs: (args, kwargs))
    (x, time), more = found
    assert torch.equal(x, 2 * torch.ones(2, 4)) and time == 7
    assert more.pop("added")["ids"][0].shape == (2,) and more == {"encoder_hidden_states": None, "return_dict": False}


def test_a_denoiser_that_is_not_on_a_gpu_is_left_alone():
    pipeline = tiny.BASES["stable_diffusion"]["epsilon"]()
    with replayed(pipeline) as more:
        assert more == {} and "forward" not in vars(pipeline.unet)


@ON_A_GPU
@pytest.mark.parametrize("trained", [False, True])  # in float32, and cast to bf16 once for all steps
@pytest.mark.parametrize("family", tiny.BASES)
def test_pictures_by_a_graph_are_those_of_the_plain_denoiser(
    family: str, trained: bool, capsys: pytest.CaptureFixture[str]
):
    pipeline: Any = next(iter(tiny.BASES[family].values()))().to("cuda")
    use_ddim(pipeline)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    executed: list[bool] = []  # also while it is recorded, but not when it is replayed
    first = next(part for part in denoiser.modules() if not list(part.children()))
    first.register_forward_hook(lambda *_: executed.append(torch.cuda.is_current_stream_capturing()))
    texts, seeds = ["a thing", "a red thing", "the sea"], [3, 4, 5]  # in batches of two and of one
    asked: Any = {"steps": 5, "guidance": 3.0, "size": 64, "batch_size": 2}
    denoiser.requires_grad_(trained)
    with torch.autocast("cuda", torch.bfloat16, enabled=trained):
        plain = render(pipeline, texts, seeds, capture=False, **asked)
        executed.clear()
        drawn = render(pipeline, texts, seeds, **asked)
    assert "runs as usual" not in capsys.readouterr().err
    recorded, by_python = (
        executed.count(True),
        executed.count(False),
    )  # a sampler's first latents may be of another dtype
    assert 0 < recorded < 5 and recorded <= by_python <= 2 * recorded
    np.testing.assert_allclose(np.stack(drawn).astype(float), np.stack(plain).astype(float), atol=2)
    assert "forward" not in vars(denoiser)


@ON_A_GPU
def test_drawing_that_cannot_be_captured_says_so_once(capsys: pytest.CaptureFixture[str]):
    pipeline: Any = tiny.BASES["stable_diffusion"]["epsilon"]().to("cuda")
    use_ddim(pipeline)
    first = next(part for part in pipeline.unet.modules() if not list(part.children()))
    first.register_forward_hook(lambda _, __, result: result + 0 * float(result.sum()))  # asked for by the host
    drawn = render(pipeline, ["a thing"] * 3, [3, 4, 5], steps=5, guidance=3.0, size=64, batch_size=1)
    assert len(drawn) == 3
    assert capsys.readouterr().err.count("the denoiser runs as usual and not as one CUDA graph") == 1
