"""Pictures that are held out: what is measured on them, when, and what follows from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lessons
import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open

from finetune import checkpoint, plan, run
from finetune.dataset import split
from finetune.dataset.scan import scan
from finetune.errors import UserError
from finetune.evaluation.encoders import EMBEDDED, Encoder
from finetune.export import LORA_FILE
from finetune.validation import LEVELS, Judged

WATCHED = {"measure_every": 2}


def recipe(
    base: Path, folder: Path, method: str = "lora", way: Any = "plain", held_out: int = 1, **sections: Any
) -> Any:
    """A lesson on four pictures, of which some are held out."""
    tiny.save_pictures(folder / "pictures", 4)
    settings = {"validation": WATCHED, **sections}
    settings["dataset"] = {"held_out": held_out, **settings.get("dataset", {})}
    return lessons.recipe(base, folder, method, way, folder / "pictures", **settings)


def measured(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "validation_loss/mean" in line}


@pytest.mark.parametrize(("count", "away"), [(0, []), (1, [3]), (2, [1, 5]), (6, [0, 1, 2, 4, 5, 6])])
def test_held_out_pictures_stand_evenly_among_the_others(count: int, away: list[int]):
    numbers: list[Any] = list(range(7))
    trained, held_out = split(numbers, count)
    assert held_out == away and sorted([*trained, *held_out]) == numbers


def test_one_picture_has_to_be_left_to_train_on():
    with pytest.raises(UserError, match="7 of 7 pictures leave none to train on"):
        split([0] * 7, 7)  # pyright: ignore[reportArgumentType]


def test_what_is_held_out_is_never_trained_on_and_check_names_it(base_folder: Any, tmp_path: Path):
    asked = recipe(base_folder("stable_diffusion"), tmp_path, train={"steps": 8})
    at_work = run.prepare(asked)
    seen = {draw.path for report in at_work.trainer.steps() for draw in report.draws}
    _, (unseen,) = split(scan(asked.dataset), 1)
    assert unseen.path not in seen and len(seen) == 3
    assert plan.survey(asked).plan["held out"] == Path(unseen.path).name
    assert not any("not used" in line for line in plan.warnings(asked, at_work.pictures))


@pytest.mark.parametrize("way", lessons.FAMILY_X_METHOD, ids=lambda case: "-".join(map(str, case)))
def test_every_method_is_measured_on_every_family_from_step_0(way: Any, base_folder: Any, tmp_path: Path):
    family, variant, method, name = way
    asked = recipe(base_folder(family, variant), tmp_path, method, name, train={"steps": 2})
    at_work = run.prepare(asked)
    at_work.loop()
    found = measured(at_work.folder)
    assert list(found) == [0, 2]
    for line in found.values():
        levels = [line[f"validation_loss/level_{level}"] for level in range(1, LEVELS + 1)]
        assert line["validation_loss/mean"] == pytest.approx(sum(levels) / LEVELS)
        assert all(value > 0 for value in levels)


def test_measuring_changes_nothing_that_is_learnt(base_folder: Any, tmp_path: Path):
    base = base_folder("stable_diffusion")
    often, never = ({"validation": {"measure_every": every, "keep": "last"}} for every in (1, 100))
    weights = []
    for name, sections in (("often", often), ("never", never)):
        at_work = run.prepare(recipe(base, tmp_path / name, train={"steps": 4}, **sections))
        at_work.loop()
        weights.append(at_work.trainer.student.state_dict())
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_two_measurements_of_the_same_weights_are_the_same(base_folder: Any, tmp_path: Path):
    trainer = run.prepare(recipe(base_folder("stable_diffusion"), tmp_path)).trainer
    assert trainer.validate() == trainer.validate()


def as_told(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Have the measurements find these losses, one after the other."""
    left = iter([loss for loss in losses for _ in range(LEVELS)])
    monkeypatch.setattr("finetune.validation._error", lambda *_: torch.tensor(next(left)))


def test_one_line_says_when_overfitting_began(base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    as_told(monkeypatch, [0.5, 0.3, 0.4, 0.45])
    at_work = run.prepare(recipe(base_folder("stable_diffusion"), tmp_path, train={"steps": 6}))
    at_work.loop()
    (note,) = at_work.finish().notes
    assert note.startswith(
        "overfitting began after step 2: there the loss on held-out pictures was 0.3000, after step 6"
    )


def test_a_loss_that_only_trembles_is_no_overfitting(base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    as_told(monkeypatch, [0.5, 0.3, 0.305, 0.301])
    at_work = run.prepare(recipe(base_folder("stable_diffusion"), tmp_path, train={"steps": 6}))
    at_work.loop()
    assert at_work.finish().notes == ["no overfitting until step 6: the loss on held-out pictures is 0.3010"]


JUDGED = {"encoder": str(EMBEDDED), "prompts": ["a red {} thing", "a {} thing at night"], "every": 2}


def test_the_weights_with_the_best_pictures_are_exported(
    base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    at_work = run.prepare(recipe(base_folder("stable_diffusion"), tmp_path, train={"steps": 6}, validation=JUDGED))
    found, weights = iter([0.1, 0.3, 0.5, 0.2]), {}

    def look(step: int, pictures: Any) -> Judged:
        weights[step] = {name: value.clone() for name, value in at_work.trainer.student.state_dict().items()}
        return Judged(step, next(found), 0.5, 0.9)

    monkeypatch.setattr(at_work.judge, "look", look)
    at_work.loop()
    result = at_work.finish()
    assert result.verdict.passed and "the pictures of step 4 were the best, so it is exported" in result.notes[1]
    exported = at_work.trainer.student.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in weights[4].items())
    assert any(not torch.equal(exported[name], value) for name, value in weights[6].items())
    with safe_open(at_work.folder / LORA_FILE, "pt") as file:
        assert "steps" in json.dumps(file.metadata()) and (at_work.folder / "samples/step-000004").is_dir()


def test_pictures_are_judged_by_the_measures_of_an_evaluation(base_folder: Any, tmp_path: Path):
    asked = recipe(base_folder("stable_diffusion"), tmp_path, train={"steps": 4}, validation=JUDGED, held_out=2)
    at_work = run.prepare(asked)
    at_work.loop()
    lines = [json.loads(line) for line in (at_work.folder / "metrics.jsonl").read_text().splitlines()]
    judged = {line["step"]: line for line in lines if "validation_score/identity" in line}
    assert list(judged) == [0, 2, 4]
    encoder = Encoder.load(str(EMBEDDED))
    drawn = encoder.see(list(at_work.samples.load(4).values()))
    photos = encoder.see([Image.open(picture.path) for picture in split(scan(asked.dataset), 2)[1]])
    assert judged[4]["validation_score/identity"] == pytest.approx(float((drawn @ photos.T).mean()), abs=1e-5)
    assert "validation_score/prompt" in judged[4]


@pytest.mark.parametrize(
    ("identity", "prompt", "quality"),
    [(0.2, 0.4, 0.0), (0.6, 0.4, 1.0), (0.4, 0.4, 2 / 3), (0.6, 0.0, 0.0), (0.9, 0.8, 1.0)],
)
def test_pictures_are_as_good_as_the_weaker_of_identity_and_prompt_lets_them(
    identity: float, prompt: float, quality: float
):
    assert Judged(3, identity, prompt, 0.6).quality(Judged(0, 0.2, 0.4, 0.6)) == pytest.approx(quality)


def test_patience_ends_a_run_early_and_says_so(base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown = {"measure_every": 1, "patience": 2}
    as_told(monkeypatch, [0.5, 0.3, 0.4, 0.35])
    at_work = run.prepare(recipe(base_folder("stable_diffusion"), tmp_path, train={"steps": 50}, validation=shown))
    at_work.loop()
    assert at_work.trainer.step == 3
    assert "stopped after step 3: nothing was better for 2 times" in at_work.finish().notes


def test_a_resumed_run_measures_and_judges_what_an_unbroken_one_does(base_folder: Any, tmp_path: Path):
    base, ends = base_folder("stable_diffusion"), []
    sections: dict[str, Any] = {"train": {"steps": 6, "checkpoint_every": 4}, "validation": {**JUDGED, **WATCHED}}
    for name in ("whole", "broken"):
        asked = recipe(base, tmp_path / name, **sections)
        run.train(asked)
        if name == "broken":  # as if it had been killed after its first checkpoint
            shutil.rmtree(tmp_path / name / "run/checkpoints/step-000006")
            run.train(asked, resume=True)
        newest = checkpoint.newest(tmp_path / name / "run/checkpoints")
        assert newest is not None
        ends.append(checkpoint.load(newest)["trainer"]["validation"])
    assert ends[0]["found"] == ends[1]["found"] and ends[0]["judged"] == ends[1]["judged"]
    assert all(torch.equal(ends[0]["weights"][name], value) for name, value in ends[1]["weights"].items())


def test_settings_that_need_held_out_pictures_say_so(base_folder: Any, tmp_path: Path):
    with pytest.raises(UserError, match=r"validation.patience: is for pictures that are held out"):
        recipe(base_folder("stable_diffusion"), tmp_path, held_out=0, validation={"patience": 2})


def test_an_evaluation_compares_with_what_was_held_out(base_folder: Any, tmp_path: Path):
    from finetune.evaluation.concept import Given, read

    asked = recipe(base_folder("stable_diffusion"), tmp_path, train={"steps": 2})
    at_work = run.prepare(asked)
    at_work.loop()
    at_work.finish()
    concept = read(str(at_work.folder), Given())
    assert [len(concept.trained_on), len(concept.held_out)] == [3, 1]
