"""What the numbers mean, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.evaluation.intervals import Score
from finetune.evaluation.result import EncoderScores, Evaluation

TITLE = 16  # characters


def called(encoder: str) -> str:
    """A model of the Hub by its name, a folder by its last two parts."""
    return "/".join(Path(encoder).parts[-2:])


def describe(found: Evaluation) -> dict[str, str]:
    """Each measure in words, by the first encoder that has it."""
    scores, drift = found.scores[0], found.drift
    reader = next((each for each in found.scores if each.following is not None), None)
    said = {
        "identity": _identity(scores),
        "prompt following": None if reader is None else _following(reader),
        "class": _class(scores),
        "other answers": f"moved by {drift.class_prompts:.4f} on the class and {drift.unrelated:.4f} on unrelated "
        "prompts (of about 1)",
        "diversity": None if scores.diversity is None else f"{scores.diversity} between pictures of a prompt",
        "copying": _copies(found),
        "best weight": _weights(found),
    }
    return {title: text for title, text in said.items() if text is not None}


def report(found: Evaluation) -> list[str]:
    """One evaluation on a terminal."""
    held = "that were not trained on" if found.photos_held_out else "that were trained on"
    worst = found.worst
    against = "" if worst.contrast is None else f"contrast {worst.contrast:.2f} (the base {worst.contrast_base:.2f}), "
    lines = describe(found) | {
        "worst prompt": f"{worst.prompt!r}: {against}identity {worst.identity:.2f}, {worst.file}",
        **{f"by {called(each.encoder)}": f"identity {_identity(each)}" for each in found.scores[1:]},
        "written to": found.folder,
    }
    return [
        f"{found.name}: {found.num_prompts} prompts ({found.prompts}) x {found.seeds}, weight {found.weight:g}, "
        f"against {len(found.photos)} photos {held}",
        *(f"  {title:{TITLE}} {text}" for title, text in lines.items()),
        *(f"  note: {note}" for note in found.notes),
    ]


def compare(every: Sequence[Evaluation]) -> list[str]:
    """Several evaluations: a row each, and their means with 95 % intervals over subjects."""
    titles = ("", "identity", "floor", "ceiling", "following", "base", "class", "base", "copies", "weight")
    rows = [titles, *(_row(found) for found in every), _means(every)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def means(every: Sequence[Evaluation]) -> dict[str, Score]:
    """Over subjects, by the first encoder: identity, prompt following, PRES and DIV, those that all have."""
    first = [found.scores[0] for found in every]
    table = {
        "identity": [scores.identity for scores in first],
        "following": [scores.following for scores in first],
        "prior_resemblance": [scores.prior_resemblance for scores in first],
        "prior_diversity": [scores.prior_diversity for scores in first],
    }
    return {
        name: Score.of([score.value for score in scores if score is not None], "subjects")
        for name, scores in table.items()
        if None not in scores
    }


def _row(found: Evaluation) -> tuple[str, ...]:
    scores = found.scores[0]
    numbers = (
        scores.identity.value,
        scores.floor,
        scores.ceiling,
        scores.following and scores.following.value,
        scores.following_base,
        scores.prior_resemblance.value,
        scores.prior_resemblance_base,
    )
    shown = ("-" if number is None else f"{number:.2f}" for number in numbers)
    copies = "-" if found.copying is None else f"{len(found.copying.copies)}/{found.copying.num_pictures}"
    return (
        found.name,
        *shown,
        copies,
        "-" if found.sweep is None or found.sweep.best is None else f"{found.sweep.best:g}",
    )


def _means(every: Sequence[Evaluation]) -> tuple[str, ...]:
    mean = means(every)
    following = str(mean["following"]) if "following" in mean else "-"
    return (
        "mean over subjects",
        str(mean["identity"]),
        "",
        "",
        following,
        "",
        str(mean["prior_resemblance"]),
        "",
        "",
        "",
    )


def _identity(scores: EncoderScores) -> str:
    share, ceiling = scores.likeness, "unknown" if scores.ceiling is None else f"{scores.ceiling:.2f}"
    text = f"{scores.identity} (floor {scores.floor:.2f}, ceiling {ceiling})"
    if scores.ceiling is not None and share is None:
        return f"{text}: unknown, this encoder does not tell the photos from the base's own pictures"
    if share is None:
        return text
    verdicts = {
        1.1: "above what photos have with each other: look for copies",
        0.7: "good, most of the way from floor to ceiling",
        0.4: "fair, about half of the way from floor to ceiling",
        0.1: "weak, more than its class but not yet the subject",
    }
    return f"{text}: {_verdict(share, verdicts, 'not learnt, others of its class are as alike')}"


def _following(scores: EncoderScores) -> str:
    text = f"{scores.following} (the base {scores.following_base:.2f})"
    if scores.kept is None:
        return text
    verdicts = {0.8: "good", 0.6: "fair, parts of some prompts are lost"}
    verdict = _verdict(scores.kept, verdicts, "weak, the subject pushes the rest of the prompt out")
    return f"{text}, its contrast to other prompts {scores.kept:.0%} of the base's: {verdict}"


def _class(scores: EncoderScores) -> str:
    verdicts = {0.5: "lost, the class has become the subject", 0.2: "fading, the class takes after the subject"}
    verdict = _verdict(scores.class_moved or 0.0, verdicts, "kept")
    return (
        f"resembles the subject by {scores.prior_resemblance} (the base's {scores.prior_resemblance_base:.2f}), and "
        f"varies by {scores.prior_diversity} ({scores.prior_diversity_base:.2f}): {verdict}"
    )


def _copies(found: Evaluation) -> str | None:
    if found.copying is None:
        return None
    copying = found.copying
    if copying.line.line > 1:
        return "cannot be told: the photos are as alike as copies"
    shown = f": {', '.join(copying.copies[:3])}" if copying.copies else ""
    return (
        f"{len(copying.copies)} of {copying.num_pictures} pictures repeat a training photo "
        f"(cosine over {copying.line.line:.2f}){shown}"
    )


def _weights(found: Evaluation) -> str | None:
    if found.sweep is None:
        return None
    best = "none" if found.sweep.best is None else f"{found.sweep.best:g}"
    shown = ", ".join(f"{each.weight:g} ({each.identity:.2f}, {each.contrast:.2f})" for each in found.sweep.scores)
    return f"{best}, of weights (identity, contrast) {shown}"


def _verdict(number: float, words: dict[float, str], otherwise: str) -> str:
    return next((text for least, text in words.items() if number >= least), otherwise)
