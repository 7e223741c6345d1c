"""The one training loop: every method and family runs through it, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from finetune.batch import Batch, Encoder, send
from finetune.capture import Captured
from finetune.cost import Cost
from finetune.dataset import Draw
from finetune.errors import UserError
from finetune.gpu import make_ready
from finetune.processes import Sums, add_up, agree
from finetune.recomputing import checkpoint_all, checkpoint_some
from finetune.schedule import TrainConfig, build_optimizer, multiplier, restore
from finetune.shares import Shares
from finetune.stopping import Stop
from finetune.student import Student
from finetune.validation import Judged, Measured, Validation

if TYPE_CHECKING:
    from accelerate import Accelerator


Work = Callable[[Sequence[Batch]], Tensor]


class NonFiniteLoss(UserError):
    """Training diverged; the weights are those before the step that did."""


@dataclass(frozen=True)
class Report:
    """What one optimizer update did."""

    step: int  # updates done, from 1
    loss: float
    grad_norm: float
    learning_rates: dict[str, float]
    draws: Sequence[Draw]  # of all processes: the concept's, then the prior's
    stopping: bool  # some process was asked to stop; all of them see it at the same step

    @property
    def numbers(self) -> dict[str, float]:
        """As the metrics have them."""
        rates = {f"learning_rate/{name}": rate for name, rate in self.learning_rates.items()}
        return {"loss": self.loss, "grad_norm": self.grad_norm, **rates}


class Trainer:
    """Steps that depend on (seed, step) and the weights alone.

    So a run that is continued equals one that never stopped.
    """

    def __init__(
        self,
        student: Student,
        shares: Shares,
        encoder: Encoder,
        config: TrainConfig,
        accelerator: Accelerator,
        validation: Validation | None = None,
    ):
        self.student = student
        self.shares = shares
        self.encoder = encoder
        self.config = config
        self.accelerator = accelerator
        self.validation = validation
        self.step = 0
        self.cost = Cost()
        self.work: Work | None = None  # what a step asks of the device, once that is known
        self.ahead: tuple[int, list[Draw], list[Batch]] | None = None  # a step, its draws and its batches
        self.whole = True  # whether the weights are those of a whole step
        self.stop = Stop()
        self._prepare_family()
        agree(list(student.parameters()))
        self.model = accelerator.prepare_model(student, evaluation_mode=True)  # `sums` keep processes in step
        self.sums = Sums(list(student.parameters()))
        self.optimizer = accelerator.prepare(build_optimizer(student.groups, config))
        self.ema = None if config.ema is None else _average(student, config.ema)

    def steps(self) -> Iterator[Report]:
        """Train to the end, a report for each update."""
        while self.step < self.config.steps:
            report = self._update()
            self.step += 1
            self.whole = True
            yield report

    def _update(self) -> Report:
        if self.work is None:
            self.work = self._choose_work()
        rates, (draws, batches) = self._set_learning_rates(), self._drawn(self.step)
        # Only dropout draws from the global state, and differently on each process.
        _seed(hash((self.config.seed, self.step, self.accelerator.process_index)), self.accelerator.device)
        # A process that is gone is met before the weights change, or what they are of could not be told.
        stopping = self._is_asked_to_stop()
        found = self.work(batches)
        if not self.guarded:
            found = torch.stack([found, self._clip()])
        if self.encoder.complete and self.step + 1 < self.config.steps:
            self._look_ahead()
        loss, norm = found.tolist()
        stopping = bool(stopping)  # the device has said so by now, and is asked before it has more to do
        self._stop_if_not_finite(loss, norm, draws)
        if not self.guarded:
            self._apply()
        if self.ema is not None:
            self.ema.step(self.student.parameters())
        return Report(self.step + 1, loss, norm, rates, draws, stopping)

    def _is_asked_to_stop(self) -> bool | Tensor:
        """Whether any process is; of several it is on the device, which does not wait for it."""
        if self.accelerator.num_processes == 1:
            return self.stop.asked
        asked = send(torch.tensor(float(self.stop.asked)), self.accelerator.device)
        return cast(Tensor, self.accelerator.reduce(asked, reduction="mean")) > 0

    def _look_ahead(self) -> None:
        """Draw the next step while the device is at work on this one."""
        draws, batches = self._drawn(self.step + 1)
        self.ahead = self.step + 1, draws, batches
        if isinstance(self.work, Captured):
            self.work.expect(batches)

    # -- what a step asks of the device -------------------------------------------------------------------------------

    @property
    def guarded(self) -> bool:
        """Whether the optimizer itself leaves the weights alone where the gradients are not finite.

        Then a whole step needs no word with the host: torch's fused optimizers do, as they
        must for scaled gradients.
        """
        fused = all(settings.get("fused") for settings in self.optimizer.param_groups)
        return fused and self.accelerator.scaler is None

    def _choose_work(self) -> Work:
        work = self._whole_step if self.guarded else self._gradients
        if not self.config.capture or self.accelerator.device.type != "cuda":
            return work
        if self.guarded:
            for settings in self.optimizer.param_groups:
                rate = torch.as_tensor(settings["lr"], device=self.accelerator.device)
                settings.update(capturable=True, lr=rate)
        return Captured(work, list(self.student.parameters()), "the step")

    def _whole_step(self, batches: Sequence[Batch]) -> Tensor:
        """A whole update; the loss and the gradient's norm: (2,)."""
        found = torch.stack([self._gradients(batches), self._clip()])
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer.found_inf = (~found.isfinite().all()).float()
        self._apply()
        return found

    def _gradients(self, batches: Sequence[Batch]) -> Tensor:
        """The loss of a step's parts, and their gradients where parameters keep them: means over all processes."""
        total = torch.zeros((), device=self.accelerator.device)
        parts = len(batches) * self.accelerator.num_processes
        for number, batch in enumerate(batches, start=1):
            loss = self.student.method.reduce(self.model(batch), batch.num_prior) / parts
            with self.sums.summed() if number == len(batches) else nullcontext():
                self.accelerator.backward(loss)
            total += loss.detach()
        add_up(total)
        return total

    def _clip(self) -> Tensor:
        """The gradient's norm before it was clipped."""
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        return cast(Tensor, norm)

    def _apply(self) -> None:
        self.whole = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.student.method.after_step(self.student)

    # -- what a step depends on ---------------------------------------------------------------------------------------

    def _drawn(self, step: int) -> tuple[list[Draw], list[Batch]]:
        """A step's draws over all processes, and this process's parts of it."""
        if self.ahead is not None and self.ahead[0] == step:
            return self.ahead[1:]
        draws = self.shares.draw(step)
        batches = [self.encoder.encode(part, len(part) - self.shares.size) for part in self.shares.mine(draws)]
        return [draw for half in draws for draw in half], batches

    def _set_learning_rates(self) -> dict[str, float]:
        rates = {}
        for group, settings in zip(self.student.groups, self.optimizer.param_groups, strict=True):
            rates[group.name] = rate = group.learning_rate * multiplier(self.config, self.step, group.until)
            if isinstance(settings["lr"], Tensor):  # which a captured step reads
                settings["lr"].fill_(rate)
            else:
                settings["lr"] = rate
        return rates

    def _stop_if_not_finite(self, loss: float, norm: float, draws: Sequence[Draw]) -> None:
        scaled = self.accelerator.scaler is not None  # fp16 skips steps whose gradients overflow
        if np.isfinite(loss) and (scaled or np.isfinite(norm)):
            return
        self.optimizer.zero_grad()
        self.whole = True  # nothing was applied
        names = ", ".join(sorted({draw.path for draw in draws}))
        raise NonFiniteLoss(
            f"step {self.step + 1}: the loss is {loss} and the gradient's norm {norm}. Its pictures: {names}. "
            "Try a lower train.learning_rate, or another train.precision."
        )

    def _prepare_family(self) -> None:
        family, trained = self.student.family, {group.name for group in self.student.groups}
        for name in (family.denoiser_name, *family.text_encoders):
            part = getattr(family.pipeline, name)
            if name in trained:
                part.train()
            if self.config.gradient_checkpointing is True:
                checkpoint_all(part)
        if family.device.type == "cuda":
            make_ready(family.denoiser)
        if isinstance(self.config.gradient_checkpointing, tuple):
            checkpoint_some(family.denoiser, self.config.gradient_checkpointing)

    def validate(self) -> Measured | None:
        """Measure the weights as they would be exported on what is held out, if anything is."""
        if self.validation is None:
            return None
        with self.averaged():
            return self.validation.measure(self.student, self.encoder, self.step, self.accelerator.autocast())

    def judge(self, judged: Judged) -> None:
        """Keep what was said of pictures by the weights as they would be exported."""
        if self.validation is not None and judged.step not in {known.step for known in self.validation.judged}:
            with self.averaged():
                self.validation.judge(judged, self.student)

    def has_waited(self, patience: int | None) -> bool:
        """Whether nothing was better for so many times; the main process has seen the pictures."""
        if patience is None or self.validation is None:
            return False
        out = torch.tensor(float(self.validation.waiting >= patience), device=self.accelerator.device)
        return bool(cast(Tensor, self.accelerator.reduce(out, reduction="mean")) > 0)

    def go_back(self) -> None:
        """To the weights that were the best on what is held out, for good."""
        found = self.validation
        assert found is not None and found.best is not None and found.best_weights is not None
        self.student.load_state_dict(found.best_weights)
        self.step, self.ema = found.best.step, None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model to look at and to export: of its weights the moving average, if there is one."""
        if self.ema is not None:
            self.ema.store(self.student.parameters())
            self.ema.copy_to(self.student.parameters())
        try:
            with self.student.exported():
                yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.student.parameters())

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "cost": self.cost.numbers(),
            "weights": dict(self.student.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "validation": None if self.validation is None else self.validation.state(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.cost.before = state["step"], state.get("cost", {})
        self.student.load_state_dict(state["weights"])
        self.work = self.ahead = None
        restore(self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.accelerator.device)
        if self.validation is not None and state.get("validation") is not None:
            self.validation.resume(state["validation"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _seed(seed: int, device: torch.device) -> None:
    """As `torch.manual_seed` does, which takes longer: for devices that are not there it notes who has called it."""
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _average(student: Student, decay: float) -> Any:
    from diffusers.training_utils import EMAModel

    return EMAModel(list(student.parameters()), decay=decay)
