"""What a method may ask of a text-to-image model, whichever architecture it has.

Shapes: B batch, C latent channels, H W latent size, h w pixels, L prompt length, D prompt width.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from finetune.errors import UserError, reason
from finetune.exact import in_float32
from finetune.files import read_shapes
from finetune.fingerprint import fingerprint
from finetune.objectives import Diffusion, Flow, Objective
from finetune.parts import keep_all, lent, move
from finetune.placeholder import pool_at_the_end, spell
from finetune.recall import Read, recalled
from finetune.registry import Registry

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

T = TypeVar("T")
Tokens = Mapping[str, Tensor]  # text encoder -> (B, L) ids
# What a part's names begin with in a single file, by the key of its words; diffusers reads no other parts from one.
STORED = {
    "clip_l": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "clip_g": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "t5": ("text_encoders.t5xxl.",),
    "vae": ("first_stage_model.", "vae."),
}
# What lies beside weights that are packed into fewer bits, by ComfyUI (scaled fp8), bitsandbytes and Nunchaku.
PACKED = r"(scale_weight|weight_scale(_\d)?|scaled_fp8|comfy_quant|absmax|wscales)$"
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Prompt:
    """Captions as the denoiser takes them."""

    embeds: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, P), where the denoiser also takes the caption as one vector
    mask: Tensor | None = None  # (B, L), true where embeds count, where not all of them do

    @classmethod
    def join(cls, prompts: Sequence[Prompt]) -> Prompt:
        """One batch after the other."""
        columns: Any = {part.name: [getattr(prompt, part.name) for prompt in prompts] for part in fields(cls)}
        return cls(**{name: torch.cat(column) for name, column in columns.items() if column[0] is not None})

    def map(self, change: Callable[[Tensor], Tensor]) -> Prompt:
        parts: Any = {part.name: getattr(self, part.name) for part in fields(self)}
        return Prompt(**{name: change(part) for name, part in parts.items() if part is not None})

    def to(self, device: torch.device | str) -> Prompt:
        return self.map(lambda part: part.to(device))


@dataclass(frozen=True)
class Posterior:
    """What the VAE says of a picture before a latent is drawn from it, scaled as the denoiser sees it."""

    mean: Tensor  # (B, C, H, W)
    std: Tensor  # (B, C, H, W)

    def map(self, change: Callable[[Tensor], Tensor]) -> Posterior:
        return Posterior(change(self.mean), change(self.std))


@dataclass(frozen=True)
class Source:
    """Where a base comes from: a folder in diffusers' layout, a model of the Hub, or a single-file checkpoint."""

    path: str
    revision: str | None = None
    dtype: torch.dtype = torch.float32
    config: str | None = None  # of a single file: the folder or model of the Hub whose configs and tokenizers it uses

    @property
    def is_single_file(self) -> bool:
        return self.path.endswith(".safetensors")


class Family(ABC):
    """A frozen text-to-image model behind one interface. One subclass for each architecture."""

    pipeline_class: ClassVar[str]  # of diffusers, and as named in a checkpoint's model_index.json
    single_files: ClassVar[tuple[str, ...]]  # what diffusers calls its single-file checkpoints
    without: ClassVar[Mapping[str, Any]] = {}  # parts that are not loaded
    objective_class: ClassVar[type[Diffusion | Flow]]
    denoiser_name: ClassVar[str]  # attribute of the pipeline: "unet" or "transformer"
    tokenizers: ClassVar[Mapping[str, str]]  # text encoder, as an attribute of the pipeline -> its tokenizer
    prompt_lengths: ClassVar[Mapping[str, int]] = {}  # text encoder -> L, where it is not the tokenizer's own
    word_keys: ClassVar[Mapping[str, str]]  # text encoder -> its key in a file of several encoders' vectors
    attention: ClassVar[tuple[str, ...]]  # suffixes of the attention projections
    feed_forward: ClassVar[tuple[str, ...]]  # suffixes of the feed-forward layers
    text_lora: ClassVar[tuple[str, ...]]  # text encoders for which the pipeline loads a LoRA
    heavy: ClassVar[tuple[str, ...]] = ()  # text encoders of billions of weights, quantised where the denoiser is
    text_attention: ClassVar[tuple[str, ...]] = CLIP_ATTENTION  # suffixes of their attention projections
    size_multiple: ClassVar[int] = 1  # of the latents' height and width
    vae_overflows: ClassVar[bool] = False  # in float16

    def __init__(self, pipeline: DiffusionPipeline, objective: Objective, source: Source):
        self.pipeline = pipeline
        self.objective = objective
        self.source = source
        self._computes: torch.dtype | None = None
        self.device = next(self.denoiser.parameters()).device  # where parts are at work
        self.resting: tuple[str, ...] = ()  # those that wait on the CPU until they are needed
        self.encoded: dict[str, Any] = {}  # prompts of pictures, as long as nothing learns to read
        for part in self.parts():
            part.requires_grad_(False).eval()
            keep_all(part)
        pool_at_the_end(pipeline)

    @classmethod
    def load(cls, source: Source, *, min_snr_gamma: float | None, zero_terminal_snr: bool) -> Family:
        """Read a checkpoint, and its objective from the scheduler's config."""
        import diffusers

        kind: Any = getattr(diffusers, cls.pipeline_class)
        if source.is_single_file:
            parts = {**cls.without, **cls._beside(kind, source)}
            pipeline = kind.from_single_file(source.path, config=source.config, dtype=source.dtype, **parts)
        else:
            pipeline = kind.from_pretrained(
                source.path, revision=source.revision, dtype=source.dtype, use_safetensors=True, **cls.without
            )
        objective = cls.objective_class.from_scheduler(
            pipeline.scheduler.config, min_snr_gamma=min_snr_gamma, zero_terminal_snr=zero_terminal_snr
        )
        if zero_terminal_snr and isinstance(objective, Diffusion) and objective.prediction == "epsilon":
            raise UserError("train.zero_terminal_snr: at pure noise epsilon says nothing; this base must predict v")
        return cls(pipeline, objective, source)

    @classmethod
    def _beside(cls, kind: Any, source: Source) -> dict[str, Any]:
        """The parts that a single file lacks, such as all but the denoiser, with the weights of its config."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        names = tuple(shapes_in(source))
        keys = {**cls.word_keys, "vae": "vae"}
        held = {part for part, key in keys.items() if any(name.startswith(STORED.get(key, ())) for name in names)}
        lacking = [part for part in keys if part not in held]
        if not lacking:
            return {}
        problem = f"base.source: {source.path} lacks the {', '.join(lacking)}"
        if source.config is None:
            raise UserError(
                f"{problem}. Name a folder in diffusers' layout, or a model of the Hub, that has their weights "
                "(base.config, or --config)."
            )
        unread = dict.fromkeys([cls.denoiser_name, *held])
        try:
            other = kind.from_pretrained(
                source.config, dtype=source.dtype, use_safetensors=True, **cls.without, **unread
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{problem}, and {source.config} does not have their weights: {reason(error)}") from None
        parts = {part: getattr(other, part) for part in lacking}
        if "vae" in held:  # what converts Z-Image takes every tensor for the denoiser's, and leaves none
            where = {"config": source.config, "subfolder": "vae", "dtype": source.dtype}
            parts["vae"] = AutoencoderKL.from_single_file(source.path, **where)
        return parts

    @abstractmethod
    def encode_prompt(self, tokens: Tokens) -> Prompt:
        """Differentiable in the text encoders' weights."""

    @abstractmethod
    def denoise(self, noised: Tensor, time: Tensor, prompt: Prompt, geometry: Tensor) -> Tensor:
        """Predict the objective's target.

        Args:
            noised: (B, C, H, W), latents at `time`.
            time: (B,), in the objective's unit.
            geometry: (B, 6), pixels: the picture's own h, w; the crop's top, left; h, w that are trained.

        Returns:
            (B, C, H, W)
        """

    @property
    def text_encoders(self) -> dict[str, str]:
        """Text encoder -> tokenizer, of those that the checkpoint has."""
        return {encoder: tokenizer for encoder, tokenizer in self.tokenizers.items() if getattr(self.pipeline, encoder)}

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser takes: its own precision, whatever its adapters have and its layers are packed in."""
        return self._computes or next(part.dtype for part in self.denoiser.parameters() if part.is_floating_point())

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, H, W) of a square picture, its side in pixels."""
        side = size // self.pipeline.vae_scale_factor
        return self.pipeline.vae.config["latent_channels"], side, side

    def named_parts(self) -> dict[str, nn.Module]:
        """Attribute of the pipeline -> model."""
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    def parts(self) -> Iterator[nn.Module]:
        return iter(self.named_parts().values())

    def to(self, device: torch.device, *, resting: Sequence[str] = ()) -> None:
        """Work on a device.

        Args:
            resting: parts that stay on the CPU, but while they are needed.
        """
        self.device, self.resting = device, tuple(self.named_parts())
        self.bring([name for name in self.resting if name not in resting])
        self.objective = self.objective.to(device)
        # Picture by picture the VAE needs a fraction of the memory, and half of the speed on a CPU.
        self.pipeline.vae.use_slicing = device.type == "cuda"

    def bring(self, names: Sequence[str]) -> None:
        """Parts that rest to the device, for good."""
        for name in names:
            move(self.named_parts()[name], self.device)
        self.resting = tuple(name for name in self.resting if name not in names)

    @contextmanager
    def at_hand(self, names: Collection[str]) -> Iterator[None]:
        """Those of the parts that rest, on the device for a while."""
        kept = self.resting
        with ExitStack() as lending:
            for name in [name for name in kept if name in names]:
                lending.enter_context(lent(self.named_parts()[name], self.device))
            self.resting = tuple(name for name in kept if name not in names)
            try:
                yield
            finally:
                self.resting = kept
        if self.resting and self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Posterior:
        """Pixels (B, 3, h, w) in [-1, 1] to the scaled posterior of their latents."""
        vae = self.pipeline.vae
        kept = vae.dtype
        if self.vae_overflows and kept == torch.float16:
            vae.to(torch.float32)
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        vae.to(kept)
        shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
        return Posterior((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)

    def read(self, captions: Sequence[str]) -> list[Prompt]:
        """Each caption encoded by itself; text encoders that rest come for it."""
        with self.at_hand(self.text_encoders):
            return [self.encode_prompt(self.tokenize([caption])) for caption in captions]

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """Those whose end no text encoder reads."""
        tokenizers = {encoder: getattr(self.pipeline, name) for encoder, name in self.text_encoders.items()}
        return [
            caption
            for caption in captions
            if all(
                len(tokenizer(self._write(caption, tokenizer)).input_ids) > self._length(encoder, tokenizer)
                for encoder, tokenizer in tokenizers.items()
            )
        ]

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions to ids, padded and cut at each encoder's length: encoder -> (B, L)."""
        return {encoder: encoded.input_ids for encoder, encoded in self._tokenized(captions)}

    def _tokenized(self, captions: Sequence[str]) -> Iterator[tuple[str, Any]]:
        for encoder, name in self.text_encoders.items():
            tokenizer = getattr(self.pipeline, name)
            yield (
                encoder,
                tokenizer(
                    [self._write(caption, tokenizer) for caption in captions],
                    padding="max_length",
                    truncation=True,
                    max_length=self._length(encoder, tokenizer),
                    return_tensors="pt",
                ),
            )

    def _length(self, encoder: str, tokenizer: Any) -> int:
        return self.prompt_lengths.get(encoder, tokenizer.model_max_length)

    def _write(self, caption: str, tokenizer: Any) -> str:
        """The caption as the tokenizer is to read it."""
        return spell(caption, tokenizer)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """`looking`, with what a picture needs on the device; text encoders that rest come for new prompts alone."""
        encoders = set(self.resting) & set(self.text_encoders)
        with (
            self.looking(),
            self.at_hand(set(self.resting) - encoders),
            recalled(self.pipeline, self.encoded, partial(self.at_hand, encoders)) if encoders else nullcontext(),
        ):
            yield

    def read_to_draw(self, draw: Callable[[Sequence[T]], Any], wanted: Sequence[T], at_once: int) -> None:
        """Have pipelines encode the prompts of what `draw` is to draw, so many at once; `drawing` knows them."""
        with (
            self.looking(),
            self.at_hand(self.text_encoders),
            recalled(self.pipeline, self.encoded, nullcontext, go_on=False),
        ):
            for start in range(0, len(wanted), at_once):
                with suppress(Read):
                    draw(wanted[start : start + at_once])

    @contextmanager
    def looking(self) -> Iterator[None]:
        """The trained modules as they are used: no dropout, no gradients, and the random state left alone."""
        was_training = {part: part.training for part in self.parts()}
        with torch.random.fork_rng(), torch.no_grad():
            for part in was_training:
                part.eval()
            try:
                yield
            finally:
                for part, training in was_training.items():
                    part.train(training)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Predictions without rounding, whatever precision the weights are kept in."""
        self._computes = torch.float32
        try:
            with in_float32(self.parts()):
                yield
        finally:
            self._computes = None

    @cached_property
    def fingerprint(self) -> str:
        """Short hash that tells bases apart."""
        return fingerprint(type(self).__name__, snapshot(self.source))


def snapshot(source: Source) -> Path:
    """The local folder or file of a base; one from the Hub is already in its cache once it was loaded."""
    if Path(source.path).exists():
        return Path(source.path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))


def shapes_in(source: Source) -> dict[str, tuple[int, ...]]:
    """Those of a single file's tensors.

    Raises:
        UserError: diffusers would take it for what it is not.
    """
    try:
        shapes = read_shapes(Path(source.path))[0]
    except UserError as error:
        raise UserError(f"base.source: {error}") from None
    if any("lora" in name for name in shapes):  # diffusers takes whatever it does not know for Stable Diffusion 1
        raise UserError(f"base.source: {source.path} is an adapter and no base; `finetune inspect` says what for")
    if packed := next((name for name in shapes if re.search(PACKED, name)), None):  # it would leave out the scales
        raise UserError(
            f"base.source: {source.path} holds weights that are packed into fewer bits (beside them is {packed}), "
            "which diffusers does not unpack. Use the file in 16 bits; base.quantize packs what does not fit."
        )
    return shapes


families: Registry[Family] = Registry("model family", "finetune.families")
