"""The evaluation of a run, for people: each score between what bounds it, each prompt with its pictures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune.evaluation.intervals import Score
from finetune.evaluation.result import EncoderScores, Evaluation, PictureScores
from finetune.evaluation.words import called, describe
from finetune.report import charts
from finetune.report.markup import Markup, element, figure, joined, table
from finetune.report.thumbnail import thumbnail

# What `words.describe` calls a measure, as a person would ask for it.
QUESTIONS = {
    "identity": "Does it look like the subject?",
    "prompt following": "Does it still do what a prompt says?",
    "class": "Is the rest of its class as it was?",
    "copying": "Does it repeat its training photos?",
    "best weight": "How strongly should it be applied?",
}
MOST_COPIES = 12
VERDICT = re.compile(r"(?<=[)s]): ")  # between the numbers of a measure and the words for them


@dataclass(frozen=True)
class Measure:
    """One score, what it says, and what it lies between."""

    title: str
    meaning: str
    score: Score | None
    marks: dict[str, float | None]


def answers(found: Evaluation) -> dict[str, object]:
    """Questions, and the measures in words, without their numbers."""
    said = describe(found)
    words = {name: VERDICT.split(said[name], maxsplit=1)[-1] for name in QUESTIONS if name in said}
    if found.copying is not None and found.copying.line.line <= 1:
        count = len(found.copying.copies)
        words["copying"] = f"{count} of {found.copying.num_pictures} pictures do" if count else "no picture does"
    if found.sweep is not None:
        words["best weight"] = "no weight is good" if found.sweep.best is None else f"weight {found.sweep.best:g}"
    return {QUESTIONS[name]: text for name, text in words.items()}


def measures(scores: EncoderScores, found: Evaluation) -> list[Measure]:
    base = {"base": scores.following_base}
    word = found.class_prompt or "its class"
    return [
        Measure(
            "Identity",
            "how much the pictures look like the photos; the ceiling is what photos have with each other, the floor "
            f"what the base draws for {word}",
            scores.identity,
            {"floor": scores.floor, "ceiling": scores.ceiling},
        ),
        Measure(
            "Prompt following",
            "how much of the prompt can be seen; the base has no subject to mind",
            scores.following,
            base,
        ),
        Measure(
            "Contrast",
            "how much better a picture fits its own prompt than the other prompts",
            scores.contrast,
            {"base": scores.contrast_base},
        ),
        Measure("Diversity", "how different the pictures of one prompt are", scores.diversity, {}),
        Measure(
            f"Leaking into {word}",
            f"how much {word} without the taught word looks like the subject; best where the base is",
            scores.prior_resemblance,
            {"base": scores.prior_resemblance_base},
        ),
        Measure(
            f"Variety of {word}",
            "how different these are from each other; best where the base is, or right of it",
            scores.prior_diversity,
            {"base": scores.prior_diversity_base},
        ),
    ]


def bars(scores: EncoderScores, found: Evaluation) -> Markup:
    """Every score with its interval."""
    rows = [
        element("li", element("h4", each.title), element("p", each.meaning), _bar(each, each.score))
        for each in measures(scores, found)
        if each.score is not None
    ]
    text = (
        f"As {called(scores.encoder)} sees it. The dot is the score, the thick line its 95 % interval (where it would "
        "likely lie with other prompts of this kind), the upright lines what it is compared with."
    )
    return joined([element("h3", "Scores"), element("p", text, class_="lead"), element("ul", *rows, class_="bars")])


def prompts(found: Evaluation, folder: Path) -> Markup:
    """A row for each prompt, with the base's picture of the class from the same seed."""
    drawn: dict[str, list[PictureScores]] = {}
    for row in found.pictures:
        if row.kind == "concept":
            drawn.setdefault(row.prompt, []).append(row)
    base = {row.seed: row for row in found.pictures if row.kind == "base"}
    judge = found.scores[0].encoder
    reader = next((each.encoder for each in found.scores if each.following is not None), None)
    rows = []
    for prompt, pictures in drawn.items():
        before = base.get(pictures[0].seed)
        shown = None if before is None else thumbnail(folder / before.file, f"the base: {before.prompt}")
        scores = [_mean([row.identity.get(judge) for row in pictures])]
        scores += [_mean([row.following.get(reader) for row in pictures])] if reader else []
        marked = element("strong", prompt, " (the worst)") if prompt == found.worst.prompt else prompt
        rows.append([marked, shown or "-", thumbnail(folder / pictures[0].file, prompt), *scores])
    head = ["prompt", "the base's", "with the adapter", "identity", *(["prompt following"] if reader else [])]
    return table(head, rows, f"Each prompt, measured on {counted(found.seeds)} of it, the first of which is shown")


def worst(found: Evaluation, folder: Path) -> Markup:
    picture = thumbnail(folder / found.worst.file, f"the worst picture, of the prompt {found.worst.prompt}")
    text = f"“{found.worst.prompt}”: identity {found.worst.identity:.2f}"
    if found.worst.contrast is not None and found.worst.contrast_base is not None:
        text += f", contrast {found.worst.contrast:.2f} (the base {found.worst.contrast_base:.2f})"
    return figure("The worst prompt", picture, f"{text}. If even this one is good enough, all are.")


def copies(found: Evaluation, folder: Path) -> Markup:
    """The flagged pictures, each beside the photo that it repeats."""
    said = describe(found).get("copying")
    if said is None:
        return element("p", "Copying was not measured: no training photos are known.", class_="missing")
    flagged = [row for row in found.pictures if row.copied and row.kind == "concept"]
    pairs = [
        element(
            "figure",
            element(
                "div",
                thumbnail(folder / row.file, f"drawn: {row.prompt}"),
                thumbnail(Path(row.nearest), f"training photo {Path(row.nearest).name}"),
                class_="pair",
            ),
            element("figcaption", f"drawn, and {Path(row.nearest).name}: cosine {row.nearest_cosine:.2f}"),
        )
        for row in flagged[:MOST_COPIES]
    ]
    text = f"{said.partition(')')[0]})." if ")" in said else f"{said}."
    return joined(
        [
            element("h3", "Copying"),
            element("p", text[0].upper() + text[1:]),
            element("div", *pairs, class_="pairs") if pairs else None,
        ]
    )


def drift(found: Evaluation) -> Markup:
    moved, word = found.drift, found.class_prompt or "pictures of its kind"
    text = (
        f"The model's answers to “{word}” moved by {moved.class_prompts:.4f}, to prompts that have nothing to do with "
        f"it by {moved.unrelated:.4f}; 1 would be another model."
    )
    return joined([element("h3", "Drift"), element("p", text)])


def counted(number: int) -> str:
    return f"{number} picture" if number == 1 else f"{number} pictures"


def _bar(measure: Measure, score: Score) -> Markup:
    marks = {name: number for name, number in measure.marks.items() if number is not None}
    against = "".join(f", {name} {number:.2f}" for name, number in marks.items())
    return charts.bar(score, marks, f"{measure.title} {score}{against}")


def _mean(numbers: list[float | None]) -> str:
    known = [number for number in numbers if number is not None]
    return f"{sum(known) / len(known):.2f}" if known else "-"
