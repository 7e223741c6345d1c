"""A new word leaves the words around it what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lessons
import pytest
import torch

from finetune import run

SENTENCE = "a <it> in a room"


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_3"])
def test_a_word_that_is_held_to_its_context_disturbs_the_words_after_it_less(
    family: str, base_folder: Any, tmp_path: Path
):
    moved = {}
    for weight in (0.0, 10.0):
        way = {"init": "thing", "context_weight": weight}
        train = {"steps": 20, "learning_rate": 0.05}
        folder = tmp_path / str(weight)
        trainer = run.prepare(
            lessons.recipe(base_folder(family), folder, "textual_inversion", way, train=train)
        ).trainer
        read = trainer.student.family

        def words(read: Any = read) -> torch.Tensor:
            """What the first text encoder says of those after the new one."""
            ids = read.tokenize([SENTENCE])["text_encoder"]
            place = int((ids[0] == read.pipeline.tokenizer.convert_tokens_to_ids("<it>")).nonzero())
            with read.looking():
                return read.pipeline.text_encoder(ids).last_hidden_state[0, place + 1 : place + 4]

        before = words()
        for _ in trainer.steps():
            pass
        moved[weight] = float((words() - before).square().mean())
    assert 0 < moved[10.0] < 0.5 * moved[0.0]


def test_before_the_first_step_the_context_is_what_it_was(base_folder: Any, tmp_path: Path):
    losses = []
    for weight in (0.0, 10.0):
        way = {"init": "thing", "context_weight": weight}
        recipe = lessons.recipe(base_folder("stable_diffusion"), tmp_path / str(weight), "textual_inversion", way)
        trainer = run.prepare(recipe).trainer
        losses.append(trainer.student(trainer._drawn(0)[1][0]))
    torch.testing.assert_close(*losses)
