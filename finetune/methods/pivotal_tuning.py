"""Pivotal tuning: a new word first, then a LoRA around it, in one run (https://arxiv.org/abs/2106.05744)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config import Fraction, PositiveFloat, PositiveInt
from finetune.methods.base import Preserving, methods
from finetune.methods.lora import LoRA

if TYPE_CHECKING:
    import torch

    from finetune.families.base import Family
    from finetune.student import Student


@methods.register
class PivotalTuning(Preserving, LoRA):
    """Textual Inversion and LoRA together; the word's vectors rest after a share of the steps."""

    summary = "a new word first and a LoRA around it, in one run: two small files"
    num_vectors: PositiveInt = 1
    init: str
    """Words to start from, or an embedding file (.safetensors)."""
    word_learning_rate: PositiveFloat = 5e-3
    word_share: Fraction = 0.5
    """The share of the steps after which the vectors are frozen."""

    @property
    def trains_text(self) -> bool:
        return True

    @property
    def trains_word(self) -> bool:
        return True

    @property
    def own_rates(self) -> dict[str, float]:
        return {**super().own_rates, "word_learning_rate": self.word_learning_rate}

    def attach(self, family: Family, placeholder: str, learning_rate: float) -> Student:
        from finetune.student import Group, Student
        from finetune.variants import disabled, scaled
        from finetune.vocabulary import extend, untaught

        groups = self.adapters(family, learning_rate)
        adapted = [getattr(family.pipeline, group.name) for group in groups]
        tables = extend(family, placeholder, self.num_vectors, self.init)
        for name, table in tables.items():
            groups.append(Group(f"{name}_words", {"words": table.new}, self.word_learning_rate, self.word_share))

        @contextmanager
        def frozen() -> Iterator[None]:
            with disabled(adapted), untaught(tables.values()):
                yield

        return Student(self, family, groups, frozen=frozen, exported=lambda: scaled(adapted, self.export_weight))

    def export(self, student: Student, folder: Path, dtype: torch.dtype, header: Mapping[str, str]) -> list[Path]:
        from finetune.export import save_words

        return [
            *super().export(student, folder, dtype, header),
            *save_words(student.family, folder, dtype, header),
        ]
