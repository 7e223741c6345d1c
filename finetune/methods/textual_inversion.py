"""Textual Inversion: a new word for a concept, all weights untouched (https://arxiv.org/abs/2208.01618)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config import PositiveInt
from finetune.methods.base import Method, methods

if TYPE_CHECKING:
    import torch

    from finetune.families.base import Family
    from finetune.student import Student


@methods.register
class TextualInversion(Method):
    """Trains the vectors of one placeholder word and nothing else."""

    summary = "a new word of a few vectors for a subject or a style; a file of kilobytes"
    num_vectors: PositiveInt = 1
    init: str
    """Words to start from, or an embedding file (.safetensors)."""
    preserve_norm: bool = False
    """Keep each vector as long as a typical word's."""

    @property
    def trains_text(self) -> bool:
        return True

    @property
    def trains_word(self) -> bool:
        return True

    def attach(self, family: Family, placeholder: str, learning_rate: float) -> Student:
        from finetune.student import Group, Student
        from finetune.vocabulary import extend, untaught

        tables = extend(family, placeholder, self.num_vectors, self.init)
        groups = [Group(name, {"words": table.new}, learning_rate) for name, table in tables.items()]
        return Student(self, family, groups, frozen=lambda: untaught(tables.values()))

    def after_step(self, student: Student) -> None:
        from finetune.vocabulary import rescale, words

        if self.preserve_norm:
            rescale(list(words(student.family).values()))

    def export(self, student: Student, folder: Path, dtype: torch.dtype, header: Mapping[str, str]) -> list[Path]:
        from finetune.export import save_words

        header = {**header, "num_vectors": str(self.num_vectors)}
        return save_words(student.family, folder, dtype, header)
