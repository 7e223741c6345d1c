"""Pictures keep their shapes: each step has one, every picture is seen as often as any other, and none is distorted."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import lessons
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE

from finetune import run
from finetune.config import build
from finetune.dataset import DatasetConfig, Draw, Pictures, scan
from finetune.dataset.buckets import Shapes, sizes

# Lying, standing, square; one shape has a single picture, and one picture is longer than any shape.
UNEVEN = [(96, 60), (97, 61), (60, 96), (50, 50), (33, 33), (48, 48), (400, 20)]


def save(folder: Path, shapes: Any = UNEVEN, alpha: bool = False) -> Path:
    """Smooth noise of any shape, distinct."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number, shape in enumerate(shapes):
        cells = random.integers(0, 256, (4, 4, 4 if alpha else 3), dtype=np.uint8)
        Image.fromarray(cells).resize(shape, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a {} thing, red, round")
    return folder


def bucketed(folder: Path | None, group: int, multiple: int = 2, **settings: Any) -> Pictures:
    place = {} if folder is None else {"folder": str(folder)}
    chosen = build(DatasetConfig, {**place, "resolution": SIZE, "buckets": True, **settings})
    pictures = Pictures.from_pictures(scan(chosen), chosen, "sks")
    return pictures.within(Shapes(pictures.rows, SIZE, multiple, group))


def steps(pictures: Pictures, group: int, count: int, seed: int = 0) -> list[list[Draw]]:
    return [[pictures.draw(seed, step * group + place) for place in range(group)] for step in range(count)]


@pytest.mark.parametrize("multiple", [8, 16, 32, 64])
@pytest.mark.parametrize("resolution", [256, 512, 576, 768, 1024, 1152, 1536])
def test_shapes_have_the_pixels_of_the_square_and_sides_that_the_base_takes(resolution: int, multiple: int):
    found = sizes(resolution, multiple)
    assert found[0] == (resolution, resolution) and len(found) == len(set(found))
    for width, height in found:
        assert width % multiple == height % multiple == 0
        assert 0.8 * resolution**2 < width * height <= resolution**2
        assert 1 / 2 <= width / height <= 2
        assert (height, width) in found
    assert len(found) > 4 or multiple == 64


def test_at_1024_the_shapes_are_those_of_sdxl():
    oblong = {(1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704)}
    assert set(sizes(1024, 8)) == {(1024, 1024)} | oblong | {(height, width) for width, height in oblong}


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_picture_is_seen_equally_often_however_few_have_its_shape(tmp_path: Path, group: int, seed: int):
    found = bucketed(save(tmp_path), group)
    for number in range(2):
        seen = steps(found, group, (number + 1) * len(UNEVEN), seed)[number * len(UNEVEN) :]
        counts = Counter(Path(draw.path).name for step in seen for draw in step)
        assert counts == {f"{index}.png": group for index in range(len(UNEVEN))}


def test_weights_hold_in_buckets(tmp_path: Path):
    folders = [save(tmp_path / "a", UNEVEN[:4]), save(tmp_path / "b", UNEVEN[2:])]
    weighed = [{"folder": str(folder), "weight": weight} for folder, weight in zip(folders, (3, 1), strict=True)]
    found = bucketed(None, 2, folders=weighed)
    counts = Counter(draw.path for step in steps(found, 2, 4 * 3 + 5) for draw in step)
    assert len(counts) == 9
    assert all(count == (6 if path.startswith(str(folders[0])) else 2) for path, count in counts.items())


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6])
def test_a_step_has_one_shape_however_it_is_shared_out(tmp_path: Path, group: int):
    found = steps(bucketed(save(tmp_path), group, crop="random", flip=True), group, 40)
    assert all(len({draw.crop.size for draw in step}) == 1 for step in found)
    assert all(draw.pixels().shape[1:] == draw.crop.size[::-1] for step in found[:8] for draw in step)
    assert len({step[0].crop.size for step in found}) >= 4


def test_a_draw_in_buckets_depends_on_seed_and_position_alone(tmp_path: Path):
    settings: dict[str, Any] = {"crop": "random", "flip": True}
    folder = save(tmp_path)
    forward = [bucketed(folder, 3, **settings).draw(5, position) for position in range(40)]
    fresh = bucketed(folder, 3, **settings)
    assert [fresh.draw(5, position) for position in range(39, -1, -1)][::-1] == forward
    assert [fresh.draw(6, position) for position in range(40)] != forward
    seeds = [draw.seed for draw in forward]
    assert len(set(seeds)) == len(seeds)


def test_steps_come_in_another_order_each_round(tmp_path: Path):
    found = steps(bucketed(save(tmp_path), 2), 2, 4 * len(UNEVEN))
    shapes = [tuple(step[0].crop.size for step in found[start : start + 7]) for start in range(0, 28, 7)]
    assert len(set(shapes)) > 1 and len({tuple(sorted(each)) for each in shapes}) == 1


def test_pictures_are_neither_distorted_nor_cut_more_than_they_must(tmp_path: Path):
    for step in steps(bucketed(save(tmp_path), 1), 1, len(UNEVEN)):
        (draw,) = step
        (width, height), (wide, high) = draw.crop.size, draw._scaled
        assert abs(wide / draw.width - high / draw.height) * max(draw.width, draw.height) <= 1  # rounding
        assert wide == width or high == height
        if max(draw.width, draw.height) <= 2 * min(draw.width, draw.height):
            assert width * height > 0.9 * wide * high


def test_a_picture_of_a_shape_s_own_size_is_trained_as_it_is(tmp_path: Path):
    width, height = sizes(SIZE, 2)[3]
    assert width != height
    folder = save(tmp_path, [(width, height)])
    draw = bucketed(folder, 1).draw(0, 0)
    content = np.asarray(Image.open(folder / "0.png"), np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_array_equal(draw.pixels(), content)
    assert draw.geometry == (height, width, 0, 0, height, width)


def test_a_picture_longer_than_any_shape_is_cut_to_the_longest(tmp_path: Path):
    draw = bucketed(save(tmp_path, [(400, 20)]), 1).draw(0, 0)
    longest = max(sizes(SIZE, 2), key=lambda size: size[0] / size[1])
    assert draw.crop.size == longest and draw.pixels().std() > 0


def test_squares_alone_are_drawn_as_without_buckets(tmp_path: Path):
    folder = save(tmp_path, [(40, 40)] * 5)
    plain = build(DatasetConfig, {"folder": str(folder), "resolution": SIZE})
    expected = Pictures.from_pictures(scan(plain), plain, "sks")
    found = bucketed(folder, 3)
    assert [found.draw(2, place) for place in range(30)] == [expected.draw(2, place) for place in range(30)]


@pytest.mark.parametrize("crop", ["center", "random"])
def test_masks_keep_to_their_pictures_in_every_shape(tmp_path: Path, crop: str):
    for number, (width, height) in enumerate(UNEVEN):
        cells = Image.fromarray(np.random.default_rng(number).integers(0, 256, (4, 4), dtype=np.uint8))
        for name in (f"{number}.png", f"{number}.mask.png"):
            cells.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / name)
    found = bucketed(tmp_path, 1, mask="file", captions=["a {}"], crop=crop, flip=True)
    for (draw,) in steps(found, 1, 2 * len(UNEVEN)):
        width, height = draw.crop.size
        assert draw.coverage(2).shape == (1, height // 2, width // 2)
        off = np.abs(draw.coverage(1) * 2 - 1 - draw.pixels()[0])
        assert off.mean() < 0.1  # they are scaled by different filters


def lesson(base: Path, output: Path, method: str, way: Any, alpha: bool = False, **more: Any) -> Any:
    folder = output / "pictures"
    if not folder.exists():
        save(folder, alpha=alpha)
    dataset = {"buckets": True, **more.pop("dataset", {})}
    return lessons.recipe(base, output, method, way, folder, dataset=dataset, **more)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("prior", ["images", "prediction"])
def test_both_halves_of_a_batch_have_one_shape(base_folder: Any, tmp_path: Path, batch_size: int, prior: str):
    way = {"prior": prior, "class_prompt": "a thing", "num_class_images": 3, "rank": 2}
    train = {"batch_size": batch_size, "steps": 8}
    trainer = run.prepare(lesson(base_folder("stable_diffusion_xl"), tmp_path, "dreambooth", way, train=train)).trainer
    seen: Counter[Any] = Counter()
    for report in trainer.steps():
        concept, class_half = report.draws[:batch_size], report.draws[batch_size:]
        assert len({draw.crop.size for draw in report.draws}) == 1 and len(class_half) == batch_size
        assert all(draw.caption.startswith("a <it> thing") for draw in concept)
        assert all(draw.caption == "a thing" for draw in class_half)
        assert all(("class-images" in draw.path) == (prior == "images") for draw in class_half)
        seen[concept[0].crop.size] += 1
    assert len(seen) >= 3


def test_the_prior_s_own_predictions_keep_to_the_pictures_of_their_shape(base_folder: Any, tmp_path: Path):
    way = {"prior": "prediction", "class_prompt": "a thing", "rank": 2}
    trainer = run.prepare(lesson(base_folder("stable_diffusion"), tmp_path, "dreambooth", way)).trainer
    drawn = [trainer.shares.draw(step) for step in range(len(UNEVEN))]
    halves = [Counter(draw.path for step in drawn for draw in step[half]) for half in (0, 1)]
    assert halves[0] == halves[1] and set(halves[0].values()) == {2}


def test_the_base_is_told_each_picture_s_size_and_cut(base_folder: Any, tmp_path: Path):
    trainer = run.prepare(lesson(base_folder("stable_diffusion_xl"), tmp_path, "lora", "plain")).trainer
    for step in range(4):
        batch = trainer._drawn(step)[1][0]
        height, width = (2 * side for side in batch.latents.shape[-2:])
        assert batch.geometry[:, 4:].tolist() == [[height, width]] * 2


# Every family, and every method.
CASES = [case for case in lessons.FAMILY_X_METHOD if case[2] == "lora" or case[0] == "stable_diffusion"]


@pytest.mark.parametrize("case", CASES, ids=lessons.name)
def test_every_method_and_every_family_learns_in_buckets_and_passes_its_own_check(
    case: tuple[str, ...], base_folder: Any, tmp_path: Path
):
    family, variant, method, way = case
    at_work = run.prepare(lesson(base_folder(family, variant), tmp_path, method, way))
    at_work.loop()
    assert at_work.finish().verdict.passed
    assert "vae" in at_work.family.resting or not at_work.family.resting


# Everything that a draw depends on, at once.
EVERYTHING: dict[str, Any] = {"crop": "random", "flip": True, "mask": "alpha", "unmasked_weight": 0.1}
EVERYTHING |= {"shuffle_tags": True, "keep_tags": 1}


@pytest.mark.parametrize("case", CASES, ids=lessons.name)
def test_with_all_that_is_drawn_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    case: tuple[str, ...], base_folder: Any, tmp_path: Path
):
    family, variant, method, way = case
    dropout = {} if method in ("textual_inversion", "pivotal_tuning") else {"caption_dropout": 0.3}
    train = {"steps": 7, "batch_size": 4, "accumulate": 2, "ema": 0.9, "noise_offset": 0.1}

    def start(name: str) -> Any:
        where, dataset = tmp_path / name, EVERYTHING | dropout
        return run.prepare(
            lesson(base_folder(family, variant), where, method, way, alpha=True, train=train, dataset=dataset)
        ).trainer

    def told(reports: Any) -> list[Any]:
        return [
            (it.loss, it.grad_norm, [(draw.sha256, draw.crop, draw.caption) for draw in it.draws]) for it in reports
        ]

    whole, first, second = start("whole"), start("first"), start("second")
    expected, going = told(whole.steps()), first.steps()
    begun = told(next(going) for _ in range(3))
    second.resume(copy.deepcopy(first.state()))
    assert begun + told(second.steps()) == expected
    assert len({draw[1].size for step in expected for draw in step[2]}) > 2
    for name, value in whole.student.state_dict().items():
        assert torch.equal(second.student.state_dict()[name], value)


def test_accumulation_in_buckets_changes_the_memory_and_not_the_result(base_folder: Any, tmp_path: Path):
    found = []
    for accumulate in (1, 2, 4):
        train = {"batch_size": 4, "accumulate": accumulate, "optimizer": "torch.optim.SGD"}
        where = tmp_path / str(accumulate)
        found.append(
            list(run.prepare(lesson(base_folder("flux"), where, "lora", "plain", train=train)).trainer.steps())
        )
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert [draw.sha256 for draw in one.draws] == [draw.sha256 for draw in two.draws]
            assert math.isclose(one.loss, two.loss, rel_tol=1e-4)


def test_two_processes_see_the_buckets_of_one(base_folder: Any, tmp_path: Path):
    train = {"batch_size": 4, "optimizer": "torch.optim.SGD", "learning_rate": 0.1, "max_grad_norm": 0.5}
    recipes = [
        lesson(
            base_folder("stable_diffusion"), tmp_path / name, "dreambooth", "images", True, train=train, dataset=given
        )
        for name in ("one", "two")
        for given in [EVERYTHING | {"caption_dropout": 0.3}]
    ]
    at_work = run.prepare(recipes[0])
    at_work.loop()
    alone = lessons.lines(at_work.folder)
    (tmp_path / "recipe.yaml").write_text(recipes[1].to_yaml())
    done = lessons.on_two("train", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    together = lessons.lines(tmp_path / "two" / "run")
    for one, two in zip(alone, together, strict=True):
        assert one["pictures"] == two["pictures"]
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-4)
        assert math.isclose(one["grad_norm"], two["grad_norm"], rel_tol=1e-3)
