"""Pictures drawn while training, judged by an encoder: does the subject show, and is the prompt followed?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from finetune.dataset import Picture
from finetune.dataset.pixels import decode
from finetune.evaluation import metrics
from finetune.evaluation.concept import phrases
from finetune.evaluation.encoders import EMBEDDED, Encoder
from finetune.recipe import Recipe
from finetune.validation import Judged


class Judge:
    """The measures of an evaluation, on the few pictures of a validation.

    Args:
        prompts: as they are drawn, with the class in the subject's place.
    """

    def __init__(self, encoder: Encoder, photos: Tensor, others: Tensor, prompts: Sequence[str]):
        self.encoder = encoder
        self.photos = photos
        self.ceiling = metrics.ceiling(photos, others)
        self.prompts = encoder.read(prompts) if encoder.reads and len(prompts) > 1 else None

    @classmethod
    def find(cls, recipe: Recipe[Any], trained: Sequence[Picture], held_out: Sequence[Picture]) -> Judge | None:
        """One that judges by the pictures that are held out, if there are any and an encoder that knows such pictures.

        Raises:
            UserError: the encoder that the recipe names cannot be loaded.
        """
        beside = Path(recipe.base.source) / EMBEDDED.name
        name = recipe.validation.encoder or (str(beside) if beside.is_dir() else None)
        if name is None or not held_out or not recipe.validation.prompts:
            return None
        prior, background = recipe.method.prior_half, recipe.dataset.background
        subject, named = phrases(recipe.validation.prompts, None if prior is None else prior.prompt)
        plain = [prompt.replace(subject, named or "").replace("{}", "") for prompt in recipe.validation.prompts]
        with torch.random.fork_rng():
            encoder = Encoder.load(name)
        photos, others = (
            encoder.see([decode(Path(picture.path).read_bytes(), background) for picture in pictures])
            for pictures in (held_out, trained)
        )
        return cls(encoder, photos, others, [" ".join(prompt.split()) for prompt in plain])

    def look(self, step: int, pictures: Sequence[Image.Image]) -> Judged:
        """
        Args:
            pictures: one for each prompt, in their order.
        """
        seen = self.encoder.see(pictures)
        identity, contrast = float(metrics.identity(seen, self.photos).mean()), None
        if self.prompts is not None:
            contrast = float(metrics.contrast(seen, self.prompts, torch.arange(len(seen))).mean())
        return Judged(step, identity, contrast, self.ceiling)
