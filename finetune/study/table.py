"""A study's rows as tables: means over concepts, and differences to the first variant of the same concepts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from finetune.evaluation.intervals import Score
from finetune.study.plan import Comparison, Study
from finetune.study.work import Row

HEAD = (
    "variant",
    "identity",
    "prompt",
    "balance",
    "against the first",
    "class moved",
    "varied",
    "drift",
    "copies",
    "s",
    "kB",
)
FEWEST = 6  # concepts: of fewer a bootstrap's interval is far too narrow
JUDGED = ("identity", "prompt", "balance")


def title(name: str) -> str:
    """The first line, by which a page is known."""
    return f"# `{name}`\n"


def page(name: str, study: Study, rows: Sequence[Row]) -> str:
    """Markdown."""
    drawn = study.judging
    text = [
        title(name),
        "`identity` is how far pictures got from the base's of the class (0) to photos that were held out (1), "
        "`prompt` the prompt following that is left of the base's, `balance` their harmonic mean; means over concepts. "
        "`against the first` are the differences to the first variant on the same concepts, with 95 % intervals over "
        f"concepts, of {FEWEST} at least, bold where they exclude 0; of so many comparisons one in twenty is bold by "
        "chance. `class moved` is how far pictures of the class went from the base's to "
        "photos of the concept, `varied` their diversity, of the base's, `drift` how much answers to other prompts "
        "changed, `copies` the share of pictures that repeat a training photo, `s` the median of the seconds from "
        "recipe to adapter on the machine of the study. A mean of fewer runs than the variant has says of how many.",
        "",
        f"Each run: {len(study.seeds)} seed(s), {drawn.seeds} picture(s) of each prompt, {drawn.steps} steps, guidance "
        f"{drawn.guidance:g}.",
    ]
    for name, comparison in study.comparisons.items():
        own = [row for row in rows if row.comparison == name]
        if own:
            text += ["", *_table(name, comparison, study, own)]
    return "\n".join(text) + "\n"


def _table(name: str, comparison: Comparison, study: Study, rows: Sequence[Row]) -> list[str]:
    count = sum(len(study.concepts[group]) for group in comparison.concepts)
    lines = [f"## {name}", "", f"`{comparison.recipe}` on {count} concepts.", ""]
    lines += [_line(HEAD), _line(["---"] * len(HEAD))]
    first, *_ = comparison.variants
    base = [row for row in rows if row.variant == first]
    for variant in comparison.variants:
        own = [row for row in rows if row.variant == variant]
        if own:
            lines.append(_line(_cells(variant, own, base, count * len(set(study.seeds)))))
    said = [f"- {name}: `{' '.join(settings)}`" for name, settings in comparison.variants.items() if settings]
    return [*lines, "", *said]


def _cells(variant: str, own: Sequence[Row], base: Sequence[Row], asked: int) -> list[str]:
    whole = [row for row in own if not row.error]
    diverged = sum(row.is_final for row in own) - len(whole)
    told = variant + (f" ({len(whole)} of {asked} runs)" if len(whole) < asked else "")
    told += f" ({diverged} diverged)" if diverged else ""
    if not whole:
        return [told, *["-"] * (len(HEAD) - 1)]
    against = "" if own == base else ", ".join(f"{name} {difference(name, whole, base)}" for name in JUDGED)
    return [
        told,
        *(_mean(name, whole) for name in JUDGED),
        against,
        _mean("class_moved", whole),
        _mean("class_varied", whole),
        _mean("drift", whole, ".4f"),
        _mean("copies", whole, ".0%"),
        _median([row.seconds for row in whole if row.seconds is not None]),
        _mean("kilobytes", whole, ".0f"),
    ]


def difference(name: str, own: Sequence[Row], base: Sequence[Row]) -> str:
    """The mean of what was gained on each concept, in bold where the interval excludes 0."""
    before = {(row.concept, row.seed): getattr(row, name) for row in base}
    pairs = [
        (row.concept, getattr(row, name) - before[row.concept, row.seed])
        for row in own
        if getattr(row, name) is not None and before.get((row.concept, row.seed)) is not None
    ]
    if not pairs:
        return "-"
    places = {concept: place for place, concept in enumerate(dict.fromkeys(concept for concept, _ in pairs))}
    score = Score.of([gain for _, gain in pairs], "subjects", [places[concept] for concept, _ in pairs])
    if score.low is None or score.high is None or score.num_units < FEWEST:
        return f"{score.value:+.2f}"
    text = f"{score.value:+.2f} [{score.low:+.2f}, {score.high:+.2f}]"
    return f"**{text}**" if score.low > 0 or score.high < 0 else text


def _median(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.1f}" if seconds else "-"


def _mean(name: str, rows: Sequence[Row], shown: str = ".2f") -> str:
    values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
    few = f" (of {len(values)})" if 0 < len(values) < len(rows) else ""
    return format(fmean(values), shown) + few if values else "-"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
