"""Runs and adapters to evaluations, in files and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from finetune import __version__
from finetune.errors import UserError, brief
from finetune.evaluation import concept as concepts
from finetune.evaluation import files, scoring
from finetune.evaluation.concept import Concept, Given
from finetune.evaluation.encoders import EMBEDDED, Encoder
from finetune.evaluation.prompts import Prompts
from finetune.evaluation.result import Evaluation
from finetune.evaluation.studio import Known, Pictures, Shot, Size, check, draw, plan
from finetune.folder import EVALUATION

LIBRARIES = ("torch", "transformers", "diffusers")


@dataclass(frozen=True)
class Settings:
    """What is asked of an evaluation; what is not given follows from the run and its base."""

    prompts: str | None = None  # a list's name or file
    encoders: tuple[str, ...] = ()  # folders or models of the Hub; the first decides about copies and weights
    size: Size = field(default_factory=Size)
    steps: int | None = None
    guidance: float | None = None
    output: Path | None = None  # of several, a folder with one for each
    overwrite: bool = False


@dataclass(frozen=True)
class Job:
    """One adapter's evaluation, checked and planned."""

    concept: Concept
    prompts: Prompts
    shots: Sequence[Shot]
    settings: Settings
    folder: Path

    @property
    def steps(self) -> int:
        return self.settings.steps or self.concept.steps

    @property
    def guidance(self) -> float:
        return self.concept.guidance if self.settings.guidance is None else self.settings.guidance

    @property
    def encoder(self) -> str:
        """What judges unless another is named: what lies beside the base, or else the embedded base's."""
        beside = Path(self.concept.base) / EMBEDDED.name
        return str(beside if beside.is_dir() else EMBEDDED)

    def carry_out(self, encoders: Sequence[Encoder], bar: tqdm, known: Known) -> Evaluation:
        """Draw, judge, and write the folder whole."""
        found, pictures = self.look(encoders, known, bar.update)
        files.write(found, pictures, self.folder)
        return found

    def look(
        self, encoders: Sequence[Encoder], known: Known, tick: Callable[[int], object] = bool
    ) -> tuple[Evaluation, Pictures]:
        """Draw and judge, and write nothing.

        Args:
            known: what the base alone drew for other jobs; it grows.
            tick: called with the number of pictures that were finished.
        """
        pictures, drift = draw(self.concept, self.shots, self.steps, self.guidance, tick, known)
        every = [scoring.Seen.by(encoder, self.concept, self.prompts, pictures) for encoder in encoders]
        reader = next((seen for seen in every if seen.following is not None), None)
        copying, nearest = scoring.find_copies(every[0], self.concept)
        concept, size = self.concept, self.settings.size
        return Evaluation(
            name=concept.name,
            adapter=str(concept.adapter.path),
            weight=concept.adapter.weight,
            folder=str(self.folder),
            base=concept.base,
            subject=concept.word if self.prompts.is_style else concept.subject,
            class_prompt=concept.class_prompt,
            prompts=self.prompts.name,
            num_prompts=len(self.prompts),
            seeds=size.seeds,
            steps=self.steps,
            guidance=self.guidance,
            photos=tuple(photo.path for photo in concept.photos),
            photos_held_out=bool(concept.held_out),
            versions={"finetune": __version__, **{name: version(name) for name in LIBRARIES}},
            encoders=tuple(encoder.info for encoder in encoders),
            scores=tuple(seen.summary() for seen in every),
            drift=drift,
            copying=copying,
            sweep=scoring.weigh(every[0], reader),
            worst=scoring.find_worst(every[0], reader, self.prompts),
            notes=tuple(self.notes(encoders)),
            pictures=scoring.table(every, nearest),
        ), pictures

    def notes(self, encoders: Sequence[Encoder]) -> list[str]:
        """What a reader of the scores must know."""
        notes = []
        if not self.concept.held_out:
            notes.append("the photos were trained on, so identity is optimistic; --photos names others")
        if not any(encoder.reads for encoder in encoders):
            notes.append("no encoder reads, so prompt following is not measured; name a CLIP with --encoder, too")
        if not _has_embedded(self.concept.base) and any(encoder.info.name == str(EMBEDDED) for encoder in encoders):
            notes.append(
                "the encoder knows drawings of emoji only; for this base name others, such as "
                "--encoder openai/clip-vit-base-patch32 --encoder facebook/dino-vits16"
            )
        return notes


def evaluate(adapters: Sequence[str], given: Given | None = None, settings: Settings | None = None) -> list[Evaluation]:
    """Draw DreamBooth's protocol (2208.12242) with runs or adapters, judge the pictures, and write all of it.

    Args:
        adapters: runs' folders or adapters, each with `=weight` behind it if not 1.

    Returns:
        One evaluation each, in their order.

    Raises:
        UserError: something cannot be read or written; it is said before anything is drawn.
    """
    given, settings = given or Given(), settings or Settings()
    jobs, problems = [], _wrong_prompts(settings.prompts)
    for text in adapters:
        try:
            jobs.append(prepare(text, given, settings, several=len(adapters) > 1))
        except UserError as error:
            problems += error.problems
    twice = {job.folder for job in jobs if [other.folder for other in jobs].count(job.folder) > 1}
    problems += [
        f"{folder}: two evaluations would be written there. Name each run once, or leave --output out."
        for folder in sorted(twice)
    ]
    if problems:
        raise UserError(dict.fromkeys(problems))
    encoders = [Encoder.load(name) for name in dict.fromkeys(settings.encoders or [_default_encoder(jobs)])]
    for job in jobs:
        check(job.concept)
    with tqdm(total=sum(len(job.shots) for job in jobs), desc="pictures") as bar:
        known: Known = {}
        found = [job.carry_out(encoders, bar, known) for job in jobs]
    if settings.output is not None and len(jobs) > 1:
        files.write_summary(found, settings.output)
    return found


def parse_weights(text: str) -> tuple[float, ...]:
    """`0.4 0.6` or `0.4,0.6`."""
    try:
        weights = tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        weights = (math.nan,)
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"--weights {brief(text)}: expected numbers, such as '0.6 0.8 1.0'")
    return tuple(dict.fromkeys(weights))


def prepare(text: str, given: Given, settings: Settings, *, several: bool = False) -> Job:
    """Check and plan one adapter's evaluation.

    Raises:
        UserError: something of it cannot be read or written.
    """
    concept = concepts.read(text, given)
    prompts = Prompts.load(settings.prompts or _default_prompts(concept))
    if concept.class_prompt is None and not prompts.is_style:
        raise UserError(
            f"--class-prompt: nothing says what {concept.name} is one of. Give it, such as 'a dog'; for a style, "
            "choose --prompts styles."
        )
    own = (
        concept.folder / EVALUATION if concept.adapter.path.is_dir() else concept.folder / f"{concept.name}-evaluation"
    )
    folder = own if settings.output is None else settings.output / concept.name if several else settings.output
    files.check(folder, overwrite=settings.overwrite)
    return Job(concept, prompts, plan(concept, prompts, settings.size), settings, folder)


def _wrong_prompts(prompts: str | None) -> list[str]:
    """What is wrong with the list that is asked for, which is then said with all else."""
    try:
        if prompts is not None:
            Prompts.load(prompts)
    except UserError as error:
        return error.problems
    return []


def _has_embedded(base: str) -> bool:
    return Path(base).resolve() == EMBEDDED.parent.resolve()


def _default_prompts(concept: Concept) -> str:
    if _has_embedded(concept.base):
        return "embedded-styles" if concept.is_style else "embedded"
    return "styles" if concept.is_style else "objects"


def _default_encoder(jobs: Sequence[Job]) -> str:
    """One for all, that they can be compared."""
    each = {job.encoder for job in jobs}
    return each.pop() if len(each) == 1 else str(EMBEDDED)
