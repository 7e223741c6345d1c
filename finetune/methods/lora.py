"""LoRA: low-rank updates in the attention and projection layers (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finetune.config import Fraction, PositiveFloat, PositiveInt, Strings
from finetune.errors import UserError
from finetune.methods.base import Method, methods

if TYPE_CHECKING:
    import torch

    from finetune.families.base import Family
    from finetune.student import Group, Student

PRESETS = ("attention", "feed_forward", "linear", "convolution")
WITHOUT_DROPOUT = ("pissa", "loha", "lokr")
ROTATIONS = ("oft", "boft", "hra")


def _check_variant(value: Any) -> Any:
    if str(value).lower() in ROTATIONS:
        raise ValueError(
            f"{value} turns the base's weights, which no low-rank file holds and no pipeline of diffusers loads. "
            "Use dora, which parts length from direction, or lokr."
        )
    return value


Variant = Annotated[Literal["lora", "rslora", "dora", "pissa", "loha", "lokr"], BeforeValidator(_check_variant)]


def in_block(pattern: str) -> str:
    """For peft, which matches the ends of layers' names: what the pattern names, or all in it."""
    return rf"(?:{pattern})(?:\..+)?"


def names(pattern: str, layer: str) -> bool:
    """Whether a setting's pattern is for a layer, as peft then has it."""
    return re.match(rf"(.*\.)?({in_block(pattern)})$", layer) is not None


@methods.register
class LoRA(Method):
    """Learns a subject or a style as a low-rank update of the denoiser, through peft."""

    summary = "low-rank updates of the denoiser: a subject or a style, from captioned pictures"
    variant: Variant = "lora"
    """rslora scales by alpha / sqrt(rank) (2312.03732), dora learns each output's length apart (2402.09353), pissa
    starts from the weights' principal part (2404.02948), loha and lokr are products of factors (2309.14859)."""
    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    """The update is scaled by alpha / rank. Default: the rank, a scale of 1."""
    factor: PositiveInt = 4
    """lokr: the side of its first factor; as a LoRA the file has rank `factor * rank`."""
    targets: Strings = Field(("attention",), min_length=1)
    """Presets (attention, feed_forward, linear, convolution) and names of layers, together."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Other ranks for layers whose name matches a regular expression; so for alpha."""
    alpha_pattern: dict[str, PositiveFloat] = {}
    dropout: Fraction = 0.0
    text_encoder: bool = False
    text_encoder_learning_rate: PositiveFloat | None = None
    """Default: the learning rate."""
    export_weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What goes out, and is judged and drawn, is this share of the way from the base to what was learnt, which keeps
    more of what the base can do (2109.01903)."""

    @property
    def trains_text(self) -> bool:
        return self.text_encoder

    @property
    def takes_quantized(self) -> bool:
        return self.variant in ("lora", "rslora", "dora")

    def problems(self) -> list[str]:
        problems = []
        if self.text_encoder_learning_rate is not None and not self.text_encoder:
            problems.append("text_encoder_learning_rate: has no effect while text_encoder is false. Remove one.")
        if self.dropout and self.variant in WITHOUT_DROPOUT:
            why = "would drop parts of the base" if self.variant == "pissa" else "is not known to it"
            problems.append(f"dropout: with variant: {self.variant} it {why}. Remove one of them.")
        if self.export_weight != 1 and self.variant == "dora":
            problems.append(
                "export_weight: the lengths that variant: dora learns are no part of a way. Remove one of them."
            )
        if self.factor != type(self).model_fields["factor"].default and self.variant != "lokr":
            problems.append("factor: is for variant: lokr. Remove it.")
        for setting in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, setting):
                try:
                    re.compile(pattern)
                except (re.error, RecursionError, OverflowError) as error:
                    problems.append(f"{setting}: {pattern!r} is no regular expression: {error}")
        return problems

    @property
    def own_rates(self) -> dict[str, float]:
        rate = self.text_encoder_learning_rate
        return {} if rate is None else {"text_encoder_learning_rate": rate}

    def attach(self, family: Family, placeholder: str, learning_rate: float) -> Student:
        from finetune.student import Student
        from finetune.variants import disabled, scaled

        groups = self.adapters(family, learning_rate)
        adapted = [getattr(family.pipeline, group.name) for group in groups]
        weight = self.export_weight
        return Student(self, family, groups, frozen=lambda: disabled(adapted), exported=lambda: scaled(adapted, weight))

    def adapters(self, family: Family, learning_rate: float) -> list[Group]:
        """Adapters for the denoiser and, where asked for, the text encoders: a group each."""
        from finetune.student import Group
        from finetune.variants import inject

        settings, groups = self._settings(), []
        for name, targets in self._adapted(family).items():
            trained = inject(getattr(family.pipeline, name), targets, self.variant, settings)
            rate = None if name == family.denoiser_name else self.text_encoder_learning_rate
            groups.append(Group(name, trained, rate or learning_rate))
        return groups

    def check(self, family: Family) -> None:
        self._adapted(family)

    def _adapted(self, family: Family) -> dict[str, list[str]]:
        """Model -> layers that get an adapter."""
        from finetune.lowrank import layers_named

        layers = {family.denoiser_name: self._layers(family)}
        for name in self.trained_text_encoders(family):
            layers[name] = layers_named(getattr(family.pipeline, name), family.text_attention)
        self._check_patterns([name for names in layers.values() for name in names])
        return layers

    def _check_patterns(self, layers: list[str]) -> None:
        """Raises: UserError, for a pattern without an effect."""
        lost = [
            f"method.{setting}: {pattern!r} names no layer that is trained, and nothing that one is in"
            for setting in ("rank_pattern", "alpha_pattern")
            for pattern in getattr(self, setting)
            if not any(names(pattern, layer) for layer in layers)
        ]
        if lost:
            raise UserError(lost)

    def trained_text_encoders(self, family: Family) -> list[str]:
        """The text encoders that are asked for.

        Raises:
            UserError: the family's pipeline could not load what would be trained.
        """
        if not self.text_encoder:
            return []
        loadable = [name for name in family.text_encoders if name in family.text_lora]
        if not loadable:
            raise UserError(
                f"method.text_encoder: {family.pipeline_class} loads no LoRA into its text encoder, so what is "
                "learnt there could not be used. Set it to false."
            )
        return loadable

    def export(self, student: Student, folder: Path, dtype: torch.dtype, header: Mapping[str, str]) -> list[Path]:
        from finetune.export import save_lora
        from finetune.variants import adapter_weights

        family = student.family
        parts = {name: getattr(family.pipeline, name) for name in (family.denoiser_name, *family.text_encoders)}
        weights = {name: found for name, part in parts.items() if (found := adapter_weights(part))}
        return [save_lora(weights, folder, dtype, {**header, "variant": self.variant})]

    def _settings(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "alpha": self.alpha or self.rank,
            "rank_pattern": {in_block(pattern): rank for pattern, rank in self.rank_pattern.items()},
            "alpha_pattern": {in_block(pattern): alpha for pattern, alpha in self._alphas().items()},
            "dropout": self.dropout,
            "factor": self.factor,
        }

    def _alphas(self) -> dict[str, float]:
        """A pattern changes the rank alone, so the scale stays what alpha / rank says; rslora scales by itself."""
        if self.variant == "rslora":
            return self.alpha_pattern
        scale = (self.alpha or self.rank) / self.rank
        return {name: rank * scale for name, rank in self.rank_pattern.items()} | self.alpha_pattern

    def _layers(self, family: Family) -> list[str]:
        from finetune.lowrank import layers_named, linear_layers

        presets = {
            "attention": lambda: layers_named(family.denoiser, family.attention),
            "feed_forward": lambda: layers_named(family.denoiser, family.feed_forward),
            "linear": lambda: linear_layers(family.denoiser),
            "convolution": lambda: layers_named(family.denoiser, ()),
        }
        names = [
            name
            for target in self.targets
            for name in (presets[target]() if target in presets else layers_named(family.denoiser, (target,)))
        ]
        return list(dict.fromkeys(names))
