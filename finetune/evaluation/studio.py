"""Which pictures an evaluation needs, and how they are drawn: each weight of the adapter on a fresh base."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from finetune.canvas import Frame
from finetune.errors import warn
from finetune.evaluation.concept import Concept
from finetune.evaluation.drift import TIMES, UNRELATED, Drift, differ, predictions
from finetune.evaluation.prompts import Prompts
from finetune.families.base import Family
from finetune.files import read_shapes
from finetune.load import Adapter, load_adapters
from finetune.render import file_name, render

AT_ONCE = {"cpu": 4 * 256**2, "cuda": 2 * 1024**2}  # pixels of a batch
Kind = Literal["concept", "class", "base", "base-class", "unrelated", "sweep"]
Pictures = dict["Shot", Image.Image]
Known = dict[tuple[object, ...], Image.Image]  # what a base alone draws, by all that it depends on


@dataclass(frozen=True)
class Size:
    """How much is drawn."""

    seeds: int = 2  # pictures of each prompt
    class_pictures: int = 12  # of the class, with the adapter and without it
    weights: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0, 1.2)
    sweep_prompts: int = 8  # at most, that each further weight draws once


@dataclass(frozen=True)
class Shot:
    """One picture to draw.

    `concept` is the subject by the adapter and `base` its class in the same prompt by the base; `class` and
    `base-class` are the class alone by either; `unrelated` is something else by the base; `sweep` is the subject at
    another weight.
    """

    kind: Kind
    index: int  # of the prompt in its list
    prompt: str  # as it is drawn
    seed: int
    weight: float | None  # of the adapter; without it, the base alone

    @property
    def name(self) -> str:
        """Of its file."""
        kind = self.kind if self.kind != "sweep" else f"weight-{self.weight:g}"
        return f"{kind}-{self.index:02d}-{self.seed:04d}-{file_name(self.prompt)}.png"


def plan(concept: Concept, prompts: Prompts, size: Size) -> list[Shot]:
    """Every picture of an evaluation; the base's first.

    A picture's seed is its prompt's number, plus the number of prompts for each further picture, so that the base's
    and each weight's picture of a prompt start from the same noise.
    """
    count, main = len(prompts), concept.adapter.weight
    asked = [line.replace("{}", concept.word if prompts.is_style else concept.subject) for line in prompts.lines]
    plain = prompts.with_class(concept.class_prompt)
    classes = [
        (i, plain[i % count] if prompts.is_style else concept.class_prompt or "") for i in range(size.class_pictures)
    ]
    few = range(0, count, -(-count // size.sweep_prompts))
    shots = [Shot("base", i, plain[i], i, None) for i in range(count)]
    shots += [Shot("base-class", i, text, i, None) for i, text in classes]
    shots += [Shot("unrelated", i, text, i, None) for i, text in enumerate(UNRELATED)]
    shots += [Shot("concept", i, asked[i], i + turn * count, main) for turn in range(size.seeds) for i in range(count)]
    shots += [Shot("class", i, text, i, main) for i, text in classes]
    return shots + [Shot("sweep", i, asked[i], i, weight) for weight in size.weights if weight != main for i in few]


def draw(
    concept: Concept, shots: Sequence[Shot], steps: int, guidance: float, tick: Callable[[int], object], known: Known
) -> tuple[Pictures, Drift]:
    """The pictures, and what the adapter changes in the denoiser's answers at its own weight.

    Args:
        tick: called with the number of pictures that were finished.
        known: is not drawn again, and grows.
    """
    pictures: Pictures = {}
    answers: dict[float | None, list[torch.Tensor]] = {}
    for weight in dict.fromkeys(shot.weight for shot in shots):
        family = _open(concept, weight)
        wanted = [shot for shot in shots if shot.weight == weight]
        alone = wanted if weight is None else []
        keys = {shot: _key(family, concept, shot, steps, guidance) for shot in alone}
        pictures |= {shot: known[key] for shot, key in keys.items() if key in known}
        tick(len([shot for shot in alone if shot in pictures]))
        missing = [shot for shot in wanted if shot not in pictures]
        for batch, drawn in _draw(family, missing, concept.size, steps, guidance):
            pictures |= zip(batch, drawn, strict=True)
            tick(len(batch))
        known |= {key: pictures[shot] for shot, key in keys.items()}
        if weight in (None, concept.adapter.weight):
            answers[weight] = [_answers(family, pictures, kind) for kind in ("base-class", "unrelated")]
        del family  # or the next one is loaded beside it
    moved = [differ(*pair) for pair in zip(*answers.values(), strict=True)]
    return pictures, Drift(TIMES, *moved)


def _draw(
    family: Family, shots: Sequence[Shot], size: int | None, steps: int, guidance: float
) -> Iterator[tuple[Sequence[Shot], list[Image.Image]]]:
    """Batch by batch."""
    frame = Frame.of(family.pipeline, size)
    at_once = max(1, AT_ONCE[family.device.type] // math.prod(frame.sides))
    for start in range(0, len(shots), at_once):
        batch = shots[start : start + at_once]
        texts, seeds = [shot.prompt for shot in batch], [shot.seed for shot in batch]
        asked = {"steps": steps, "guidance": guidance, "size": frame.size, "batch_size": at_once}
        with family.drawing():
            yield batch, render(family.pipeline, texts, seeds, **asked)


def _key(family: Family, concept: Concept, shot: Shot, steps: int, guidance: float) -> tuple[object, ...]:
    """All that a picture of the base alone depends on."""
    sampler = repr(sorted(family.pipeline.scheduler.config.items()))
    return concept.opened, family.fingerprint, sampler, concept.size, steps, guidance, shot.prompt, shot.seed


def _answers(family: Family, pictures: Pictures, kind: Kind) -> torch.Tensor:
    """To as many of the base's pictures as there are unrelated ones."""
    shots = [shot for shot in pictures if shot.kind == kind][: len(UNRELATED)]
    return predictions(family, [shot.prompt for shot in shots], [pictures[shot] for shot in shots])


def check(concept: Concept) -> None:
    """Load base and adapter once, so that what does not fit is said before any picture is drawn.

    Raises:
        UserError: one cannot be loaded, or the adapter is for another base.
    """
    family = _open(concept, concept.adapter.weight)
    for file in concept.adapter.files():
        if read_shapes(file)[1].get("base_fingerprint", family.fingerprint) != family.fingerprint:
            warn(f"{file}: was made on other weights than those of {concept.base}. Name its own base, or doubt this.")


def _open(concept: Concept, weight: float | None) -> Family:
    """The base alone, or with the adapter at a weight; nothing of another weight is left in it."""
    family, device = concept.open_base(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family.to(device)  # which packs what is packed, and DoRA wants to know the packed weights
    if weight is not None:
        load_adapters(family.pipeline, [Adapter(concept.adapter.path, weight)])
        family.to(device)
    return family
