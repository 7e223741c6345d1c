"""A recipe carried out: picture, draw, latents, loss, export. The only place where objects are wired."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from tqdm import tqdm

from finetune import __version__, checkpoint
from finetune.architectures import from_pipeline
from finetune.card import write_card
from finetune.dataset import Picture, Pictures
from finetune.errors import UserError
from finetune.export import Verdict, compare, probe
from finetune.families.base import Family, Source, detect, families
from finetune.grid import make_grid
from finetune.load import load_adapters
from finetune.plan import check
from finetune.prior import make_prior
from finetune.quantize import quantize
from finetune.quiet import quiet_loading
from finetune.recipe import Recipe, known_families
from finetune.render import file_name, render, use_ddim
from finetune.tracking import Trackers
from finetune.trainer import NonFiniteLoss, Report, Trainer

RECIPE_FILE, GRID_FILE, CHECKPOINTS, SAMPLES = "recipe.yaml", "grid.png", "checkpoints", "samples"


def train(recipe: Recipe[Any], *, resume: bool = False, overwrite: bool = False) -> Result:
    """Teach the base the concept, write the small files, and prove that they hold what was learnt."""
    run = prepare(recipe, resume=resume, overwrite=overwrite)
    run.loop()
    return run.finish()


def prepare(recipe: Recipe[Any], *, resume: bool = False, overwrite: bool = False) -> Run:
    """Everything before the first step: data checked, base loaded, class images made, checkpoint read."""
    pictures = check(recipe)
    # Accelerate keeps its state for the process; each recipe has a precision of its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=recipe.train.precision)
    found = check_folder(recipe, resume=resume, overwrite=overwrite)
    torch.manual_seed(recipe.train.seed)
    family = load_family(recipe)
    open_folder(recipe, accelerator, overwrite=overwrite)
    family.to(accelerator.device)
    concept = Pictures.from_pictures(pictures, recipe.dataset, recipe.placeholder)
    prior = make_prior(recipe, family, concept, accelerator)
    student = recipe.method.attach(family, recipe.placeholder, recipe.train.learning_rate)
    run = Run(recipe, pictures, Trainer(student, concept, prior, recipe.train, accelerator))
    if found is not None:
        run.trainer.resume(checkpoint.load(found)["trainer"])
    return run


class Stopped(Exception):
    """Asked to stop by a signal, and stopped after a whole step with a checkpoint."""


@contextmanager
def stopping_after_a_step(trainer: Trainer) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a stop after the step at work; a second one acts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        trainer.stop_asked = True
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Result:
    """What a run wrote."""

    files: list[Path]
    grid: Path | None
    card: Path
    verdict: Verdict


def load_family(recipe: Recipe[Any]) -> Family:
    """The recipe's base as one of the families.

    Raises:
        UserError: no family is made for it, or the objective does not fit it.
    """
    quiet_loading()
    source = Source(recipe.base.source, recipe.base.revision, _dtype(recipe), recipe.base.config)
    name = recipe.base.family if recipe.base.family != "auto" else detect(source)
    if name not in known_families():
        raise UserError(f"base.source: {source.path} is a {name}, which no family here is made for")
    try:
        family = families[name].load(
            source,
            min_snr_gamma=recipe.train.min_snr_gamma,
            zero_terminal_snr=recipe.train.zero_terminal_snr,
        )
    except UserError:
        raise
    except Exception as error:  # a broken folder fails in as many ways as it has files
        hint = ""
        if source.is_single_file and source.config is None:
            hint = " Without the Hub, set base.config to a folder in diffusers' layout of the same architecture."
        raise UserError(f"base.source: {source.path} cannot be loaded: {' '.join(str(error).split())}{hint}") from error
    _check_size(recipe, family)
    if recipe.base.quantize is not None:
        quantize(family, recipe.base.quantize)
    use_ddim(family.pipeline, zero_terminal_snr=recipe.train.zero_terminal_snr)
    return family


def _dtype(recipe: Recipe[Any]) -> torch.dtype:
    mixed = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[recipe.train.precision]
    return getattr(torch, mixed if recipe.base.dtype == "auto" else recipe.base.dtype)


def _check_size(recipe: Recipe[Any], family: Family) -> None:
    multiple = family.pipeline.vae_scale_factor * family.size_multiple
    if over := recipe.dataset.resolution % multiple:
        lower = recipe.dataset.resolution - over
        raise UserError(
            f"dataset.resolution: {recipe.dataset.resolution} is not a multiple of {multiple}, which this base needs. "
            f"Try {lower or multiple}."
        )


def check_folder(recipe: Recipe[Any], *, resume: bool, overwrite: bool) -> Path | None:
    """Whether the run may write there; the checkpoint to go on from, if there is one and it was asked for."""
    folder = recipe.output.folder
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other. Give one of them.")
    if not all(path.is_dir() for path in (folder, *folder.parents) if path.exists()):
        raise UserError(f"output.folder: {folder} cannot be a folder: a file is in the way")
    held = [name for name in (RECIPE_FILE, CHECKPOINTS, SAMPLES) if (folder / name).exists()]
    if held and not resume and not overwrite:
        raise UserError(
            f"output.folder: {folder} holds a run already ({', '.join(held)}). "
            "Go on with --resume, replace it with --overwrite, or choose another folder."
        )
    found = checkpoint.newest(folder / CHECKPOINTS) if resume else None
    if found is not None:
        _check_unchanged(recipe, checkpoint.load(found)["recipe"], found)
    return found


def open_folder(recipe: Recipe[Any], accelerator: Accelerator, *, overwrite: bool) -> None:
    """Make the output folder, or rid it of an earlier run's state, once everything else is known to work."""
    folder = recipe.output.folder
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if overwrite:
            for name in (CHECKPOINTS, SAMPLES, "tensorboard"):
                shutil.rmtree(folder / name, ignore_errors=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"output.folder: {folder} cannot be written to: {error}") from None
    accelerator.wait_for_everyone()


def _check_unchanged(recipe: Recipe[Any], before: str, found: Path) -> None:
    """A run may only go on as what it was."""
    then, now = json.loads(before), recipe.dump()
    changed = [
        f"{section}.{key}: was {then[section].get(key)!r}, is now {now[section].get(key)!r}"
        for section in ("base", "method", "dataset", "train")
        for key in sorted(then[section].keys() | now[section].keys())
        if then[section].get(key) != now[section].get(key)
    ]
    if then["placeholder"] != recipe.placeholder:
        changed.append(f"placeholder: was {then['placeholder']!r}, is now {recipe.placeholder!r}")
    if changed:
        raise UserError([f"--resume: the recipe differs from that of {found}:", *changed])


class Run:
    """A trainer at work: pictures on the way, checkpoints, trackers, and the files at the end."""

    def __init__(self, recipe: Recipe[Any], pictures: Sequence[Picture], trainer: Trainer):
        self.recipe = recipe
        self.pictures = pictures
        self.trainer = trainer
        self.accelerator = trainer.accelerator
        self.folder = recipe.output.folder
        self.family = trainer.student.family
        self.prompts = [recipe.fill(prompt) for prompt in recipe.validation.prompts]

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def describe_machine(self) -> str:
        device, count = self.accelerator.device, self.accelerator.num_processes
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        return f"{count} x {name}, {self.trainer.student.num_parameters():,} parameters are trained"

    def warnings(self) -> list[str]:
        """What the user should know before the time is spent."""
        captions = sorted({self.recipe.fill(text) for picture in self.pictures for text in picture.captions})
        cut = self.family.too_long([*captions, *self.prompts])
        return [f"the end of this caption does not fit into the text encoder: {text}" for text in cut]

    def loop(self) -> None:
        """Train to the end; when told to stop, or on divergence, leave a checkpoint of the last good step."""
        total = self.recipe.train.steps
        trackers = self._trackers() if self.is_main else None
        if self.trainer.step == 0:
            self.validate(trackers)
        bar = tqdm(total=total, initial=self.trainer.step, desc="training", disable=not self.is_main)
        try:
            with stopping_after_a_step(self.trainer):
                self._steps(bar, trackers)
        except (Stopped, NonFiniteLoss):
            self.save_checkpoint()
            raise
        finally:
            bar.close()
            if trackers is not None:
                trackers.close()

    def _steps(self, bar: tqdm[Any], trackers: Trackers | None) -> None:
        for report in self.trainer.steps():
            bar.update()
            bar.set_postfix(loss=f"{report.loss:.4f}")
            if trackers is not None:
                trackers.numbers(report.step, _numbers(report), [Path(draw.path).name for draw in report.draws])
            self._keep(report.step, trackers)
            if report.stopping:
                raise Stopped

    def _keep(self, step: int, trackers: Trackers | None) -> None:
        last = step == self.recipe.train.steps
        if _due(step, self.recipe.train.checkpoint_every) and not last:
            self.save_checkpoint()
        if _due(step, self.recipe.validation.every) or last:
            self.validate(trackers)

    def _trackers(self) -> Trackers:
        recipe = self.recipe
        return Trackers(recipe.tracking, self.folder, recipe.name, recipe.dump(), self.trainer.step)

    def save_checkpoint(self) -> None:
        if self.is_main:
            state = {"trainer": self.trainer.state(), "recipe": json.dumps(self.recipe.dump())}
            checkpoint.save(self.folder / CHECKPOINTS, self.trainer.step, state, self.recipe.train.keep_checkpoints)

    def validate(self, trackers: Trackers | None) -> None:
        """Draw the validation prompts with the model as it trains, each process its share."""
        paths = self.sample_paths(self.trainer.step)
        with self.trainer.averaged():
            self.draw(range(self.accelerator.process_index, len(paths), self.accelerator.num_processes))
        self.accelerator.wait_for_everyone()
        if trackers is not None and paths:
            named = zip(self.prompts, paths, strict=True)
            trackers.pictures(self.trainer.step, {f"validation/{prompt}": Image.open(path) for prompt, path in named})

    def draw(self, indices: Sequence[int]) -> None:
        """Write some of this step's validation pictures."""
        paths, shown = self.sample_paths(self.trainer.step), self.recipe.validation
        with self.family.sampling(), self.accelerator.autocast():
            images = render(
                self.family.pipeline,
                [self.prompts[index] for index in indices],
                [shown.seed + index for index in indices],
                steps=shown.steps,
                guidance=shown.guidance,
                size=self.recipe.dataset.resolution,
                batch_size=shown.batch_size,
            )
        for index, image in zip(indices, images, strict=True):
            paths[index].parent.mkdir(parents=True, exist_ok=True)
            image.save(paths[index])

    def sample_paths(self, step: int) -> list[Path]:
        folder = self.folder / SAMPLES / f"step-{step:06d}"
        return [folder / f"{index:02d}-{file_name(prompt)}.png" for index, prompt in enumerate(self.prompts)]

    def probe(self, family: Family) -> torch.Tensor:
        """Predictions on fixed inputs, by which an export is compared with what was trained."""
        prompts = self.prompts[:2] or [self.recipe.placeholder]
        with family.sampling():
            return probe(family, prompts, self.recipe.dataset.resolution)

    def finish(self) -> Result:
        """Export, reload into a fresh pipeline, compare, and show."""
        recipe, student = self.recipe, self.trainer.student
        with self.trainer.averaged():
            files = recipe.method.export(student, self.folder, getattr(torch, recipe.output.dtype), self._header())
            if recipe.method.export_is_lossy:
                self.draw(range(len(self.prompts)))
            after = self.probe(self.family)
        self.family.to(torch.device("cpu"))  # there may be no room for two
        verdict = self._compare(files, after)
        if not verdict.passed:
            raise UserError(_complaint(verdict, files))
        grid = self.save_grid()
        card = write_card(
            recipe, files, fingerprint=self.family.fingerprint, num_pictures=len(self.pictures), verdict=verdict
        )
        return Result(files, grid, card, verdict)

    def _compare(self, files: Sequence[Path], after: torch.Tensor) -> Verdict:
        """A fresh pipeline before and after it loads the files."""
        fresh = load_family(self.recipe)
        fresh.to(self.accelerator.device)
        before = self.probe(fresh)
        load_adapters(fresh.pipeline, files).to(self.accelerator.device)
        return compare(before, after, self.probe(fresh))

    def _header(self) -> dict[str, str]:
        """Small and readable: what a file is, without the run beside it."""
        recipe = self.recipe
        return {
            "finetune_version": __version__,
            "base": recipe.base.source,
            "base_fingerprint": self.family.fingerprint,
            "architecture": from_pipeline(self.family.pipeline) or "unknown",
            "method": recipe.method.name,
            "trigger": recipe.placeholder,
            "steps": str(self.trainer.step),
            "recipe_digest": recipe.digest(),
            "zero_terminal_snr": str(recipe.train.zero_terminal_snr).lower(),
        }

    def save_grid(self) -> Path | None:
        """The concept's pictures, what the base made of the prompts, and what it makes of them now."""
        if not self.prompts:
            return None
        steps = {"before": 0, "after": self.trainer.step}
        rows = {
            f"{title} training": [Image.open(path) for path in self.sample_paths(step) if path.exists()]
            for title, step in steps.items()
        }
        shown = [Image.open(picture.path) for picture in self.pictures[: len(self.prompts)]]
        path = self.folder / GRID_FILE
        make_grid({"the pictures": shown, **rows}, self.prompts, self.recipe.dataset.resolution).save(path)
        return path


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _numbers(report: Report) -> dict[str, float]:
    rates = {f"learning_rate/{name}": rate for name, rate in report.learning_rates.items()}
    return {"loss": report.loss, "grad_norm": report.grad_norm, **rates}


def _complaint(verdict: Verdict, files: Sequence[Path]) -> str:
    names = ", ".join(str(file) for file in files)
    if not verdict.changed:
        return f"training changed nothing, so {names} hold nothing. Raise train.learning_rate or train.steps."
    return (
        f"{names}, loaded into a fresh pipeline, are {verdict.error:.1%} off what was trained "
        f"(at most {Verdict.TOLERANCE:.0%} is accepted). Try output.dtype=float32; the last checkpoint is kept."
    )
