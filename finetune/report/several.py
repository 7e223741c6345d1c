"""Several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.evaluation.intervals import Score
from finetune.report import charts, curves
from finetune.report.charts import Curve
from finetune.report.markup import Markup, element, figure, joined, missing, table
from finetune.report.page import MOST_PROMPTS, charted, duration, memory, prompt_of, section, size_of
from finetune.report.read import Run
from finetune.report.thumbnail import thumbnail

SAME = ("name", "output.folder", "validation.prompts", "tracking")  # say nothing of the result
MOST_SETTINGS = 12
NONE = "-"
UNLIKE = "Careful: these runs were judged by other encoders, prompts or photos, so their scores do not compare well."
# What a score is called here, what it is called in an evaluation, and what is good.
SCORES = {
    "identity": ("identity", "right is more like the photos"),
    "prompt following": ("following", "right is more of what the prompt says"),
    "leaking into its class": ("prior_resemblance", "left is better: the rest of the class stays as it was"),
    "variety of its class": ("prior_diversity", "right is better: the rest of the class stays as varied as it was"),
}


def several(runs: Sequence[Run]) -> Markup:
    return joined(
        [
            section(
                "The runs",
                "A row for each run: first the settings in which they differ, then what came of it. Scores are means "
                "with their 95 % interval; where two intervals overlap widely, the runs may be equally good.",
                overview(runs),
                scores(runs),
                *(missing(f"{run.name}: {run.gaps['evaluation']}") for run in runs if "evaluation" in run.gaps),
            ),
            section(
                "What they draw",
                "The same prompts with what each run came to; the first row is the base before training.",
                samples(runs),
            ),
            section(
                "How training went",
                "Lines of numbers over steps, in a colour for each run.",
                charted(curves.loss(runs), curves.validation(runs), curves.trade_off(runs), curves.weights(runs)),
            ),
        ]
    )


def overview(runs: Sequence[Run]) -> Markup:
    every = different(runs)
    keys = every[:MOST_SETTINGS]
    names = [name for name in SCORES if any(score(run, name) for run in runs)]
    rows = [
        [
            run.name,
            *(written(run.settings[key]) if key in run.settings else NONE for key in keys),
            *(score(run, name) or NONE for name in names),
            *(_copies(run), _best(run)),
            *(
                size_of(run.exported) if run.exported else NONE,
                duration(run.newest("seconds")) or NONE,
                memory(run) or NONE,
            ),
        ]
        for run in runs
    ]
    head = ["run", *map(_named, keys), *names, "copies", "best weight", "size", "time", "memory"]
    kept = [column for column in range(len(head)) if column == 0 or any(row[column] != NONE for row in rows)]
    more = len(every) - len(keys)
    return table(
        [head[column] for column in kept],
        [[row[column] for column in kept] for row in rows],
        f"{len(runs)} runs; " + (f"{more} more settings differ" if more else "other settings are the same in all"),
    )


def different(runs: Sequence[Run]) -> list[str]:
    """The settings that not all runs have alike."""
    every = dict.fromkeys(key for run in runs for key in run.settings if key not in SAME)
    return [key for key in every if len({repr(run.settings.get(key)) for run in runs}) > 1]


def written(value: object) -> str:
    """A setting's value as a recipe has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def score(run: Run, name: str) -> Score | None:
    return getattr(run.evaluation.scores[0], SCORES[name][0]) if run.evaluation else None


def scores(runs: Sequence[Run]) -> Markup | None:
    """Each score of all evaluated runs on one axis."""
    figures = []
    for name, (_, good) in SCORES.items():
        found = {number: each for number, run in enumerate(runs) if (each := score(run, name)) is not None}
        if len(found) > 1:
            said = ", ".join(f"{runs[number].name} {each}" for number, each in found.items())
            marks = [Curve(runs[number].name, (), charts.style(number)) for number in found]
            shown = charts.ladder(found, f"{name}: {said}")
            figures.append(figure(name.capitalize(), shown, f"{good.capitalize()}.", charts.legend(marks)))
    if not figures:
        return None
    return joined([None if comparable(runs) else missing(UNLIKE), charted(*figures)])


def comparable(runs: Sequence[Run]) -> bool:
    """Whether all that were evaluated were judged by the same encoder, prompts and photos."""
    found = [run.evaluation for run in runs if run.evaluation]
    photos = {frozenset(Path(photo).name for photo in each.photos) for each in found}
    return len({(each.encoders[0].fingerprint, each.prompts, each.num_prompts) for each in found}) * len(photos) == 1


def samples(runs: Sequence[Run]) -> Markup:
    """A column for each prompt that all runs with samples drew, a row for each run."""
    shown = [run for run in runs if run.samples]
    drawn = [{prompt_of(run, number): number for number in run.samples[_newest(run)]} for run in shown]
    shared = [prompt for prompt in (drawn[0] if drawn else {}) if all(prompt in each for each in drawn)]
    if not shared:
        return missing("No samples of the same prompts: give the runs the same validation.prompts and placeholder.")
    shared, rows = shared[:MOST_PROMPTS], []
    if 0 in shown[0].samples:
        before = shown[0].samples[0]
        rows.append(["before training", *(_sample(before, drawn[0][prompt], prompt) for prompt in shared)])
    for run, numbers in zip(shown, drawn, strict=True):
        step = _newest(run)
        cells = (_sample(run.samples[step], numbers[prompt], f"{prompt}, by {run.name}") for prompt in shared)
        rows.append([f"{run.name}, step {step}", *cells])
    return table(["run", *shared], rows, "Prompts in columns, runs in rows")


def _named(key: str) -> Markup:
    """A setting's name, which may go on in a new line after each dot."""
    first, *rest = key.split(".")
    return element("code", first, *(part for each in rest for part in (".", element("wbr"), each)))


def _newest(run: Run) -> int:
    """The step whose samples show the result."""
    return max(run.samples) if run.kept is None or run.kept not in run.samples else run.kept


def _sample(row: dict[int, Path], number: int, alt: str) -> Markup:
    path = row.get(number)
    return element("span", NONE) if path is None else thumbnail(path, alt)


def _copies(run: Run) -> str:
    found = run.evaluation and run.evaluation.copying
    return f"{len(found.copies)} of {found.num_pictures}" if found and found.line.line <= 1 else NONE


def _best(run: Run) -> str:
    found = run.evaluation and run.evaluation.sweep
    return f"{found.best:g}" if found and found.best is not None else NONE
