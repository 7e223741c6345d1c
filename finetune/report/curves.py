"""What changed while training, of one run or of several, as charts; where there is no data, what gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.report import charts
from finetune.report.charts import Curve
from finetune.report.markup import Markup, element, figure, joined, missing
from finetune.report.read import Points, Run
from finetune.validation import LEVELS, RISE

NO_VALIDATION = (
    "No loss on held-out photos: with dataset.held_out in the recipe some photos are not trained on, and their loss "
    "shows when overfitting begins."
)
NO_SCORES = (
    "No scores while training: with dataset.held_out, validation.prompts and validation.every in the recipe, the "
    "pictures drawn while training are judged."
)
NO_SWEEP = (
    "No chart of adapter weights: finetune evaluate draws it, unless --weights is empty or nothing could be told."
)


def loss(runs: Sequence[Run]) -> Markup:
    """The training loss: of one run every step in grey and its mean in colour, of several the means alone."""
    shown = [(number, run, run.curve("loss")) for number, run in enumerate(runs) if run.curve("loss")]
    if not shown:
        return missing("No loss curve: metrics.jsonl holds no losses.")
    window = max(1, min(len(points) for _, _, points in shown) // 12)
    curves = [
        Curve(run.name, charts.thin(charts.smooth(points, window)), charts.style(number))
        for number, run, points in shown
    ]
    if len(runs) == 1:
        points = shown[0][2]
        curves = [
            Curve("each step", charts.thin(points), "raw"),
            Curve(f"mean of {window} steps", curves[0].points, "c0"),
        ]
    text = (
        "How far the model's guesses at the noise in a picture were off. It jumps about, because each step sees other "
        f"pictures and other noise; look at the mean of {window} steps, which should fall."
    )
    chart = charts.plot(
        curves, "step", "loss", f"Line chart of the training loss over steps. {_ends(curves[-1].points)}"
    )
    return figure("Loss on the training pictures", chart, text, charts.legend(curves))


def validation(runs: Sequence[Run]) -> Markup:
    """The loss on held-out photos, with the lowest step marked."""
    curves, said = [], []
    for number, run in enumerate(runs):
        if points := run.curve("validation_loss/mean"):
            curves.append(_with_lowest(Curve(run.name, charts.thin(points), charts.style(number))))
            said.append(overfitting(points) if len(runs) == 1 else f"{run.name}: {overfitting(points)}")
    if not curves:
        return missing(NO_VALIDATION)
    text = (
        "The same on photos that were not trained on. While it falls, what is learnt holds for new pictures; where it "
        "rises again, the run begins to learn its pictures by heart. The ring is its lowest point; what is drawn may "
        "look its best some steps later. "
    )
    chart = charts.plot(curves, "step", "loss", f"Line chart of the validation loss over steps. {' '.join(said)}")
    return figure(
        "Loss on held-out photos",
        chart,
        joined([text, element("strong", " ".join(said))]),
        charts.legend(curves) if runs[1:] else None,
    )


def levels(run: Run) -> Markup | None:
    """The nine noise levels, each on a scale of its own."""
    parts = []
    for level in range(1, LEVELS + 1):
        if points := run.curve(f"validation_loss/level_{level}"):
            best = lowest(points)
            ends = {1: " (least noise)", LEVELS: " (most noise)"}.get(level, "")
            alt = f"Noise level {level}{ends}: {_ends(points)} Lowest at step {points[best][0]:g}."
            change = f"{points[0][1]:.3g} → {points[-1][1]:.3g}"
            text = element("figcaption", element("strong", f"{level}{ends}"), " ", change)
            parts.append(element("figure", charts.spark(points, best, alt), text))
    if not parts:
        return None
    text = (
        "The loss on held-out photos at nine noise levels, first to last step, each on its own scale: at little noise "
        "it is about fine details, at much noise about the layout of the picture."
    )
    return figure("By noise level", element("div", *parts, class_="sparks"), text)


def trade_off(runs: Sequence[Run]) -> Markup:
    """Likeness against obedience over steps."""
    curves = []
    for number, run in enumerate(runs):
        if scored := run.trade_off():
            points = [(prompt, identity) for _, prompt, identity in scored]
            steps = [step for step, _, _ in scored]
            kept = steps.index(run.kept) if run.kept in steps else None
            curves.append(Curve(run.name, points, charts.style(number), [f"{step}" for step in steps], kept))
    if not curves:
        return missing(NO_SCORES)
    text = (
        "What is won and what is paid: up is more like the subject, right is more of what the prompt says. The numbers "
        "are steps, the ring is the one that was kept. A good run climbs without going far to the left; the top right "
        "corner is best."
    )
    return _trade("Likeness against obedience, by step", curves, "prompt following", text, several=bool(runs[1:]))


def weights(runs: Sequence[Run]) -> Markup:
    """Likeness against obedience over the weights of the adapter, as the evaluation has them."""
    curves = []
    for number, run in enumerate(runs):
        if run.evaluation and (sweep := run.evaluation.sweep) and sweep.scores:
            points = [(each.contrast, each.identity) for each in sweep.scores]
            every = [each.weight for each in sweep.scores]
            best = every.index(sweep.best) if sweep.best in every else None
            name = run.name if sweep.best is None else f"{run.name}, best {sweep.best:g}"
            curves.append(Curve(name, points, charts.style(number), [f"{weight:g}" for weight in every], best))
    if not curves:
        return missing(NO_SWEEP)
    text = (
        "The weight is how strongly the adapter is applied when a picture is drawn: more weight gives more "
        "likeness and less obedience. The ring is the best balance; to go right or up, choose a weight on that side."
    )
    return _trade(
        "Likeness against obedience, by adapter weight",
        curves,
        "prompt following (contrast)",
        text,
        several=bool(runs[1:]),
    )


def lowest(points: Sequence[tuple[float, float]]) -> int:
    return min(range(len(points)), key=lambda number: points[number][1])


def _trade(title: str, curves: Sequence[Curve], across: str, text: str, *, several: bool) -> Markup:
    said = "; ".join(
        f"{curve.name}: "
        + ", ".join(f"{label} at {x:.2f}, {y:.2f}" for (x, y), label in zip(curve.points, curve.labels, strict=True))
        for curve in curves
    )
    chart = charts.plot(curves, across, "identity", f"Points of {across} and identity. {said}", even=True)
    return figure(title, chart, text, charts.legend(curves) if several else None)


def _with_lowest(curve: Curve) -> Curve:
    """With a ring and the step at its lowest point."""
    best = lowest(curve.points)
    labels = [f"step {step:g}" if number == best else "" for number, (step, _) in enumerate(curve.points)]
    return replace(curve, labels=labels, best=best)


def overfitting(points: Points) -> str:
    """In words, what the loss on held-out photos says of the number of steps."""
    step, least = points[lowest(points)]
    last, end = points[-1]
    it = "The loss on held-out photos"
    if step == 0:
        return f"{it} never fell below the base's: what was learnt holds for the training pictures alone."
    if step == last:
        return f"{it} fell until the last step, {last:g}: no overfitting, and more steps may still help."
    if end <= least * (1 + RISE):
        return f"{it} was lowest at step {step:g} and stayed about there: no overfitting."
    return f"Overfitting began after step {step:g}: the loss on held-out photos ended {end / least - 1:.0%} above that."


def _ends(points: Sequence[tuple[float, float]]) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"From {start:.3g} at step {first:g} to {end:.3g} at step {last:g}."
