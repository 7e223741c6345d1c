"""The GPU memory that a recipe needs: a step is rehearsed on shapes alone, and every tensor counts while it lives.

Only the base's configs are read. All figures are bytes of tensors on one GPU that works through the whole batch; the
CUDA context, the libraries' work space and fragmented memory come on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from finetune.batch import Batch, pictures_at_once
from finetune.families.base import Family, Prompt
from finetune.packed import Packed
from finetune.quantize import layers
from finetune.recipe import Recipe
from finetune.rehearsal import Ledger, LikeGpu, Work, go_back, recompute_alike
from finetune.skeleton import build
from finetune.trainer import Trainer

BITS = {
    "nf4": 4.127,
    "int8": 8.0,
    "fp8": 8.0,
}  # of a packed weight; nf4's scales are packed as well (2305.14314, section 3)
TEXTS = {
    "trained": "the weights that are trained, in float32",
    "optimizer": "its state",
    "average": "the trained weights' moving average",
    "activations": "kept by the forward pass for the backward pass",
    "gradients": "those that there are at that moment",
    "transient": "what is dropped again at once: a layer's, a block's or the optimizer's",
    "step": "all of these, at the fullest moment of a step",
    "encoding": "while captions and pictures are encoded before the first step",
    "drawing": "while pictures are drawn",
    "run": "the most of these",
    "checkpoint": "on the disk: what is trained, its state and its average",
}


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU at the fullest moment of a step, by what they are for, and at other moments of the run."""

    weights: Mapping[str, int]  # frozen, by part of the pipeline, in the precision that they are kept in
    resting: tuple[str, ...]  # parts that wait on the CPU while steps are made
    trained: int
    optimizer: int
    average: int
    activations: int
    gradients: int  # those that exist at that moment
    transient: int
    others: Mapping[str, int]  # moment -> all that is on the GPU then
    work: Mapping[str, Work]  # of a step, a picture or caption encoded, a pass of the denoiser, a picture decoded

    @property
    def checkpoint(self) -> int:
        """A checkpoint on the disk."""
        return self.trained + self.optimizer + self.average

    @property
    def step(self) -> int:
        """Everything at the fullest moment of a step."""
        frozen = sum(size for part, size in self.weights.items() if part not in self.resting)
        kept = self.trained + self.optimizer + self.average
        return frozen + kept + self.activations + self.gradients + self.transient

    @property
    def run(self) -> int:
        """The most that is needed at any time."""
        return max(self.step, *self.others.values())


def table(memory: Memory) -> list[str]:
    """What `check` prints: a line for each part and moment, in GiB."""
    sizes = {name: getattr(memory, name, memory.others.get(name, 0)) for name in TEXTS}
    rows = {name: (size, "frozen") for name, size in memory.weights.items()}
    rows |= {name: (memory.weights[name], "frozen; waits on the CPU") for name in memory.resting}
    rows |= {name: (sizes[name], text) for name, text in TEXTS.items()}
    return [
        "memory    GiB on one GPU; the CUDA context (about 0.5) and fragmentation come on top",
        *(f"  {name:16}{size / 2**30:7.2f}  {text}".rstrip() for name, (size, text) in rows.items() if size),
    ]


def estimate(recipe: Recipe[Any], captions: Sequence[str] = ()) -> Memory:
    """The memory of a recipe's run.

    Args:
        captions: of its pictures; in Z-Image a longer one takes more.

    Raises:
        UserError: the base's configs cannot be had, or the method or objective does not fit it.
    """
    family = build(recipe, torch.device("meta"))
    caption = recipe.fill(max([*recipe.dataset.captions, *captions, "{}"], key=len))
    family.pipeline.vae.use_slicing = True  # as on every GPU
    num_concept = recipe.train.batch_size // recipe.train.accumulate
    autocast = None if recipe.train.precision == "no" else getattr(torch, recipe.train.computes)
    ledger, gpu = Ledger(), LikeGpu(autocast, _length(family, caption))
    with ledger, gpu:
        _book_weights(recipe, family, ledger)
        work: dict[str, Work] = {}
        others = {"encoding": _encode(recipe, family, caption, ledger, work)}
        trainer = _trainer(recipe, family, ledger)
        num_prior = 0 if recipe.method.prior_half is None else num_concept
        batch = _batch(recipe, family, caption, num_concept, num_prior)
        fullest, work["step"] = _step(trainer, batch, ledger, gpu)
        guided = recipe.validation.guidance > 1 and "guidance_embeds" not in family.denoiser.config  # FLUX.1 is told it
        _look(family, batch.ends(0, 1), ledger, gpu, work, guided=guided)
        if num_drawn := _num_drawn(recipe):
            others["drawing"] = _draw(recipe, family, batch.ends(0, 1), num_drawn, ledger, gpu, guided=guided)
    weights = {name: fullest[name] for name in family.pipeline.components if name in fullest}
    # What frozen parts say is kept from before the first step, if it all finds room.
    resting = ("vae", *(() if recipe.method.trains_text else family.text_encoders))
    kinds = ("trained", "optimizer", "average", "activations", "gradients", "transient")
    return Memory(weights, resting, **{kind: fullest[kind] for kind in kinds}, others=others, work=work)


def _book_weights(recipe: Recipe[Any], family: Family, ledger: Ledger) -> None:
    """Count what is frozen; what is packed takes less than its precision says."""
    for name, part in family.pipeline.components.items():
        if isinstance(part, nn.Module):
            ledger.book([*part.parameters(), *part.buffers()], name)
            if recipe.base.quantize is not None and name in (family.denoiser_name, *family.heavy):
                found: list[Any] = [part.get_submodule(layer) for layer in layers(part)]
                for layer in found:
                    layer.__class__, layer.compute_dtype = _KINDS[recipe.base.quantize], family.dtype
                packed = [layer.weight for layer in found]
                ledger.book(packed, name, BITS[recipe.base.quantize] / 8 / packed[0].itemsize)


class _Unpacking(Packed):
    """A layer whose weight is there twice while it is at work."""

    def unpacked(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight.new_empty(self.weight.shape, dtype=dtype) if out is None else out


class _Apart(nn.Linear):
    """A layer that is not fused with its adapter."""


_KINDS = {"nf4": _Unpacking, "fp8": _Unpacking, "int8": _Apart}


class _Alone:
    """What a trainer asks of an Accelerator before its first step, where there is one process."""

    num_processes = 1

    def prepare(self, optimizer: Any) -> Any:
        return optimizer

    def prepare_model(self, student: Any, **_: Any) -> Any:
        return student


def _trainer(recipe: Recipe[Any], family: Family, ledger: Ledger) -> Trainer:
    ledger.kind = family.denoiser_name  # a twin of it, which is held against what is trained, counts as its own
    with torch.device("meta"):
        student = recipe.method.attach(family, recipe.placeholder, recipe.train.learning_rate)
    ledger.book(student.parameters(), "trained")
    for parameter in student.parameters():
        parameter.register_post_accumulate_grad_hook(lambda it: ledger.book([cast(Any, it.grad)], "gradients"))
    ledger.kind = "average"
    nothing: Any = None
    trainer = Trainer(student, nothing, nothing, recipe.train, cast(Any, _Alone()))
    for part in family.parts():
        recompute_alike(part)
    for settings in trainer.optimizer.param_groups:
        if settings.get("foreach", False) is None:  # as on a GPU: Adam fused, the others fast and in more memory
            settings["foreach"] = "fused" not in settings
    ledger.kind = "transient"
    return trainer


def _length(family: Family, caption: str) -> int | None:
    """Tokens of a caption, where the family keeps no others."""
    mask = family.tokenize([caption]).get("mask")
    return None if mask is None else int(mask.sum())


def _batch(recipe: Recipe[Any], family: Family, caption: str, num_concept: int, num_prior: int) -> Batch:
    count, vae = num_concept + num_prior, family.pipeline.vae
    side = recipe.dataset.resolution // (family.pipeline.vae_scale_factor * family.size_multiple) * family.size_multiple
    latents = torch.empty(count, vae.config.latent_channels, side, side, device="meta")
    time = family.objective.sample_time(torch.Generator(), latents.shape).expand(count).to("meta")
    prompt: Any = family.tokenize([caption] * count)
    if not recipe.method.trains_text:
        with torch.no_grad():
            prompt = family.encode_prompt(prompt)
    geometry = torch.empty(count, 6, device="meta")
    num_held = round(num_concept * (1 - (recipe.method.keep_layout or 1.0)))  # on average
    return Batch(latents, torch.empty_like(latents), time, prompt, geometry, num_prior, num_held=num_held)


def _step(trainer: Trainer, batch: Batch, ledger: Ledger, gpu: LikeGpu) -> tuple[Counter[str], Work]:
    """The fullest moment of an update; the optimizer's state is there all the time, as from the second one on."""
    parts = trainer.config.accumulate
    work = ledger.count(lambda: ledger.most(lambda: _go_through(trainer, batch, ledger, gpu))).times(
        parts / min(parts, 2)
    )
    training = ledger.fullest
    ledger.kind = "optimizer"
    update = ledger.count(lambda: ledger.most(trainer.optimizer.step))
    if all("fused" in settings for settings in trainer.optimizer.param_groups):
        update = Work(update.flops, len(trainer.optimizer.param_groups))
    updating, state = ledger.fullest, ledger.held["optimizer"]
    trainer.optimizer.zero_grad()
    updating["transient"] += max(0, updating["optimizer"] - state)
    training["optimizer"] = updating["optimizer"] = state
    total = Work(work.flops + update.flops, work.operations + update.operations)
    return max(training, updating, key=Counter.total), total


def _go_through(trainer: Trainer, batch: Batch, ledger: Ledger, gpu: LikeGpu) -> None:
    """The gradients of a step; the second of several parts finds those of the first, and the others are like it."""
    for _ in range(min(trainer.config.accumulate, 2)):
        ledger.kind = "activations"
        with gpu.autocast():
            loss = trainer.student.method.reduce(trainer.model(batch), batch.num_prior)
            gpu.end_forward()
            ledger.kind = "transient"
            go_back(loss)
        del loss


@torch.no_grad()
def _encode(recipe: Recipe[Any], family: Family, caption: str, ledger: Ledger, work: dict[str, Work]) -> int:
    """Bytes at its fullest moment: what reads captions is there alone, then what sees pictures."""

    def count(name: str, encode: Callable[[], Any], share: float) -> None:
        work[name] = ledger.count(encode).times(share)

    size = recipe.dataset.resolution
    pixels = torch.empty(pictures_at_once(size), 3, size, size, device="meta")
    texts = ledger.more(lambda: count("caption", lambda: family.encode_prompt(family.tokenize([caption])), 1))
    pictures = ledger.more(lambda: count("picture", lambda: family.encode_image(pixels), 1 / len(pixels)))
    readers = sum(ledger.held[name] for name in family.text_encoders)
    return max(0 if recipe.method.trains_text else texts + readers, pictures + ledger.held["vae"])


@torch.no_grad()
def _look(family: Family, batch: Batch, ledger: Ledger, gpu: LikeGpu, work: dict[str, Work], *, guided: bool) -> None:
    """A pass of the denoiser and a picture, as they are drawn; with guidance a pass is of two prompts."""
    vae = family.pipeline.vae
    with gpu.autocast():
        prompt = batch.prompt if isinstance(batch.prompt, Prompt) else family.encode_prompt(batch.prompt)
        forward = ledger.count(lambda: family.denoise(batch.latents, batch.time, prompt, batch.geometry))
        work["pass"] = forward.times(1 + guided, 1)
        work["decoded"] = ledger.count(lambda: vae.decode(batch.latents.to(vae.dtype)))


def _num_drawn(recipe: Recipe[Any]) -> int:
    """Pictures that are drawn at once, for validation or of the class."""
    prior, shown = recipe.method.prior_half, recipe.validation
    wanted = [len(shown.prompts), prior.count if prior is not None and prior.source == "images" else 0]
    return min(shown.batch_size, max(wanted))


@torch.no_grad()
def _draw(
    recipe: Recipe[Any], family: Family, batch: Batch, count: int, ledger: Ledger, gpu: LikeGpu, *, guided: bool
) -> int:
    """Bytes at its fullest moment: while the denoiser is at work, or while the latents become pixels.

    Text encoders are not there, unless they are trained.
    """
    vae, resting = family.pipeline.vae, () if recipe.method.trains_text else family.text_encoders
    with gpu.autocast():
        prompt = batch.prompt if isinstance(batch.prompt, Prompt) else family.encode_prompt(batch.prompt)
        many = count * (1 + guided)
        drawn = batch.map(lambda part: part.expand(many, *part.shape[1:]))
        prompts = prompt.map(lambda part: part.expand(many, *part.shape[1:]))
        passes = ledger.most(lambda: family.denoise(drawn.latents, drawn.time, prompts, drawn.geometry))
        pictures = ledger.most(lambda: vae.decode(drawn.latents[:count].to(vae.dtype)))
    return max(passes, pictures) - sum(ledger.held[name] for name in resting)
