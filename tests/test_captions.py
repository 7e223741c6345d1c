"""What a draw makes of a caption: tags in a new order, now and then none; and prompts that still belong to them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lessons
import numpy as np
import pytest
import tiny
import torch

from finetune import run
from finetune.config import build
from finetune.dataset import DatasetConfig, Draw, Pictures, scan
from finetune.dataset.draws import shuffle
from finetune.errors import UserError

TAGS = "a {} thing, red, round , big,, small"


def drawn(folder: Path, count: int = 200, seed: int = 0, **settings: Any) -> list[Draw]:
    if not folder.exists():
        tiny.save_pictures(folder, caption=TAGS)
    chosen = build(DatasetConfig, {"folder": str(folder), "resolution": tiny.SIZE, **settings})
    pictures = Pictures.from_pictures(scan(chosen), chosen, "sks")
    return [pictures.draw(seed, position) for position in range(count)]


def test_tags_are_drawn_in_every_order_behind_those_that_stay(tmp_path: Path):
    captions = {draw.caption for draw in drawn(tmp_path / "a", 400, shuffle_tags=True, keep_tags=2)}
    assert all(caption.startswith("a sks thing, red, ") for caption in captions)
    assert {tuple(sorted(caption.split(", "))) for caption in captions} == {
        ("a sks thing", "big", "red", "round", "small")
    }
    assert len(captions) == 6


@pytest.mark.parametrize("keep", [0, 1, 2, 9])
@pytest.mark.parametrize("caption", ["", "one", "a, b", " a ,b,  c", ", ,"])
def test_no_tag_is_lost_or_doubled(caption: str, keep: int):
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    found = shuffle(caption, keep, np.random.default_rng(0)).split(", ")
    assert sorted(found) == sorted(tags or [""]) and found[:keep] == (tags or [""])[:keep]


def test_a_share_of_the_draws_has_no_caption(tmp_path: Path):
    captions = Counter(draw.caption for draw in drawn(tmp_path / "a", 2000, caption_dropout=0.25))
    assert abs(captions[""] / 2000 - 0.25) < 0.03
    assert {draw.caption for draw in drawn(tmp_path / "a", 50, caption_dropout=1.0)} == {""}


def test_captions_change_and_nothing_else(tmp_path: Path):
    moving: dict[str, Any] = {"crop": "random", "flip": True}
    plain, varied = (
        drawn(tmp_path / "a", **moving),
        drawn(tmp_path / "a", shuffle_tags=True, caption_dropout=0.5, **moving),
    )
    for one, other in zip(plain, varied, strict=True):
        assert (one.path, one.crop, one.seed) == (other.path, other.crop, other.seed)
    assert any(one.caption != other.caption for one, other in zip(plain, varied, strict=True))


def test_without_these_settings_a_caption_is_what_was_written(tmp_path: Path):
    assert {draw.caption for draw in drawn(tmp_path / "a")} == {TAGS.replace("{}", "sks")}


def test_varied_captions_depend_on_seed_and_position_alone(tmp_path: Path):
    settings: dict[str, Any] = {"shuffle_tags": True, "caption_dropout": 0.3}
    first = drawn(tmp_path / "a", **settings)
    assert drawn(tmp_path / "a", **settings) == first
    assert [draw.caption for draw in drawn(tmp_path / "a", seed=1, **settings)] != [draw.caption for draw in first]


def test_the_class_keeps_its_caption(tmp_path: Path):
    chosen = build(
        DatasetConfig,
        {
            "folder": str(tiny.save_pictures(tmp_path)),
            "resolution": tiny.SIZE,
            "shuffle_tags": True,
            "caption_dropout": 0.9,
        },
    )
    prior = Pictures.from_pictures(scan(chosen), chosen, "sks").as_prior("a dog, outdoors")
    assert {prior.draw(0, position).caption for position in range(50)} == {"a dog, outdoors"}


def test_tags_that_stay_without_any_that_move_are_refused():
    with pytest.raises(UserError, match="keep_tags: has no effect"):
        build(DatasetConfig, {"folder": "a", "keep_tags": 1})


def lesson(base_folder: Any, output: Path, method: str, way: Any, family: str = "stable_diffusion", **dataset: Any):
    pictures = tiny.save_pictures(output / "pictures", caption=TAGS)
    return lessons.recipe(base_folder(family), output, method, way, pictures, dataset=dataset)


@pytest.mark.parametrize("method", ["textual_inversion", "pivotal_tuning"])
def test_a_word_cannot_be_learnt_from_captions_without_it(method: str, base_folder: Any, tmp_path: Path):
    way = next(iter(lessons.WAYS[method]))
    with pytest.raises(UserError, match=r"dataset\.caption_dropout: '<it>' is learnt"):
        lesson(base_folder, tmp_path, method, way, caption_dropout=0.1)


VARIED = {"shuffle_tags": True, "caption_dropout": 0.3}


@pytest.mark.parametrize("place", lessons.PLACES)
@pytest.mark.parametrize("family", tiny.BASES)
def test_a_prompt_always_belongs_to_its_caption(
    family: str, place: str, base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lessons.keep_in(place, monkeypatch)
    trainer = run.prepare(lesson(base_folder, tmp_path, "lora", "plain", family, **VARIED)).trainer
    seen = set()
    for report in trainer.steps():
        batch = trainer.encoder.encode(report.draws, 0)
        for index, draw in enumerate(report.draws):
            with torch.no_grad():
                alone = trainer.student.family.encode_prompt(trainer.student.family.tokenize([draw.caption]))
            torch.testing.assert_close(batch.prompt.embeds[index], alone.embeds[0])
            seen.add(draw.caption)
    assert len(seen) > 3 and "" in seen
    assert len(trainer.encoder.prompts.kept) == (0 if place == "nowhere" else len(seen))
