"""What a run will do and what is wrong with it, worked out before any model loads."""

from __future__ import annotations

import math
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune import spelling
from finetune.dataset.health import LOOKED_AT, MULTIPLE, Finding, cut_away, enlargement, examine, trained_size
from finetune.dataset.pixels import Size
from finetune.dataset.scan import Picture, scan, split
from finetune.errors import UserError
from finetune.forecast import ClassImages, Disk, Forecast, forecast
from finetune.methods.base import Prior
from finetune.outline import outline
from finetune.recipe import Recipe
from finetune.request import cache_folder
from finetune.spelling import Speller, find_speller

SEEN = 10, 1000  # how many times a picture usually is, at the least and at the most
SEEN_AT_MOST = {"textual_inversion": 10_000}  # 8 of 5 pictures in each of 5,000 steps (2208.01618)
TOLD = 5  # warnings that `train` prints
# A part of what a UserError says -> its code. What is not here is "invalid".
CODES = {
    r"cannot be read as a picture": "unreadable",
    r"has no caption|has no row|no caption (for|in) ": "no-caption",
    r": is empty$": "empty-caption",
    r"is captioned by": "two-captions",
    r"has neither \{\} nor": "placeholder-missing",
    r"no pictures in|no picture in": "no-pictures",
    r"mask": "mask",
}


@dataclass(frozen=True)
class Fate:
    """What becomes of one picture."""

    path: str
    width: int
    height: int
    trained_at: tuple[int, int]  # width, height
    enlarged: float  # times; below 1 it is made smaller
    cut_away: float  # share of its area
    captions: tuple[str, ...]  # with the placeholder
    seen: float  # times

    def __str__(self) -> str:
        cut = f", {self.cut_away:.0%} cut away" * (self.cut_away >= 0.005)
        trained = "{} x {}".format(*self.trained_at)
        captions = " or ".join(map(repr, self.captions[:2])) + " or another" * (len(self.captions) > 2)
        return (
            f"{self.path}  {self.width} x {self.height} to {trained} (x {self.enlarged:.2f}{cut}), "
            f"seen {self.seen:.3g} times as {captions}"
        )


@dataclass(frozen=True)
class Report:
    """Everything that `finetune check` says."""

    plan: Mapping[str, str]
    pictures: Sequence[Fate]
    findings: Sequence[Finding]
    forecast: Forecast

    @property
    def status(self) -> int:
        """The command's exit status."""
        return 2 if any(finding.severity == "error" for finding in self.findings) else int(bool(self.findings))

    def lines(self) -> list[str]:
        """For people: the plan, and each picture with something wrong with it."""
        lines = [f"{title:10}{text}" for title, text in self.plan.items()]
        fates = {fate.path: fate for fate in self.pictures}
        wrong: defaultdict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            wrong[finding.file].append(finding)
        for file, findings in wrong.items():
            if file in fates:
                lines += [str(fates[file]), *(f"  {finding.severity}: {finding.message}" for finding in findings)]
            else:
                lines += [f"{finding.severity}: {finding}" for finding in findings]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        problems = [asdict(finding) for finding in self.findings]
        pictures = [asdict(fate) for fate in self.pictures]
        told = {"plan": dict(self.plan), "forecast": self.forecast.as_dict(), "pictures": pictures}
        return {"status": self.status, "problems": problems, **told}


@dataclass(frozen=True)
class Known:
    """What the files of the base and the caches tell, each read once."""

    multiple: int  # of a picture's sides
    speller: Speller | None  # None where the base is not on this machine
    forecast: Forecast


def look_up(recipe: Recipe[Any], pictures: Sequence[Picture]) -> Known:
    base = outline(recipe.base)
    multiple = base.multiple if base else MULTIPLE
    return Known(multiple, find_speller(recipe.base), forecast(recipe, pictures, base))


def survey(recipe: Recipe[Any]) -> Report:
    """The whole check.

    Raises:
        UserError: everything that makes a run impossible.
    """
    pictures, held_out = split(check(recipe), recipe.dataset.held_out)
    known = look_up(recipe, pictures)
    fate, found = fates(recipe, pictures, known.multiple), find(recipe, pictures, known)
    told = plan(recipe, pictures, known)
    if held_out:
        told["held out"] = ", ".join(Path(picture.path).name for picture in held_out)
    return Report(told, fate, found, known.forecast)


def failure(error: UserError | OSError) -> dict[str, Any]:
    """A report's dictionary, of a recipe that cannot be run."""
    problems, header = [], ""
    for text in error.problems if isinstance(error, UserError) else [str(error)]:
        if text.endswith(":"):
            header = text[:-1]  # of a recipe, whose problems follow, indented
        else:
            code = next((code for words, code in CODES.items() if re.search(words, text)), "invalid")
            file, _, message = text.strip().partition(": ")
            if text.startswith(" "):
                code, file, message = "recipe", header, text.strip()
            problems.append(asdict(Finding(code, file if message else "", message or file, "error")))
    return {"status": 2, "problems": problems, "plan": None, "forecast": None, "pictures": []}


def check(recipe: Recipe[Any]) -> list[Picture]:
    """The recipe's pictures; UserError with everything that is wrong with them or their captions."""
    pictures = scan(recipe.dataset)
    if recipe.method.trains_word:
        lacking = [
            f"{picture.path}: its caption {caption!r} has neither {{}} nor {recipe.placeholder!r} in it"
            for picture in pictures
            for caption in picture.captions
            if not recipe.has_placeholder(caption)
        ]
        if lacking:
            raise UserError(lacking)
    return pictures


def plan(recipe: Recipe[Any], pictures: Sequence[Picture], known: Known | None = None) -> dict[str, str]:
    """A line for each thing that a user wants to know first."""
    train, method, config = recipe.train, recipe.method, recipe.dataset
    known = known or look_up(recipe, pictures)
    expected = known.forecast
    smallest = min(min(picture.width, picture.height) for picture in pictures)
    enlarged = f", the smallest enlarged from {smallest}" if smallest < config.resolution else ""
    often = sorted(_times_seen(recipe, pictures))
    times = f"{often[0]:.3g}" if often[0] == often[-1] else f"{often[0]:.3g} to {often[-1]:.3g}"
    weight = f"what is outside counts {recipe.dataset.unmasked_weight:g}"
    lines = {
        "method": f"{method.name}: {method.summary}",
        "base": recipe.base.source,
        "pictures": f"{len(pictures)} in {config.where}, trained at {config.resolution} px{enlarged}",
        "shapes": _shapes(expected.shapes) if config.buckets else "",
        "masks": f"{expected.masked} of {len(pictures)} pictures have one; {weight}" if expected.masked else "",
        "captions": recipe.fill(pictures[0].captions[0]),
        "steps": f"{train.steps} updates of {train.batch_size} pictures: each is seen {times} times",
        "prior": _describe(method.prior_half, expected.class_images),
        "disk": str(expected.disk),
        "output": str(recipe.output.folder),
        "unchecked": "; ".join(_unchecked(recipe, pictures, known)),
    }
    return {title: text for title, text in lines.items() if text}


def _unchecked(recipe: Recipe[Any], pictures: Sequence[Picture], known: Known) -> Iterator[str]:
    made = known.forecast.class_images
    if known.speller is None:
        yield "whether captions fit and the placeholder is a rare word: the base is not on this machine"
    elif known.speller.unread:
        yield f"whether captions fit: only the base itself can read its {' and '.join(known.speller.unread)}"
    if made is not None and made.there is None:
        yield "how many class images are there already, which goes by the base's weights"
    if known.forecast.disk.trained is None and recipe.train.checkpoint_every:
        yield "how large checkpoints are, which --memory works out"
    if len(pictures) > LOOKED_AT:
        yield f"what pictures after the first {LOOKED_AT} show"


def fates(recipe: Recipe[Any], pictures: Sequence[Picture], multiple: int) -> list[Fate]:
    """How each picture is scaled, cut, named and drawn."""
    return [
        Fate(
            path=picture.path,
            width=picture.width,
            height=picture.height,
            trained_at=trained_size(picture.width, picture.height, recipe.dataset, multiple),
            enlarged=enlargement(picture, recipe.dataset, multiple),
            cut_away=cut_away(picture, recipe.dataset, multiple),
            captions=tuple(map(recipe.fill, picture.captions)),
            seen=seen,
        )
        for picture, seen in zip(pictures, _times_seen(recipe, pictures), strict=True)
    ]


def find(recipe: Recipe[Any], pictures: Sequence[Picture], known: Known | None = None) -> list[Finding]:
    """Everything that is wrong and does not make a run impossible, by picture first."""
    known = known or look_up(recipe, pictures)
    captions = _captions_by_file(recipe, pictures)
    found = examine(pictures, recipe.dataset, known.multiple)
    if known.speller is not None:
        found += spelling.check(recipe, captions, known.speller)
    found += [*_unnamed(recipe, captions), *_same(recipe, pictures), *_rhythm(recipe, pictures)]
    return [*found, *_side(recipe, known.multiple), *_room(recipe, known.forecast.disk)]


def warnings(recipe: Recipe[Any], pictures: Sequence[Picture]) -> list[str]:
    """Those of `find` as a few lines, before a run; of captions the loaded base itself tells more."""
    found = [str(finding) for finding in find(recipe, pictures) if finding.code != "caption-cut"]
    more = [f"{len(found) - TOLD} more: finetune check says them all"] if len(found) > TOLD else []
    return found[:TOLD] + more


def _times_seen(recipe: Recipe[Any], pictures: Sequence[Picture]) -> list[float]:
    total = sum(picture.weight for picture in pictures)
    return [recipe.train.steps * recipe.train.batch_size * picture.weight / total for picture in pictures]


def _captions_by_file(recipe: Recipe[Any], pictures: Sequence[Picture]) -> dict[str, tuple[str, ...]]:
    """Those of the recipe once, under the setting's name."""
    shared = recipe.dataset.captions
    found = {picture.path: picture.captions for picture in pictures if picture.captions != shared}
    return found if len(found) == len(pictures) else {"dataset.captions": shared, **found}


def _unnamed(recipe: Recipe[Any], captions: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """Captions without the placeholder, where others have it or the method is about it."""
    lacking = [(file, text) for file, texts in captions.items() for text in texts if not recipe.has_placeholder(text)]
    if recipe.method.name != "dreambooth" and len(lacking) == sum(map(len, captions.values())):
        return  # a LoRA that works without a word
    for file, text in lacking:
        what = f"the caption {text!r} has neither {{}} nor {recipe.placeholder!r}, so the word does not learn from it"
        yield Finding("placeholder-missing", file, f"{what}. Add {{}}.")


def _same(recipe: Recipe[Any], pictures: Sequence[Picture]) -> Iterator[Finding]:
    """One caption for all pictures of a style; for one of a subject that is usual."""
    texts = {text for picture in pictures for text in picture.captions}
    if recipe.method.name == "lora" and len(pictures) > 1 and len(texts) == 1:
        (text,) = texts
        if re.search(r"\bstyle\b", recipe.fill(text).lower()):
            what = f"all have the caption {text!r}, so what they show is learnt as a part of the style"
            yield Finding("same-captions", recipe.dataset.where, f"{what}. Say in each what its picture shows.")


def _rhythm(recipe: Recipe[Any], pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Pictures that are seen far less or far more often than usual."""
    often = _times_seen(recipe, pictures)
    least, most = SEEN[0], SEEN_AT_MOST.get(recipe.method.name, SEEN[1])
    for code, times, wanted in (("seen-rarely", min(often), least), ("seen-often", max(often), most)):
        if times < least if code == "seen-rarely" else times > most:
            steps = max(1, math.ceil(recipe.train.steps * wanted / times))
            what = f"a picture is seen {times:.3g} times, and {least} to {most} are usual"
            yield Finding(code, "train.steps", f"{what}. {wanted} would be train.steps={steps}.")


def _side(recipe: Recipe[Any], multiple: int) -> Iterator[Finding]:
    if why := recipe.dataset.misfit(multiple):
        yield Finding("resolution", "dataset.resolution", why, "error")


def _room(recipe: Recipe[Any], disk: Disk) -> Iterator[Finding]:
    """Disks that are clearly too small for what is written to them."""
    needed: defaultdict[Path, int] = defaultdict(int)
    for folder, size in ((recipe.output.folder, disk.output), (cache_folder(), disk.class_images)):
        needed[_existing(folder)] += size
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free
        if size > free:
            ways = "Make room, choose another output.folder, or write fewer checkpoints and samples."
            what = f"the run writes {size / 1e9:,.1f} GB or more, and {free / 1e9:,.1f} GB are free"
            yield Finding("disk", str(folder), f"{what}. {ways}")


def _existing(folder: Path) -> Path:
    return next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))


def _describe(prior: Prior | None, made: ClassImages | None) -> str:
    if prior is None:
        return "none"
    if made is None:
        return f"the base's own prediction on {prior.prompt!r}"
    return f"{prior.count} pictures of {prior.prompt!r}, {made}"


def _shapes(shapes: Mapping[Size, int]) -> str:
    return ", ".join(f"{width} x {height}: {count}" for (width, height), count in shapes.items())
