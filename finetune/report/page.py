"""One run, from top to bottom: what was asked, what it saw, what came of it, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.folder import EVALUATION
from finetune.report import curves, judged
from finetune.report.markup import Markup, element, facts, joined, lines, missing, table
from finetune.report.read import Run
from finetune.report.thumbnail import thumbnail

# More than these make a page too long to read, and too large to send.
MOST_PICTURES, MOST_STEPS, MOST_PROMPTS = 60, 10, 10


def one(run: Run) -> Markup:
    evaluation = run.evaluation
    return joined(
        [
            section(
                "What was asked",
                "A base model that can draw many things was taught something new. This is what was asked for"
                + (", and what came of it." if evaluation else "."),
                asked(run),
            ),
            section(
                "The pictures it learnt from", "These pictures, with these words, are what it was to learn.", data(run)
            ),
            section(
                "What it draws",
                "The same prompts with the same seeds as training went on: the first row is the base, which does not "
                "know it yet.",
                samples(run),
            ),
            section(
                "How training went",
                "Lines of numbers over steps: they tell whether it learnt, and whether it learnt for too long.",
                charted(
                    *(curves.loss([run]), curves.validation([run]), curves.levels(run)),
                    *(curves.trade_off([run]), curves.weights([run])),
                ),
            ),
            section(
                "How good it is",
                "Whether the subject is like the photos and prompts are still followed, measured on many pictures.",
                evaluated(run),
            ),
            section("Files, time and memory", "What the run left behind, and what it took.", costs(run)),
        ]
    )


def section(title: str, lead: str, *content: object) -> Markup:
    """A part of the page, whose first sentence says what to see in it."""
    return element("section", element("h2", title), element("p", lead, class_="lead"), *content)


def charted(*charts: object) -> Markup:
    """Charts beside each other where the page is wide enough."""
    return element("div", *charts, class_="charts")


def asked(run: Run) -> Markup:
    settings = run.settings
    pairs: dict[str, object] = {
        "method": str(settings.get("method.name", "")).replace("_", " "),
        "base": settings.get("base.source"),
        "taught word": settings.get("placeholder"),
        "steps": f"{settings.get('train.steps')} of {settings.get('train.batch_size')} pictures each",
        "exported": None if run.kept in (None, run.last) else f"step {run.kept}, which was the best",
        "learning rate": settings.get("train.learning_rate"),
    }
    recipe = element("details", element("summary", "The whole recipe"), element("pre", run.recipe, tabindex=0))
    words = judged.answers(run.evaluation) if run.evaluation else {}
    if measured := run.curve("validation_loss/mean"):
        words["Was it taught for too long?"] = curves.overfitting(measured) + _looked_best(run)
    verdict = facts(words, "verdict") if words else missing(run.gaps["evaluation"])
    prompts = element("ul", *(element("li", prompt) for prompt in run.prompts), class_="prompts")
    return joined([verdict, facts(pairs), *([element("h3", "Prompts"), prompts] if run.prompts else []), recipe])


def data(run: Run) -> Markup:
    if not run.pictures:
        return missing(run.gaps.get("data", "There are none."))
    background = str(run.settings.get("dataset.background", "#ffffff"))
    rows = [
        [
            thumbnail(Path(picture.path), Path(picture.path).name, background),
            lines(*map(run.fill, picture.captions)),
            lines(
                Path(picture.path).name,
                f"{picture.width} x {picture.height}",
                *(["held out: not trained on"] if picture.path in run.held_out else []),
            ),
        ]
        for picture in run.pictures[:MOST_PICTURES]
    ]
    count, size = len(run.pictures), run.settings.get("dataset.resolution")
    left = f", {len(run.held_out)} of them held out" if run.held_out else ""
    left += f"; the first {MOST_PICTURES} are shown" if count > MOST_PICTURES else ""
    return table(["picture", "caption", "file"], rows, f"{count} pictures{left}, trained on at {size} x {size} pixels")


def samples(run: Run) -> Markup:
    if not run.samples:
        return missing("No samples: validation.prompts in the recipe has them drawn before, while and after training.")
    numbers = sorted({number for row in run.samples.values() for number in row})[:MOST_PROMPTS]
    steps = list(run.samples)
    shown = {*spread(steps, MOST_STEPS), run.kept}  # not each was drawn
    rows = [[_when(step, run), *(_sample(run, step, number) for number in numbers)] for step in steps if step in shown]
    caption = "Prompts in columns, training steps in rows"
    if len(rows) < len(steps):
        caption += f"; {len(rows)} of {len(steps)} checkpoints are shown"
    return table(["step", *(prompt_of(run, number) for number in numbers)], rows, caption)


def evaluated(run: Run) -> Markup:
    found, folder = run.evaluation, run.folder / EVALUATION
    if found is None:
        return missing(run.gaps["evaluation"])
    held = "that were not trained on" if found.photos_held_out else "that were trained on"
    text = (
        f"{found.num_prompts} prompts, {judged.counted(found.seeds)} of each, adapter weight {found.weight:g}, "
        f"compared with {len(found.photos)} photos {held}."
    )
    return joined(
        [
            element("p", text),
            *(element("p", f"Note: {note}.") for note in found.notes),
            *(judged.bars(scores, found) for scores in found.scores),
            judged.worst(found, folder),
            judged.prompts(found, folder),
            judged.copies(found, folder),
            judged.drift(found),
        ]
    )


def costs(run: Run) -> Markup:
    rows = [[name, size_of(size)] for name, size in run.sizes.items()]
    pairs: dict[str, object] = {"time": duration(run.newest("seconds")), "GPU memory at most": memory(run)}
    return joined([facts(pairs), table(["file", "size"], rows, "Files of the run; folders in sum")])


def spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)]


def prompt_of(run: Run, number: int) -> str:
    """A prompt in words; where the recipe has it no more, as its file is called."""
    if number < len(run.prompts):
        return run.prompts[number]
    return next(row[number].stem.partition("-")[2].replace("-", " ") for row in run.samples.values() if number in row)


def size_of(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def duration(seconds: float | None) -> str | None:
    """Seconds in words."""
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def memory(run: Run) -> str | None:
    peak = run.newest("peak_gib")
    return None if peak is None else f"{peak:.1f} GiB"


def _looked_best(run: Run) -> str:
    """The step whose pictures were judged the best, where that is why it was exported."""
    judged_at = [step for step, _, _ in run.trade_off()]
    chosen = run.settings.get("validation.keep") == "best" and len(judged_at) > 2 and run.kept in judged_at
    return f" Its pictures were best at step {run.kept}, which was exported." if chosen else ""


def _sample(run: Run, step: int, number: int) -> Markup:
    path = run.samples[step].get(number)
    prompt = prompt_of(run, number)
    return element("span", "-") if path is None else thumbnail(path, f"{prompt}, at step {step}")


def _when(step: int, run: Run) -> str:
    if step == 0:
        return "before training"
    return f"step {step}, the result" if step == run.kept else f"step {step}"
