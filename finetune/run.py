"""A recipe carried out: picture, draw, latents, loss, export. Only here and in `assemble` objects are wired."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from finetune import checkpoint
from finetune.assemble import assemble
from finetune.base import load_family
from finetune.capture import Captured
from finetune.card import write_card
from finetune.cost import Cost
from finetune.dataset import Picture, split
from finetune.delivery import Delivery, complaint, named, not_compared
from finetune.errors import UserError, gone, reason, warn
from finetune.export import Verdict
from finetune.families.base import Family
from finetune.folder import CARD_FILE, CHECKPOINTS, GRID_FILE, OutputFolder
from finetune.judging import Judge
from finetune.plan import check
from finetune.processes import PEER_IS_GONE, has_lost_peer
from finetune.recipe import Recipe
from finetune.samples import Samples
from finetune.shortage import explained, is_out_of_memory
from finetune.stopping import Stop, Stopped
from finetune.tracking import PATIENCE, Trackers
from finetune.trainer import NonFiniteLoss, Report, Trainer

__all__ = ["CHECKPOINTS", "Result", "Run", "Stopped", "load_family", "prepare", "train"]
LEAVING = 5.0  # seconds for the trackers of a run that was stopped


def train(recipe: Recipe[Any], *, resume: bool = False, overwrite: bool = False) -> Result:
    """Teach the base the concept, write the small files, and prove that they hold what was learnt."""
    run = prepare(recipe, resume=resume, overwrite=overwrite)
    run.loop()
    return run.finish()


def prepare(
    recipe: Recipe[Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Stop | None = None,
    load: Callable[[Recipe[Any]], Family] = load_family,
    tell: Callable[[Sequence[Picture], Family], None] = lambda *_: None,
) -> Run:
    """Everything before the first step: data checked, base loaded, class images made, all encoded, checkpoint read.

    Args:
        load: what gives the base.
        tell: is called with what is trained on and the base, by the main process, before time is spent on them.
    """
    stop = stop or Stop()
    pictures = check(recipe)
    trained, held_out = split(pictures, recipe.dataset.held_out)
    # Accelerate keeps its state for the process; each recipe has a precision of its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=recipe.train.precision)
    folder, found, cost = OutputFolder(recipe, pictures), None, Cost()
    try:
        with stop.listening(), stop.breakable():
            on_main(accelerator, lambda: folder.check(resume=resume, overwrite=overwrite))
            found = folder.newest() if resume else None
            torch.manual_seed(recipe.train.seed)
            with explained(recipe, "loading the base", "else"):
                family = load(recipe)
            folder.check_base(found, family.fingerprint)
            on_main(accelerator, lambda: folder.open(resume=resume, overwrite=overwrite))
            on_main(accelerator, lambda: tell(trained, family))
            known = None if found is None else checkpoint.load(found)["trainer"]
            trainer = assemble(recipe, family, trained, held_out, accelerator, known["step"] if known else 0)
            trainer.cost = cost
            judge = Judge.find(recipe, trained, held_out) if accelerator.is_main_process else None
            if known is not None:
                trainer.resume(known)
    except BaseException as error:
        folder.close()
        if (told := _told_early(error, found)) is not None:
            raise told from None
        raise
    trainer.stop = stop
    return Run(folder, trained, trainer, judge)


def _told_early(error: BaseException, found: Path | None) -> UserError | Stopped | None:
    """What is said of an error before the first step, if it is not what it says itself."""
    if isinstance(error, Stopped):
        kept = "class images that are done are kept" if found is None else f"{found} is kept, --resume goes on from it"
        return Stopped(f"stopped before the first step; {kept}")
    return UserError(f"before the first step: {PEER_IS_GONE}") if has_lost_peer(error) else None


def on_main(accelerator: Accelerator, act: Callable[[], None]) -> None:
    """Have it done by one process; where it fails there, all fail, so that none waits for it."""
    problems: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            act()
        except UserError as error:
            problems = [error.problems]
    if accelerator.num_processes > 1:
        broadcast_object_list(problems)
    if problems[0] is not None:
        raise UserError(problems[0] if accelerator.is_main_process else [])


@dataclass(frozen=True)
class Result:
    """What a run wrote."""

    files: list[Path]
    grid: Path | None
    card: Path | None
    verdict: Verdict
    notes: list[str]  # what the pictures that were held out say


class Run:
    """A trainer at work: pictures on the way, checkpoints, trackers, and the files at the end.

    Whatever ends it early, the last whole step is saved first. What it cannot write on
    the way is told once and then done without; what it learnt, it writes or it fails.
    """

    def __init__(self, output: OutputFolder, pictures: Sequence[Picture], trainer: Trainer, judge: Judge | None = None):
        self.output = output
        self.recipe = output.recipe
        self.folder = output.path
        self.pictures = pictures
        self.trainer = trainer
        self.judge = judge
        self.stop = trainer.stop
        self.accelerator = trainer.accelerator
        self.family = trainer.student.family
        self.samples = Samples(self.recipe, self.family)
        self.prompts = self.samples.prompts
        self.delivery = Delivery(self.recipe, trainer, self.prompts)
        self.saved = trainer.step  # the newest step in a checkpoint
        self.first = self.told = 0  # the step begun with; the newest in the metrics
        self.unwritten: dict[str, str] = {}  # what could not be written -> why

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def describe_machine(self) -> str:
        device, count = self.accelerator.device, self.accelerator.num_processes
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        return f"{count} x {name}, {self.trainer.student.num_parameters():,} parameters are trained"

    def loop(self) -> None:
        """Train to the end.

        Raises:
            Stopped, UserError: it ended before, with what was kept in the message.
        """
        self.first = self.told = self.trainer.step
        trackers, patience = self._trackers() if self.is_main else None, LEAVING
        try:
            with self.stop.listening():
                self._train(trackers)
            patience = PATIENCE
        except BaseException:
            self.output.close()
            raise
        finally:
            if trackers is not None:
                self.unwritten |= trackers.close(patience)

    def _train(self, trackers: Trackers | None) -> None:
        """The loop, and how it ends where that is not the last step."""
        total = self.recipe.train.steps
        try:
            if self.first == 0:
                self.validate(trackers)
                self._measure(trackers)
            elif trackers is not None:  # a checkpoint is saved before its step's pictures are drawn
                self._judge(self.first, list(self.samples.load(self.first).values()), trackers)
            with tqdm(total=total, initial=self.first, desc="training", disable=not self.is_main) as bar:
                self._steps(bar, trackers)
            if trackers is not None:
                trackers.numbers(self.trainer.step, self.trainer.cost.numbers())
        except Stopped:
            raise Stopped(self._together(self._stopped)) from None
        except NonFiniteLoss as error:
            told = [*error.problems, self._together(self._rescue)]
            raise NonFiniteLoss(told if self.is_main else []) from None
        except Exception as error:
            if (explanation := self._explain(error)) is error:
                raise
            raise explanation from error

    def _steps(self, bar: tqdm[Any], trackers: Trackers | None) -> None:
        reports = self.trainer.steps()
        while (report := self._next(reports)) is not None:
            bar.set_postfix(loss=f"{report.loss:.4f}", refresh=False)  # `update` shows it now and then
            bar.update()
            if trackers is not None:
                trackers.numbers(report.step, report.numbers, [Path(draw.path).name for draw in report.draws])
            self.told = report.step
            enough = self._keep(report.step, trackers)
            if report.stopping:
                raise Stopped
            if enough:
                return

    def _next(self, reports: Iterator[Report]) -> Report | None:
        """The next step. Until the first is done there is nothing to save, and no need to wait for it."""
        begun = self.trainer.step > self.first
        with (
            explained(self.recipe, f"step {self.trainer.step + 1}", "training"),
            contextlib.nullcontext() if begun else self.stop.breakable(),
        ):
            return next(reports, None)

    def _keep(self, step: int, trackers: Trackers | None) -> bool:
        """Measure, save and draw what is due after a step; whether it was the last."""
        train, shown = self.recipe.train, self.recipe.validation
        last = step == train.steps
        if _due(step, shown.measure_every or -(-train.steps // 10)) or last:
            self._measure(trackers)
        if train.checkpoint_every is not None and (_due(step, train.checkpoint_every) or last) and self.is_main:
            self._attempt("checkpoints", self.save_checkpoint)
        if _due(step, shown.every) or last:
            self.validate(trackers)
        return last or self.trainer.has_waited(shown.patience)

    def _measure(self, trackers: Trackers | None) -> None:
        """The loss on what is held out, if anything is."""
        with explained(self.recipe, "measuring the held-out pictures", "else"), self.stop.breakable():
            measured = self.trainer.validate()
        if trackers is not None and measured is not None:
            trackers.numbers(measured.step, measured.numbers)

    def _trackers(self) -> Trackers:
        recipe = self.recipe
        return Trackers(recipe.tracking, self.folder, recipe.name, recipe.dump(), self.trainer.step)

    def save_checkpoint(self, keep: int | None = None) -> None:
        """Raises: OSError, with the checkpoints as they were."""
        step, keep = self.trainer.step, keep or self.recipe.train.keep_checkpoints
        self.output.save(step, self.trainer.state(), self.family.fingerprint, keep)
        self.saved = step

    def _attempt(self, what: str, act: Callable[[], Any]) -> Any:
        """Write what the run can do without; what cannot be written is told once, and again at the end."""
        try:
            return act()
        except OSError as error:
            if what not in self.unwritten:
                warn(f"{what} in {self.folder} cannot be written ({reason(error)}); the run goes on without")
            self.unwritten[what] = reason(error)

    def _stopped(self) -> str:
        done = f"after step {self.trainer.step}" if self.trainer.step else "before the first step"
        return f"stopped {done}; {self._save_last()}"

    def _save_last(self, keep: int | None = None) -> str:
        """Save the last whole step, if that is still to be done; what is kept, in words."""
        step, trouble = self.trainer.step, ""
        if step == self.told > self.saved and self.trainer.whole:
            try:
                self.save_checkpoint(keep)
            except Exception as error:  # on the way out anything may be broken
                trouble = f"step {step} cannot be saved ({reason(error)}); "
        if not self.saved:
            return f"{trouble}no step is kept, --resume begins anew"
        return f"{trouble}step {self.saved} is kept in {self.output.checkpoints}, --resume goes on from there"

    def _together(self, act: Callable[[], str]) -> str:
        """Done by the main process while the others wait: a launcher ends all as soon as one has left."""
        try:
            return act() if self.is_main else ""
        finally:
            with contextlib.suppress(RuntimeError):  # some may have left all the same
                self.accelerator.wait_for_everyone()

    def _rescue(self) -> str:
        """Training diverged: export the newest weights that still predict something, for the run cannot go on."""
        if all(bool(weights.isfinite().all()) for weights in self.trainer.student.parameters()):
            self._save_last(self.recipe.train.keep_checkpoints + 1)  # it may be no good, so none goes for it
        try:
            for path in (None, *checkpoint.whole(self.output.checkpoints)):
                if path is not None:
                    self.trainer.resume(checkpoint.load(path)["trainer"])
                with self.trainer.averaged():
                    if self.delivery.is_sane():
                        files = self.delivery.export({"ended": f"training diverged; this is step {self.trainer.step}"})
                        return f"What was learnt until step {self.trainer.step} is in {named(files)}."
        except Exception as error:  # the divergence is what has to be told
            return f"What was learnt could not be exported: {reason(error)}"
        return "None of its weights predict anything any more, so there is nothing to export."

    def _explain(self, error: Exception) -> Exception:
        """The error with what is kept; each process that fails saves, for the others may not know yet."""
        step, lost = self.trainer.step + 1, has_lost_peer(error)
        kept = self._save_last() if self.is_main or not lost else "the main process saves"
        if lost:
            return UserError([f"step {step}: {PEER_IS_GONE}", kept])
        if isinstance(error, UserError):
            return UserError([*error.problems, kept])
        if isinstance(error, OSError):  # a step reads nothing but pictures
            return UserError([f"step {step}: {gone(error)}", kept])
        error.add_note(kept)
        return error

    def validate(self, trackers: Trackers | None) -> None:
        """Draw the validation prompts with the model as it trains, each process its share."""
        step, count = self.trainer.step, len(self.prompts)
        with self.trainer.averaged():
            self.draw(range(self.accelerator.process_index, count, self.accelerator.num_processes))
        self.accelerator.wait_for_everyone()
        if trackers is not None and self.prompts:
            shown = self.samples.load(step)
            trackers.pictures(step, {f"validation/{prompt}": picture for prompt, picture in shown.items()})
            self._judge(step, list(shown.values()), trackers)

    def _judge(self, step: int, pictures: Sequence[Any], trackers: Trackers) -> None:
        if self.judge is not None and len(pictures) == len(self.prompts):
            judged = self.judge.look(step, pictures)
            trackers.numbers(step, judged.numbers)
            self.trainer.judge(judged)

    def draw(self, indices: Sequence[int]) -> None:
        """Write some of this step's validation pictures."""
        step = self.trainer.step
        with (
            explained(self.recipe, f"the validation pictures of step {step}", "drawing"),
            self.accelerator.autocast(),
            self.stop.breakable(),
        ):
            images = self._render(indices)
        self._attempt("samples", lambda: self.samples.save(step, images))

    def _render(self, indices: Sequence[int]) -> dict[int, Any]:
        try:
            with self.family.drawing():
                return self.samples.render(indices)
        except RuntimeError as error:
            alone = self.accelerator.num_processes == 1  # several replay their recorded steps together
            if not (alone and isinstance(self.trainer.work, Captured) and is_out_of_memory(error)):
                raise
        self.trainer.work = None  # a recorded step keeps memory of its own; it will be recorded anew
        torch.cuda.empty_cache()
        with self.family.drawing():
            return self.samples.render(indices)

    def probe(self, family: Family) -> torch.Tensor:
        return self.delivery.probe(family)

    def finish(self) -> Result:
        """Export, reload into a fresh pipeline, compare, and show."""
        try:
            with self.stop.listening():
                notes = self.delivery.choose()
                files, verdict = self._export()
            if not verdict.passed:
                raise UserError(complaint(verdict, files))
            known = {"fingerprint": self.family.fingerprint, "num_pictures": len(self.pictures), "verdict": verdict}
            grid = self._attempt(GRID_FILE, lambda: self.samples.save_grid(self.pictures, self.trainer.step))
            card = self._attempt(CARD_FILE, lambda: write_card(self.recipe, files, **known))
            return Result(files, grid, card, verdict, notes)
        except UserError as error:
            raise UserError([*error.problems, self._save_last()]) from None
        finally:
            self.output.close()

    def _export(self) -> tuple[list[Path], Verdict]:
        self.trainer.whole = not self.recipe.method.export_is_lossy  # the student is left with what the files hold
        with self.trainer.averaged():
            files = self.delivery.export()
            with not_compared(files), self.stop.breakable():
                if self.recipe.method.export_is_lossy:
                    self.draw(range(len(self.prompts)))
                with explained(self.recipe, "looking at what was learnt", "else"):
                    after = self.probe(self.family)
        with not_compared(files), self.stop.breakable():
            return files, self.delivery.compare(files, after)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
