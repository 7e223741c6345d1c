"""How far the prompts of a study are followed by pictures that truly show its subjects: drawn here, judged as runs are.

An encoder tells a place behind any of a class better than behind one subject that it has never met. So of the base's
prompt following, which a study's `prompt` is the share of, pictures of the subject itself may have less than all.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import yaml
from composer import Composer
from concepts import SIZE, STUDIED, SUBJECTS, place_words, view
from layouts import Arranger, Place
from PIL import Image
from scenes import SCENES
from specification import Picture
from sprites import describe, drawing, fetch, load_icons, rasterize
from torch import Tensor
from vocabulary import COLOURS

from finetune.evaluation import metrics
from finetune.evaluation.encoders import Encoder
from finetune.evaluation.intervals import Score
from finetune.evaluation.prompts import Prompts
from finetune.families.base import Source
from finetune.generate import load_base
from finetune.render import render, use_ddim
from finetune.study.study import read_rows

SCALE = 0.6  # of the picture
THINGS = ("red apple", "wrapped gift", "crown", "sunglasses")  # sprites 1 to 4, after the subject
PLACES = {f"{{}} {phrase}": name for name, scene in SCENES.items() for phrase in scene.phrases}
PLACES |= {f"{{}} {place_words(colour)}": colour for colour in COLOURS}


class Shown(NamedTuple):
    """Contrast with the prompts of the base's pictures of a class, and of true ones of the subject."""

    concept: str
    base: float
    true: float

    @property
    def share(self) -> float:
        return self.true / self.base


def compose(line: str, arranger: Arranger) -> Picture:
    """The picture that a prompt of `embedded` asks for, of the arranger's first sprite.

    Raises: KeyError, for any other prompt.
    """
    white, green = (list(COLOURS).index(name) for name in ("white", "green"))
    draws = tuple(arranger.rng.random() for _ in range(8))
    together = {
        "{} next to a red apple": lambda: arranger.beside(0, 1),
        "{} next to a gift": lambda: arranger.beside(0, 2),
        "{} wearing a crown": lambda: arranger.wearing(0, 3, scale=SCALE),
        "{} wearing sunglasses": lambda: arranger.wearing(0, 4, scale=SCALE),
    }
    if line in together:
        return Picture(together[line](), "plain", (white, white), draws)
    if line == "{} on a green and white striped background":
        return replace(view(0, arranger, "green", SCALE, 0, 0, draws), backdrop="striped", colours=(green, white))
    return view(0, arranger, PLACES[line], SCALE, 0, 0, draws)


def draw(source: Path, set_name: str, label: str, prompts: Prompts) -> list[Image.Image]:
    """One picture for each prompt, all things in the subject's own style."""
    icons, labels = load_icons(source, set_name), (label, *THINGS)
    images = [rasterize(drawing(icons, name) or "") for name in labels]
    sprites = [describe(image, set_name, name, name, "") for image, name in zip(images, labels, strict=True)]
    composer = Composer(torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]), sprites, SIZE)
    arranger = Arranger(sprites, Place(None, 0.16), Random(label))
    drawn = composer.draw([compose(line, arranger) for line in prompts.lines])
    return [Image.fromarray(pixels) for pixels in (drawn.permute(0, 2, 3, 1) * 255).round().byte().numpy()]


def measure_shown(source: Path, base: Path, study: Path) -> None:
    """Write `shown.csv` beside the study, with a row for each subject, and say how its runs compare."""
    subjects, prompts = SUBJECTS | STUDIED, Prompts.load("embedded")
    fetch(source, tuple(f"@iconify-json/{name}" for name in sorted({name for name, _, _ in subjects.values()})))
    planned = yaml.safe_load(study.read_text())
    taught = {name: concept for group in planned["concepts"].values() for name, concept in group.items()}
    encoder = Encoder.load(str(base / "evaluation"))
    said = {name: prompts.with_class(taught[name]["class_prompt"]) for name in subjects}
    based = _follow_classes(base, planned["judging"], set(said.values()), encoder)
    shown = []
    for name, (set_name, label, _) in subjects.items():
        true = _contrast(encoder.see(draw(source, set_name, label, prompts)), encoder.read(said[name]))
        shown.append(Shown(name, based[said[name]], true))
    _write(shown, study.with_name("shown.csv"))
    _compare({row.concept: row.share for row in shown}, study.with_suffix(".csv"))


def _follow_classes(base: Path, judging: dict, asked: set[tuple[str, ...]], encoder: Encoder) -> dict:
    """Contrast of the base's own pictures of each list of prompts, drawn as for a run."""
    pipeline = load_base(Source(str(base))).to("cuda" if torch.cuda.is_available() else "cpu")
    use_ddim(pipeline)
    settings = {"size": SIZE, "batch_size": 4, "steps": judging["steps"], "guidance": judging["guidance"]}
    seen = {lines: encoder.see(render(pipeline, lines, range(len(lines)), **settings)) for lines in sorted(asked)}
    return {lines: _contrast(pictures, encoder.read(lines)) for lines, pictures in seen.items()}


def _contrast(seen: Tensor, read: Tensor) -> float:
    return float(metrics.contrast(seen, read, torch.arange(len(read))).mean())


def _write(shown: list[Shown], path: Path) -> None:
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow((*Shown._fields, "share"))
        lines.writerows((row.concept, *(f"{v:.4f}" for v in (row.base, row.true, row.share))) for row in shown)
    print("true pictures:", Score.of([row.share for row in shown], "subjects"))


def _compare(share: dict[str, float], runs: Path) -> None:
    """How much of the base's prompt following each variant of the study has beyond true pictures of its subjects."""
    rows = [row for row in read_rows(runs) if row.prompt is not None and row.concept in share]
    for comparison, variant in dict.fromkeys((row.comparison, row.variant) for row in rows):
        own = [row for row in rows if (row.comparison, row.variant) == (comparison, variant)]
        beyond = Score.of([(row.prompt or 0.0) - share[row.concept] for row in own], "subjects")
        print(f"{comparison}, {variant}: {beyond}")
