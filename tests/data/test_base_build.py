"""The build of the embedded base: its world, its optimizer, and the whole chain at toy size."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "data" / "base" / "build"


@pytest.fixture(scope="module")
def build_path():
    """Its modules are imported as the command imports them."""
    sys.path.insert(0, str(BUILD))
    before = set(sys.modules)
    yield BUILD
    sys.path.remove(str(BUILD))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == BUILD:
            del sys.modules[name]


@pytest.fixture(scope="module")
def toys(build_path):
    from sprites import toy_pack

    return toy_pack()


def test_held_out_names_and_styles_are_not_in_the_world(build_path):
    from sprites import wanted
    from vocabulary import HELD, HELD_STYLES, STYLES

    words = {word for label, said, noun in wanted() for word in (label.lower(), said, noun)}
    assert not words & HELD
    assert not set(STYLES) & set(HELD_STYLES)


def test_a_technique_redraws_a_picture_and_does_so_the_same_way_each_time(build_path):
    from concepts import TECHNIQUES

    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    for technique in TECHNIQUES.values():
        found = technique(picture)
        assert found.shape == picture.shape and found.min() >= 0 and found.max() <= 1
        assert torch.equal(found, technique(picture)) and not torch.equal(found, picture)


def test_every_prompt_of_the_studies_can_be_drawn_true(build_path, toys):
    from composer import Composer
    from layouts import Arranger, Place
    from shown import THINGS, compose

    from finetune.evaluation.prompts import Prompts

    pictures, sprites = toys
    labels = ("fox", *THINGS)
    five = [replace(sprite, label=label) for sprite, label in zip(sprites, labels, strict=False)]
    lines = Prompts.load("embedded").lines
    arranger = Arranger(five, Place(None, 0.16), Random(0))
    asked = [compose(line, arranger) for line in lines]
    shown = [[layer.sprite for layer in picture.layers] for picture in asked]
    assert shown == [[0]] * 16 + [[0, 1], [0, 2], [0, 3], [0, 4]]
    drawn = dict(zip(lines, Composer(pictures[:5], five, 64).draw(asked), strict=True))
    red, green, blue = drawn["{} on a red background"][:, 0, 0]
    assert red > 2 * max(green, blue)
    assert len({picture.numpy().tobytes() for picture in drawn.values()}) == len(lines)
    with pytest.raises(KeyError):
        compose("{} on the phone", arranger)


def test_training_and_evaluation_share_no_pairing_of_thing_and_place(toys):
    from world import World

    seen = []
    for evaluation in (False, True):
        world, rng = World(toys[1], evaluation), Random(3)
        seen.append({(p.facts.thing, p.backdrop) for p in (world.picture(rng) for _ in range(400))})
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_captions_say_what_the_facts_say(toys):
    from scenes import SCENES
    from words import NUMBERS
    from world import World

    world, rng = World(toys[1]), Random(5)
    for picture in (world.picture(rng) for _ in range(500)):
        facts, caption = picture.facts, picture.caption
        assert "  " not in caption and not caption.startswith(" ")
        assert facts.count == 1 or caption.find(NUMBERS[facts.count]) >= 0
        assert facts.count == len(picture.layers) or facts.relation or facts.count == 1
        assert not facts.scene or any(phrase in caption for phrase in SCENES[facts.scene].phrases)
        assert not facts.style or f"{facts.style} style" in caption


def test_a_specification_draws_the_same_picture_alone_and_in_a_batch(toys):
    from composer import Composer
    from world import World

    world, rng = World(toys[1]), Random(7)
    composer = Composer(*toys, size=64)
    pictures = [world.picture(rng) for _ in range(12)]
    together = composer.draw(pictures)
    assert together.shape == (12, 3, 64, 64)
    assert together.min() >= 0 and together.max() <= 1
    for row, picture in enumerate(pictures):
        torch.testing.assert_close(composer.draw([picture])[0], together[row], atol=2e-3, rtol=0)


def test_muon_makes_updates_nearly_orthogonal(build_path):
    from muon import orthogonalize

    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 24, 60)))
    assert values.min() > 0.5 and values.max() < 1.5


def test_no_schedule_outlives_its_time(build_path):
    from team import schedule

    assert schedule(1.0, 10_000) == 0
    assert schedule(0.2, 10_000) == 1
    assert 0 < schedule(0.0, 0) < 0.1


def test_every_kind_of_edit_changes_the_picture_and_says_how(toys):
    from composer import Composer
    from edits import KINDS, draw_edits
    from world import reserved

    composer = Composer(*toys, size=64)
    for kind in KINDS:
        for edit in draw_edits(toys[1], 5, 4, kind=kind):
            before, after = composer.draw([edit.source, edit.target])
            assert (before - after).abs().max() > 0.05, (edit.instruction, edit.caption)
            assert edit.instruction == edit.instruction.strip() and "{" not in edit.instruction + edit.caption
            assert not reserved(edit.target.facts.thing, edit.target.backdrop)


def test_a_difference_to_the_base_trains_like_the_weights_that_it_makes(build_path):
    from lowrank import Difference

    base = torch.nn.Linear(12, 10)
    copy, started = torch.nn.Linear(12, 10), {name: w.clone() for name, w in base.state_dict().items()}
    copy.load_state_dict(started)
    difference, given = Difference(copy, started, rank=2), torch.randn(5, 12)
    torch.nn.init.normal_(difference.up[0])
    difference.write()
    copy(given).square().sum().backward()
    difference.pull()
    up, down = (difference.up[0].detach().requires_grad_(), difference.down[0].detach().requires_grad_())
    torch.nn.functional.linear(given, started["weight"] + up @ down, started["bias"]).square().sum().backward()
    torch.testing.assert_close(difference.up[0].grad, up.grad)
    torch.testing.assert_close(difference.down[0].grad, down.grad)
    assert difference.whole["bias"].grad is not None and copy.weight.grad is None


def test_training_through_the_export_rounding_leaves_the_weights_exact(build_path):
    from lowrank import Rounded

    module = torch.nn.Linear(6, 6)
    exact, form = module.weight.detach().clone(), Rounded(module)
    form.write()
    assert torch.equal(module.weight, exact.to(torch.float8_e4m3fn).float()) and not torch.equal(module.weight, exact)
    form.pull()
    assert torch.equal(module.weight, exact)


@pytest.mark.timeout(400)
def test_the_whole_chain_makes_a_pipeline_and_its_companions(tmp_path):
    from diffusers import StableDiffusionPipeline

    from finetune.companions import companion

    command = [
        sys.executable,
        str(BUILD),
        "all",
        "--smoke",
        "--folder",
        str(tmp_path / "run"),
        "--target",
        str(tmp_path / "base"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # toys are too small to share
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "measurements.json").exists()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert pipeline("a cat", num_inference_steps=2).images[0].size == (64, 64)
    for name, kind in {"controlnet": "ControlNetModel", "instruct_pix2pix": "UNet2DConditionModel"}.items():
        model = companion(name, tmp_path / "base")
        assert type(model).__name__ == kind and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.in_channels == 8
