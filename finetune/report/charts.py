"""Charts as SVG within the page; their colours are the page's, so that they are right by day and by night.

A chart is 360 units wide, so that its letters are of the same size as the text beside it on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune.evaluation.intervals import Score
from finetune.report.markup import Markup, element, joined

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 346, 24, 196  # of the field within the axes
LETTER, LINE = 6.6, 13  # width and height of a letter
DOTS = 320  # at most, of a line
COLOURS = 8
FEW = 30  # points that each have a dot


@dataclass(frozen=True)
class Curve:
    """Points (x, y), joined in their order."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str  # a class of the page's style: raw, or c0 ... c7
    labels: Sequence[str] = ()
    best: int | None = None  # the number of the point that has a ring


@dataclass(frozen=True)
class Scale:
    """Numbers to places on an axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, number: float) -> float:
        return self.start + (number - self.low) / (self.high - self.low) * (self.end - self.start)

    @classmethod
    def over(cls, numbers: Iterable[float], start: float, end: float, room: float = 0.05) -> Scale:
        found = list(numbers)
        low, high = min(found), max(found)
        spare = (high - low) * room or abs(high) * 0.1 or 1.0
        return cls(low - spare, high + spare, start, end)

    def widened(self, least: float) -> Scale:
        """Over at least so much."""
        middle, half = (self.low + self.high) / 2, max(self.high - self.low, least) / 2
        return Scale(middle - half, middle + half, self.start, self.end)

    def ticks(self) -> list[float]:
        """A few round numbers."""
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough)
        return [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def style(number: int) -> str:
    """The colour and dashes of the n-th of several."""
    return f"c{number % COLOURS}"


def plot(curves: Sequence[Curve], across: str, up: str, alt: str, *, even: bool = False) -> Markup:
    """Lines over two axes, which are named `across` and `up`.

    Args:
        even: both are of one kind, so no axis spans less than half of the other, where noise would look like news.
    """
    shown = [curve for curve in curves if curve.points]
    x = Scale.over((x for curve in shown for x, _ in curve.points), LEFT, RIGHT)
    y = Scale.over((y for curve in shown for _, y in curve.points), BOTTOM, TOP)
    if even:
        least = max(x.high - x.low, y.high - y.low) / 2
        x, y = x.widened(least), y.widened(least)
    # Letters keep clear of dots, and of each other.
    taken = [(x(a) - 5, y(b) - 5, x(a) + 5, y(b) + 5) for curve in shown if curve.labels for a, b in curve.points]
    return _svg(
        HEIGHT,
        alt,
        _axes(x, y, across, up),
        *(_line(curve, x, y) for curve in shown),
        *(_dots(curve, x, y) for curve in shown),
        *(_ring(curve, x, y) for curve in shown),
        *(label for curve in shown for label in _labels(curve, x, y, taken)),
    )


def legend(curves: Sequence[Curve]) -> Markup:
    """Which colour is which."""
    swatch = [
        element(
            "svg",
            element("path", d="M0 5H22", class_=f"line {curve.style}"),
            viewBox="0 0 22 10",
            class_="swatch",
            aria_hidden="true",
        )
        for curve in curves
    ]
    names = (element("li", mark, curve.name) for mark, curve in zip(swatch, curves, strict=True))
    return element("ul", *names, class_="legend")


def spark(points: Sequence[tuple[float, float]], best: int, alt: str) -> Markup:
    """A small line without axes, with a ring at the best point."""
    x = Scale.over((x for x, _ in points), 6, 114)
    y = Scale.over((y for _, y in points), 54, 6)
    curve = Curve("", points, "c0", best=best)
    return element("svg", _line(curve, x, y), _ring(curve, x, y), viewBox="0 0 120 60", role="img", aria_label=alt)


def bar(score: Score, marks: dict[str, float], alt: str) -> Markup:
    """A score with its interval, between marks such as its floor and ceiling."""
    ends = [end for end in (score.low, score.high) if end is not None]  # one prompt has no interval
    x = Scale.over([score.value, *ends, *marks.values()], 8, WIDTH - 8, room=0.12)
    parts: list[Markup] = [element("path", d=f"M8 26H{WIDTH - 8}", class_="axis")]
    for name, number in sorted(marks.items(), key=lambda mark: mark[1]):
        place, text = x(number), f"{name} {number:.2f}"
        at = min(max(place, 4 + LETTER * len(text) / 2), WIDTH - 4 - LETTER * len(text) / 2)
        parts.append(element("path", d=f"M{place:.1f} 15V37", class_="mark"))
        parts.append(element("text", text, x=f"{at:.1f}", y=51, class_="middle"))
    if ends:
        parts.append(element("path", d=f"M{x(ends[0]):.1f} 26H{x(ends[-1]):.1f}", class_="interval c0"))
    parts.append(element("circle", cx=f"{x(score.value):.1f}", cy=26, r=5.5, class_="dot c0"))
    at = min(max(x(score.value), 40), WIDTH - 40)
    parts.append(element("text", f"{score.value:.2f}", x=f"{at:.1f}", y=12, class_="middle strong"))
    return _svg(56, alt, *parts)


def ladder(scores: dict[int, Score], alt: str) -> Markup:
    """Scores of several runs, by their numbers, beneath each other on one axis."""
    ends = [end for each in scores.values() for end in (each.low, each.high, each.value) if end is not None]
    x, bottom = Scale.over(ends, 12, WIDTH - 12), 8 + 20 * len(scores)
    parts = [element("path", d=f"M12 {bottom}H{WIDTH - 12}", class_="axis")]
    for tick in x.ticks():
        parts.append(element("path", d=f"M{x(tick):.1f} 4V{bottom}", class_="grid"))
        parts.append(element("text", f"{tick:.3g}", x=f"{x(tick):.1f}", y=bottom + 16, class_="middle"))
    for row, (number, score) in enumerate(scores.items()):
        y = 14 + 20 * row
        if score.low is not None and score.high is not None:
            across = f"M{x(score.low):.1f} {y}H{x(score.high):.1f}"
            parts.append(element("path", d=across, class_=f"interval {style(number)}"))
        parts.append(element("circle", cx=f"{x(score.value):.1f}", cy=y, r=5, class_=f"dot {style(number)}"))
    return _svg(bottom + 22, alt, *parts)


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Each step with the mean of the last `window` values."""
    total, means = 0.0, []
    for number, (step, value) in enumerate(points):
        total += value - (points[number - window][1] if number >= window else 0.0)
        means.append((step, total / min(number + 1, window)))
    return means


def thin(points: Sequence[tuple[float, float]], most: int = DOTS) -> list[tuple[float, float]]:
    """Of every stretch of a long line its lowest and its highest point, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // most)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    ends = ({min(each, key=lambda p: p[1]), max(each, key=lambda p: p[1])} for each in stretches)
    return [point for each in ends for point in sorted(each)]


def _svg(height: int, alt: str, *parts: Markup | None) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=alt, class_="chart")


def _axes(x: Scale, y: Scale, across: str, up: str) -> Markup:
    parts = [element("path", d=f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}", class_="axis")]
    for number in y.ticks():
        parts.append(element("path", d=f"M{LEFT} {y(number):.1f}H{RIGHT}", class_="grid"))
        parts.append(element("text", f"{number:.3g}", x=LEFT - 5, y=f"{y(number) + 4:.1f}", class_="end"))
    below = {"y": BOTTOM + 16, "class_": "middle"}
    parts += [element("text", f"{number:.4g}", x=f"{x(number):.1f}", **below) for number in x.ticks()]
    parts.append(element("text", up, x=4, y=12, class_="title"))
    parts.append(element("text", across, x=RIGHT, y=BOTTOM + 34, class_="title end"))
    return joined(parts)


def _line(curve: Curve, x: Scale, y: Scale) -> Markup:
    places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in curve.points)
    return element("polyline", points=Markup(places), class_=f"line {curve.style}")


def _dots(curve: Curve, x: Scale, y: Scale) -> Markup:
    """A dot for each of a few points."""
    few = curve.points if len(curve.points) <= FEW else ()
    return joined(
        element("circle", cx=f"{x(a):.1f}", cy=f"{y(b):.1f}", r=3, class_=f"dot {curve.style}") for a, b in few
    )


def _ring(curve: Curve, x: Scale, y: Scale) -> Markup | None:
    """Around the best point."""
    if curve.best is None:
        return None
    a, b = curve.points[curve.best]
    return element("circle", cx=f"{x(a):.1f}", cy=f"{y(b):.1f}", r=6.5, class_=f"ring {curve.style}")


def _labels(curve: Curve, x: Scale, y: Scale, taken: list[tuple[float, float, float, float]]) -> Iterable[Markup]:
    """Those that find room; the best, the first and the last before the others."""
    order = dict.fromkeys([*([curve.best] if curve.best is not None else []), 0, len(curve.points) - 1])
    for number in [*order, *(n for n in range(len(curve.points)) if n not in order)] if curve.labels else []:
        if not (text := curve.labels[number]):
            continue
        wide = LETTER * len(text)
        a, b = x(curve.points[number][0]), y(curve.points[number][1])
        sides, middle = (a + 9, a - 9 - wide), a - wide / 2
        places = [(side, b + 4) for side in sides] + [(middle, b - 10), (middle, b + 19)]
        places += [(side, b + off) for side in sides for off in (-9, 17)]
        for left, base in [*places, *([(middle, b - 24)] if number == curve.best else [])]:
            box = (left, base - LINE + 3, left + wide, base + 2)
            inside = box[0] > LEFT and box[2] < WIDTH and box[1] > TOP - 8 and box[3] < BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                yield element("text", text, x=f"{left:.1f}", y=f"{base:.1f}", class_="label")
                break


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
