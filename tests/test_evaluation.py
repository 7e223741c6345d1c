"""Evaluation: runs and adapters drawn by DreamBooth's protocol, judged, and written whole."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lessons
import pytest
import tiny
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from finetune import cli, run
from finetune.errors import UserError
from finetune.evaluation.concept import Given, phrases
from finetune.evaluation.evaluate import Settings, evaluate
from finetune.evaluation.files import state
from finetune.evaluation.metrics import balance
from finetune.evaluation.prompts import Prompts, names
from finetune.evaluation.result import Evaluation, Sweep, WeightScore
from finetune.evaluation.scoring import choose
from finetune.evaluation.studio import Size
from finetune.evaluation.words import describe
from finetune.generate import generate
from finetune.load import Adapter

FEW = Size(seeds=2, class_pictures=4, weights=(0.5, 1.0), sweep_prompts=1)
DREAMBOOTH = ("stable_diffusion", "epsilon", "dreambooth", "images")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP of random weights."""
    torch.manual_seed(0)
    tokenizer, folder = tiny.clip_tokenizer(), tmp_path_factory.mktemp("clip")
    layers = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    words = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sight = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=layers | words, vision_config=layers | sight, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny vision transformer, which reads nothing."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("dino")
    layers = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **layers), add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "two.txt"
    path.write_text("# two\n{} in snow\na {} at night\n")
    return str(path)


@pytest.fixture(scope="session")
def taught(lesson: Any) -> Path:
    """A finished run."""
    at_work, _, _ = lesson(DREAMBOOTH)
    return at_work.recipe.output.folder


@pytest.fixture(scope="session")
def settings(clip: str, prompts: str) -> Any:
    def make(output: Path | None, **changes: Any) -> Settings:
        return Settings(**({"prompts": prompts, "encoders": (clip,), "size": FEW, "output": output} | changes))

    return make


@pytest.fixture(scope="session")
def evaluated(taught: Path, settings: Any, clip: str, dino: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run, by both encoders, and the folder."""
    folder = tmp_path_factory.mktemp("evaluated") / "evaluation"
    [found] = evaluate([str(taught)], settings=settings(folder, encoders=(clip, dino)))
    return found, folder


@pytest.fixture(scope="session")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that even an untaught encoder finds more alike than anything else."""
    folder = tmp_path_factory.mktemp("alike")
    for light in (200, 215, 230):
        Image.new("RGB", (tiny.SIZE, tiny.SIZE), (light, 40, 40)).save(folder / f"{light}.png")
    return folder


def say(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command line says of a mistake, which ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["finetune", "evaluate", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in said
    return said


def test_what_is_found_stands_in_files_that_fit_each_other(evaluated: tuple[Evaluation, Path]):
    found, folder = evaluated
    kept = json.loads((folder / "evaluation.json").read_text())
    assert set(kept) == {field.name for field in fields(Evaluation)}
    assert kept["scores"][0]["identity"]["value"] == found.scores[0].identity.value
    assert set(kept["versions"]) == {"finetune", "torch", "transformers", "diffusers"}
    with (folder / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("pictures/*.png"))
    assert sorted(row["file"] for row in rows) == files == sorted(row["file"] for row in kept["pictures"])
    identity = [float(row[f"identity {found.scores[0].encoder}"]) for row in rows if row["kind"] == "concept"]
    assert sum(identity) / len(identity) == pytest.approx(found.scores[0].identity.value, abs=1e-6)


def test_every_picture_of_the_protocol_is_drawn(evaluated: tuple[Evaluation, Path]):
    kinds = [row.kind for row in evaluated[0].pictures]
    count = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert count == {"base": 2, "base-class": 4, "unrelated": 4, "concept": 4, "class": 4, "sweep": 1}
    assert {row.prompt for row in evaluated[0].pictures if row.kind == "concept"} == {
        "a <it> thing in snow",
        "a <it> thing at night",
    }
    assert {row.prompt for row in evaluated[0].pictures if row.kind == "class"} == {"a thing"}


def test_pictures_are_those_that_generate_draws(evaluated: tuple[Evaluation, Path], taught: Path, base_folder: Any):
    found, folder = evaluated
    row = next(row for row in found.pictures if row.kind == "concept" and row.seed == 3)
    settings = {"seed": row.seed, "steps": found.steps, "guidance": found.guidance, "size": tiny.SIZE}
    [image] = generate(str(base_folder("stable_diffusion")), row.prompt, adapters=[Adapter(taught)], **settings)
    with Image.open(folder / row.file) as kept:
        # a picture in a batch differs by rounding from the same alone
        assert max(abs(a - b) for a, b in zip(kept.tobytes(), image.tobytes(), strict=True)) <= 2


def test_an_encoder_that_does_not_read_measures_identity_alone(evaluated: tuple[Evaluation, Path]):
    by_clip, by_dino = evaluated[0].scores
    assert by_clip.following is not None and by_clip.contrast is not None
    assert by_dino.following is None and by_dino.contrast is None
    assert -1 <= by_dino.identity.value <= 1 and evaluated[0].encoders[1].kind == "dino"


def test_an_adapter_of_weight_0_is_the_base(taught: Path, settings: Any, tmp_path: Path):
    [found] = evaluate([f"{taught}=0"], settings=settings(tmp_path / "out", size=Size(1, 2, ())))
    assert found.drift.class_prompts == pytest.approx(0, abs=1e-10)
    assert found.drift.unrelated == pytest.approx(0, abs=1e-10)
    scores = found.scores[0]
    assert scores.prior_resemblance.value == pytest.approx(scores.prior_resemblance_base, abs=1e-5)
    assert scores.prior_diversity.value == pytest.approx(scores.prior_diversity_base, abs=1e-5)


def test_a_stronger_adapter_moves_the_base_further(taught: Path, settings: Any, tmp_path: Path):
    found = [
        evaluate([f"{taught}={weight}"], settings=settings(tmp_path / str(weight), size=Size(1, 2, ())))[0]
        for weight in (0.5, 1.0)
    ]
    assert 0 < found[0].drift.class_prompts < found[1].drift.class_prompts


@pytest.mark.parametrize("family", tiny.BASES)
def test_runs_of_every_family_are_measured(family: str, lesson: Any, settings: Any, tmp_path: Path):
    at_work, _, _ = lesson((family, next(iter(tiny.BASES[family])), "textual_inversion", "three-vectors"))
    given, asked = Given(class_prompt="a thing"), settings(tmp_path / "out", size=Size(1, 2, (0.5, 1.0), 1))
    [found] = evaluate([str(at_work.recipe.output.folder)], given, asked)
    assert found.drift.class_prompts == pytest.approx(0, abs=1e-10)  # a new word leaves all others as they were
    at_work, _, _ = lesson((family, next(iter(tiny.BASES[family])), "lora", "plain"))
    [found] = evaluate([str(at_work.recipe.output.folder)], given, replace(asked, output=tmp_path / "lora"))
    assert found.drift.class_prompts > 0 and len(found.pictures) == 13


def test_photos_that_were_not_trained_on_are_what_counts(taught: Path, settings: Any, tmp_path: Path):
    photos = tiny.save_pictures(tmp_path / "photos", count=7)  # the first five are those of the lesson
    [found] = evaluate([str(taught)], Given(photos=photos), settings(tmp_path / "out"))
    assert found.photos_held_out and [Path(path).name for path in found.photos] == ["5.png", "6.png"]
    assert not any("optimistic" in note for note in found.notes)


def test_identity_with_trained_photos_is_called_optimistic(evaluated: tuple[Evaluation, Path]):
    assert not evaluated[0].photos_held_out and any("optimistic" in note for note in evaluated[0].notes)


def test_a_file_with_options_is_measured_as_its_run(
    taught: Path, settings: Any, evaluated: tuple[Evaluation, Path], tmp_path: Path
):
    run_of = evaluated[0]
    given = Given(photos=Path(run_of.photos[0]).parent, class_prompt="a thing")
    same = settings(tmp_path / "out", steps=run_of.steps, guidance=run_of.guidance)
    [found] = evaluate([str(taught / "pytorch_lora_weights.safetensors")], given, same)
    assert found.subject == run_of.subject == "a <it> thing"
    assert found.scores[0].following == run_of.scores[0].following
    assert found.scores[0].identity == run_of.scores[0].identity
    assert found.copying is None and run_of.copying is not None


def test_every_weight_is_measured_on_the_same_prompts_and_noise(
    taught: Path, settings: Any, alike: Path, tmp_path: Path
):
    [found] = evaluate([str(taught)], Given(photos=alike), settings(tmp_path / "out"))
    assert found.sweep is not None
    assert [score.weight for score in found.sweep.scores] == [0.5, 1.0]
    own = [row for row in found.pictures if row.kind == "concept" and row.seed == 0]
    assert found.sweep.scores[1].identity == pytest.approx(own[0].identity[found.scores[0].encoder])


@pytest.mark.parametrize(
    ("balances", "best"),
    [
        ({0.5: 0.4, 1.0: 0.7, 1.5: 0.6}, 1.0),
        ({0.5: 0.8, 1.0: 0.7}, 0.5),
        ({0.6: 0.7, 0.9: 0.69, 1.2: 0.7}, 0.9),
        ({0.5: 0.0, 1.0: 0.0}, None),
    ],
)
def test_the_best_weight_has_the_best_balance(balances: dict[float, float], best: float | None):
    assert choose([WeightScore(weight, 0, 0, 0, balance) for weight, balance in balances.items()]) == best


@pytest.mark.parametrize(
    ("floor", "ceiling", "share", "words"),
    [(0.2, 0.6, 0.75, "good"), (0.2, None, None, "ceiling unknown)"), (0.57, 0.6, None, "does not tell the photos")],
)
def test_what_an_encoder_does_not_tell_from_the_base_is_not_called_learnt(
    evaluated: tuple[Evaluation, Path], floor: float, ceiling: float | None, share: float | None, words: str
):
    found = evaluated[0]
    scores = found.scores[0]
    identity = replace(scores.identity, value=0.5)
    told = replace(found, scores=(replace(scores, identity=identity, floor=floor, ceiling=ceiling),))
    assert told.scores[0].likeness == (share if share is None else pytest.approx(share))
    assert words in describe(told)["identity"]


@pytest.mark.parametrize(
    ("likeness", "kept", "expected"), [(1, 1, 1), (0.5, 1, 2 / 3), (-1, 1, 0), (1.5, 0.5, 2 / 3), (None, 1, 0)]
)
def test_a_balance_is_low_as_soon_as_one_share_is(likeness: float | None, kept: float, expected: float):
    assert balance(likeness, kept) == pytest.approx(expected)


def test_the_worst_prompt_comes_with_its_picture(evaluated: tuple[Evaluation, Path]):
    found, folder = evaluated
    assert (folder / found.worst.file).is_file()
    row = next(row for row in found.pictures if row.file == found.worst.file)
    assert row.kind == "concept" and row.prompt == found.worst.prompt


def test_the_card_states_the_best_weight_once(evaluated: tuple[Evaluation, Path], tmp_path: Path):
    card = tmp_path / "README.md"
    card.write_text("# A fox\n\nWhat it is.\n")
    for best in (0.8, 0.6, 0.6):
        state(replace(evaluated[0], sweep=Sweep(1, (WeightScore(best, 0.5, 0.5, 0.5, 0.5),), best)), card)
    text = card.read_text()
    assert text.startswith("# A fox\n\nWhat it is.\n\n") and text.count("## Measured") == 1
    assert "The best weight is **0.6**." in text and "0.8" not in text


def test_a_runs_own_card_says_what_was_measured(evaluated: tuple[Evaluation, Path], taught: Path):
    assert "identity" in (taught / "README.md").read_text().partition("## Measured")[2]


def test_several_runs_are_compared_with_intervals_over_subjects(
    taught: Path, lesson: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], clip: str, prompts: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    other = lessons.recipe(
        Path(lesson(DREAMBOOTH)[0].recipe.base.source), tmp_path, "textual_inversion", "three-vectors"
    )
    at_work = run.prepare(other.model_copy(update={"name": "word"}))
    at_work.loop()
    at_work.finish()
    arguments = [str(taught), str(other.output.folder), "--output", str(tmp_path / "both"), "--encoder", clip]
    arguments += ["--prompts", prompts, "--seeds", "1", "--weights", "", "--class-prompt", "a thing"]
    monkeypatch.setattr(sys, "argv", ["finetune", "evaluate", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().out
    assert not end.value.code and "mean over subjects" in said
    kept = [json.loads((tmp_path / "both" / name / "evaluation.json").read_text()) for name in ("lesson", "word")]
    mean = json.loads((tmp_path / "both" / "summary.json").read_text())["means"]["identity"]
    assert mean["over"] == "subjects" and mean["num_units"] == 2
    assert mean["value"] == pytest.approx(sum(each["scores"][0]["identity"]["value"] for each in kept) / 2)
    assert kept[1]["subject"] == "a <it> thing" and kept[1]["sweep"] is None


def test_a_style_is_compared_with_its_contents_in_no_style(base_folder: Any, clip: str, tmp_path: Path):
    pictures = tiny.save_pictures(tmp_path / "pictures", caption="a dog, {} style")
    at_work = run.prepare(lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain", pictures))
    at_work.loop()
    at_work.finish()
    (tmp_path / "styles.txt").write_text("a cat, {} style\na cow, in {} style\n")
    asked = Settings(str(tmp_path / "styles.txt"), (clip,), FEW)
    [found] = evaluate([str(tmp_path / "run")], settings=asked)
    drawn = {kind: [row.prompt for row in found.pictures if row.kind == kind] for kind in ("concept", "base", "class")}
    assert drawn["concept"][:2] == ["a cat, <it> style", "a cow, in <it> style"]
    assert drawn["base"] == ["a cat", "a cow"] and set(drawn["class"]) == {"a cat", "a cow"}
    assert (tmp_path / "run" / "evaluation" / "evaluation.json").is_file()
    file, given = tmp_path / "run" / "pytorch_lora_weights.safetensors", Given(photos=pictures)
    [alone] = evaluate([str(file)], given, replace(asked, output=tmp_path / "alone", size=Size(1, 1, ())))
    assert alone.subject == found.subject == "<it>" and alone.pictures[0].prompt == "a cat"


def test_a_run_that_is_replaced_takes_its_evaluation_with_it(base_folder: Any, settings: Any, tmp_path: Path):
    recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path, "lora", "plain")
    at_work = run.prepare(recipe)
    at_work.loop()
    at_work.finish()
    asked = settings(None, size=Size(1, 1, ()))
    [found] = evaluate([str(tmp_path / "run")], Given(class_prompt="a thing"), asked)
    assert found.folder == str(tmp_path / "run" / "evaluation") and Path(found.folder).is_dir()
    run.prepare(recipe, overwrite=True)
    assert not Path(found.folder).exists()


@pytest.mark.parametrize(
    ("captions", "class_prompt", "subject", "noun"),
    [
        (["a {} animal in snow", "a {} animal at home"], "an animal", "a {} animal", "an animal"),
        (["a {} sea animal in snow", "a {} sea animal at home"], None, "a {} sea animal", "a sea animal"),
        (["a photo of a {}", "{} on a rock"], "a dog", "a {}", "a dog"),
        (["portrait of {} on a hill", "{} on a rock"], "a man", "{}", "a man"),
        (["a {} at night", "a {} in snow"], None, "a {}", None),
        (["a {} dog in the park"], None, "a {}", None),
        ([], "a dog", "a {}", "a dog"),
    ],
)
def test_captions_tell_how_the_subject_is_written(
    captions: list[str], class_prompt: str | None, subject: str, noun: str | None
):
    assert phrases(captions, class_prompt) == (subject, noun)


@pytest.mark.parametrize("name", names())
def test_every_list_of_prompts_is_as_long_as_it_should_be(name: str):
    prompts = Prompts.load(name)
    assert len(set(prompts.lines)) == len(prompts) >= (25 if name in ("objects", "living") else 20)
    assert prompts.is_style == ("styles" in name)
    assert all("{" not in line and line for line in prompts.with_class("a dog"))


def test_the_embedded_lists_use_words_that_the_base_knows():
    vocabulary = json.loads((Path(__file__).parent.parent / "data/base/tokenizer/vocab.json").read_text())
    for name in ("embedded", "embedded-styles"):
        words = {word for line in Prompts.load(name).lines for word in line.replace("{}", "").replace(",", "").split()}
        assert {word for word in words if f"{word}</w>" not in vocabulary} == set()


def test_an_article_before_the_subject_is_not_said_twice(prompts: str):
    assert Prompts.load(prompts).with_class("an owl") == ("an owl in snow", "an owl at night")


def test_every_line_that_is_no_prompt_is_named(tmp_path: Path):
    file = tmp_path / "list.txt"
    file.write_text("a cat, {} style\na dog\n\na {} style thing\n")
    with pytest.raises(UserError) as caught:
        Prompts.load(str(file))
    assert [problem.split(":")[1].split(",")[1].strip() for problem in caught.value.problems] == ["line 2", "line 4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["{run}", "--prompts", "object"], "Did you mean 'objects'?"),
        (["{run}", "--prompts", "{prompts}", "--photos", "nowhere"], "--photos: nowhere is not a folder"),
        (["{run}", "--prompts", "{prompts}", "--photos", "{damaged}"], "cannot be read as a picture"),
        (["{run}", "--base", "{sdxl}"], "whose recipe names its base"),
        (["{run}", "--weights", "0.5 much"], "expected numbers"),
        (["{run}", "--prompts", "{prompts}", "--encoder", "{damaged}"], "cannot be loaded"),
        (["{run}", "{run}", "--prompts", "{prompts}"], "two evaluations would be written there"),
        (["{run}", "--prompts", "{prompts}", "--output", "{damaged}"], "holds something else"),
        (["{lora}"], "--photos: no recipe says"),
        (["{lora}", "--photos", "{photos}", "--prompts", "objects"], "--class-prompt: nothing says"),
        (
            ["{lora}", "--photos", "{photos}", "--prompts", "{prompts}", "--class-prompt", "a dog", "--base", "{sdxl}"],
            "is not for this base",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_is_drawn(
    arguments: list[str], said: str, taught: Path, prompts: str, clip: str, base_folder: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "photo.png").write_bytes(b"no picture")
    places = {"run": taught, "prompts": prompts, "damaged": damaged, "sdxl": base_folder("stable_diffusion_xl")}
    places |= {"lora": taught / "pytorch_lora_weights.safetensors", "photos": tiny.save_pictures(tmp_path / "photos")}
    given = [argument.format_map(places) for argument in arguments]
    default = [] if "--encoder" in given else ["--encoder", clip]
    told = say([*given, *default, "--steps", "1", "--seeds", "1"], capsys, monkeypatch)
    assert said in told and "pictures:" not in told
    assert not (taught / "evaluation").exists()


def test_all_mistakes_are_named_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    told = say(["nowhere", "nothing", "--prompts", "object"], capsys, monkeypatch)
    assert told.count("error: ") == 3
    assert all(said in told for said in ("nowhere does not exist", "nothing does not exist", "Did you mean 'objects'?"))


def test_a_base_of_other_weights_is_named(
    taught: Path, settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tiny.stable_diffusion()
    torch.nn.init.normal_(other.unet.conv_in.weight)
    other.save_pretrained(tmp_path / "other")
    given = Given(tiny.save_pictures(tmp_path / "photos"), str(tmp_path / "other"), "a thing")
    evaluate([str(taught / "pytorch_lora_weights.safetensors")], given, settings(tmp_path / "out", size=Size(1, 1, ())))
    assert "was made on other weights than those of" in capsys.readouterr().err


def test_an_evaluation_is_not_replaced_by_accident(evaluated: tuple[Evaluation, Path], taught: Path, settings: Any):
    with pytest.raises(UserError, match="--overwrite"):
        evaluate([str(taught)], settings=settings(evaluated[1]))


def test_an_encoder_for_photographs_is_asked_for_where_the_base_is_not_the_embedded_one(
    taught: Path, settings: Any, tmp_path: Path
):
    asked = settings(tmp_path / "out", encoders=(), size=Size(1, 1, ()))
    [found] = evaluate([str(taught)], settings=asked)
    assert any("--encoder openai/clip-vit-base-patch32" in note for note in found.notes)
