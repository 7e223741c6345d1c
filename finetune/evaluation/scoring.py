"""Pictures to scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.evaluation import metrics
from finetune.evaluation.concept import Concept
from finetune.evaluation.copying import CopyLine
from finetune.evaluation.encoders import Encoder
from finetune.evaluation.intervals import Score
from finetune.evaluation.prompts import Prompts
from finetune.evaluation.result import (
    Copying,
    EncoderScores,
    PictureScores,
    Sweep,
    WeightScore,
    Worst,
    likeness,
)
from finetune.evaluation.studio import Pictures, Shot

FOLDER = "pictures"
ALIKE = 0.02  # balances that differ by less are as good as each other: a few prompts tell no finer


@dataclass(frozen=True)
class Seen:
    """The pictures as one encoder sees them; row i of each tensor is of shot i."""

    encoder: Encoder
    shots: tuple[Shot, ...]
    embeddings: Tensor  # (N, D)
    photos: Tensor  # (M, D)
    others: Tensor  # (K, D), photos that pictures are not compared with
    identity: Tensor  # (N,)
    following: Tensor | None  # (N,)
    contrast: Tensor | None  # (N,), of pictures of the list's prompts; of others it says nothing
    is_style: bool

    @classmethod
    def by(cls, encoder: Encoder, concept: Concept, prompts: Prompts, pictures: Pictures) -> Seen:
        shots, plain = tuple(pictures), prompts.with_class(concept.class_prompt)
        embeddings = encoder.see(list(pictures.values()))
        photos = encoder.see([photo.image for photo in concept.photos])
        rest = [photo.image for photo in concept.trained_on] if concept.held_out else []
        others = encoder.see(rest) if rest else photos[:0]
        # Whatever the subject is called: a picture follows the prompt in which its class stands.
        said = [plain[shot.index] if shot.kind in ("concept", "base", "sweep") else shot.prompt for shot in shots]
        following = metrics.following(embeddings, encoder.read(said)) if encoder.reads else None
        own = torch.tensor([shot.index % len(plain) for shot in shots])
        contrast = metrics.contrast(embeddings, encoder.read(plain), own) if encoder.reads else None
        identity = metrics.identity(embeddings, photos)
        return cls(encoder, shots, embeddings, photos, others, identity, following, contrast, prompts.is_style)

    def rows(self, wanted: Callable[[Shot], bool]) -> Tensor:
        return torch.tensor([i for i, shot in enumerate(self.shots) if wanted(shot)], dtype=torch.long)

    def of_kind(self, *kinds: str) -> Tensor:
        return self.rows(lambda shot: shot.kind in kinds)

    def floor_and_ceiling(self) -> tuple[float, float | None]:
        base = self.embeddings[self.of_kind("base", "base-class")]
        floor = metrics.floor(base, self.photos, is_style=self.is_style)
        return floor, metrics.ceiling(self.photos, self.others)

    def summary(self) -> EncoderScores:
        concept, groups = self.of_kind("concept"), self._prompts_of(self.of_kind("concept"))
        classes, before = self.of_kind("class"), self.of_kind("base-class")
        low, high = self.floor_and_ceiling()
        following, following_base = self._reached(self.following, concept, groups)
        contrast, contrast_base = self._reached(self.contrast, concept, groups)
        return EncoderScores(
            encoder=self.encoder.info.name,
            identity=_mean(self.identity[concept], groups),
            floor=low,
            ceiling=high,
            following=following,
            following_base=following_base,
            contrast=contrast,
            contrast_base=contrast_base,
            diversity=self._diversity(concept, groups),
            prior_resemblance=Score.of(self.identity[classes].tolist(), "pictures"),
            prior_resemblance_base=float(self.identity[before].mean()),
            prior_diversity=Score.of(metrics.spread(self.embeddings[classes]).tolist(), "pictures"),
            prior_diversity_base=float(metrics.spread(self.embeddings[before]).mean()),
        )

    def _reached(
        self, values: Tensor | None, rows: Tensor, groups: Sequence[int]
    ) -> tuple[Score, float] | tuple[None, None]:
        """The subject's pictures, and the base's."""
        if values is None:
            return None, None
        return _mean(values[rows], groups), float(values[self.of_kind("base")].mean())

    def _prompts_of(self, rows: Tensor) -> list[int]:
        return [self.shots[i].index for i in rows.tolist()]

    def _diversity(self, rows: Tensor, groups: Sequence[int]) -> Score | None:
        """Among the pictures of each prompt."""
        members = [rows[torch.tensor(groups) == group] for group in dict.fromkeys(groups)]
        if len(members[0]) < 2:
            return None
        return Score.of([float(metrics.spread(self.embeddings[found]).mean()) for found in members], "prompts")


def _mean(values: Tensor, groups: Sequence[int]) -> Score:
    return Score.of(values.tolist(), "prompts", groups)


def find_copies(first: Seen, concept: Concept) -> tuple[Copying | None, list[tuple[str, float, bool]]]:
    """The copies among the subject's pictures; and of each picture its nearest training photo, cosine and verdict."""
    if not concept.trained_on:
        return None, [("", 0.0, False)] * len(first.shots)
    line = CopyLine.calibrate([photo.image for photo in concept.trained_on], first.encoder)
    cosines, which = metrics.nearest(first.embeddings, first.others if concept.held_out else first.photos)
    found = [
        (concept.trained_on[index].path, cosine, crossed)
        for index, cosine, crossed in zip(which.tolist(), cosines.tolist(), line.crossed(cosines).tolist(), strict=True)
    ]
    rows = first.of_kind("concept").tolist()
    copies = tuple(f"{FOLDER}/{first.shots[i].name}" for i in rows if found[i][2])
    return Copying(line, len(rows), copies), found


def weigh(first: Seen, reader: Seen | None) -> Sweep | None:
    """The scores of each weight, on those prompts that all weights have drawn once from the same noise."""
    few = {shot.index for shot in first.shots if shot.kind == "sweep"}
    low, high = first.floor_and_ceiling()
    if reader is None or not few or likeness(low, low, high) is None:
        return None
    assert reader.following is not None and reader.contrast is not None
    same = first.rows(lambda shot: shot.kind in ("concept", "sweep") and shot.index in few and shot.seed == shot.index)
    base = float(reader.contrast[first.rows(lambda shot: shot.kind == "base" and shot.index in few)].mean())
    scores = []
    for weight in sorted({shot.weight or 0.0 for shot in (first.shots[i] for i in same.tolist())}):
        rows = torch.tensor([i for i in same.tolist() if first.shots[i].weight == weight])
        values = first.identity, reader.following, reader.contrast
        identity, following, contrast = (float(value[rows].mean()) for value in values)
        reached = metrics.balance(likeness(identity, low, high), contrast / base if base > 0 else None)
        scores.append(WeightScore(weight, identity, following, contrast, reached))
    return Sweep(len(few), tuple(scores), choose(scores))


def choose(scores: Sequence[WeightScore]) -> float | None:
    """The best weight, by the rule that `Sweep` states."""
    highest = max(score.balance for score in scores)
    if highest == 0:
        return None
    equal = [score.weight for score in scores if score.balance >= highest - ALIKE]
    return min(equal, key=lambda weight: abs(weight - 1))


def find_worst(first: Seen, reader: Seen | None, prompts: Prompts) -> Worst:
    concept = first.of_kind("concept")
    indices = torch.tensor([first.shots[i].index for i in concept.tolist()])
    seen = first.identity if reader is None or reader.contrast is None else reader.contrast
    base = {first.shots[i].index: float(seen[i]) for i in first.of_kind("base").tolist()}

    def shortfall(index: int) -> float:
        reached = float(seen[concept[indices == index]].mean())
        return -reached if reader is None else base[index] - reached

    index = max(range(len(prompts)), key=shortfall)
    rows = concept[indices == index]
    file = first.shots[int(rows[seen[rows].argmin()])].name
    reads = reader is not None
    return Worst(
        prompt=first.shots[int(rows[0])].prompt,
        file=f"{FOLDER}/{file}",
        contrast=float(seen[rows].mean()) if reads else None,
        contrast_base=base[index] if reads else None,
        identity=float(first.identity[rows].mean()),
    )


def table(every: Sequence[Seen], nearest: Sequence[tuple[str, float, bool]]) -> tuple[PictureScores, ...]:
    """A row for each picture."""
    return tuple(
        PictureScores(
            file=f"{FOLDER}/{shot.name}",
            kind=shot.kind,
            prompt=shot.prompt,
            seed=shot.seed,
            weight=shot.weight,
            identity={seen.encoder.info.name: float(seen.identity[i]) for seen in every},
            following={
                seen.encoder.info.name: float(seen.following[i]) for seen in every if seen.following is not None
            },
            nearest=nearest[i][0],
            nearest_cosine=nearest[i][1],
            copied=nearest[i][2],
        )
        for i, shot in enumerate(every[0].shots)
    )
