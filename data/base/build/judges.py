"""What pictures are judged by: the evaluation CLIP, small heads on its image tower, and plain pixel arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gallery import COLOUR_NAMES, JUDGED, truths
from specification import Picture
from tokens import encode
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer
from vocabulary import COLOURS


@dataclass
class Judge:
    """The evaluation CLIP, in float32.

    Pictures [n, 3, h, w] in 0..1 of any size are averaged or interpolated to its own.
    """

    clip: CLIPModel
    tokenizer: CLIPTokenizer

    @classmethod
    def load(cls, base: Path) -> Judge:
        clip = CLIPModel.from_pretrained(base / "evaluation", dtype=torch.float32).eval()
        return cls(clip, CLIPTokenizer.from_pretrained(base / "tokenizer"))

    @torch.no_grad()
    def look(self, pictures: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
        """(unit embeddings [n, d], features for heads [n, 3 d]: class token, mean and spread of the patches)."""
        size, embeddings, features = self.clip.config.vision_config.image_size, [], []
        for part in pictures.split(batch):
            small = F.interpolate(part, (size, size), mode="area")
            seen = self.clip.vision_model(pixel_values=small * 2 - 1)
            patches = seen.last_hidden_state[:, 1:]
            embeddings.append(F.normalize(self.clip.visual_projection(seen.pooler_output), dim=-1))
            features.append(torch.cat([seen.pooler_output, patches.mean(1), patches.std(1)], 1))
        return torch.cat(embeddings), torch.cat(features)

    @torch.no_grad()
    def read(self, captions: list[str]) -> Tensor:
        """Unit embeddings [n, d]."""
        ids = torch.as_tensor(encode(self.tokenizer, captions).astype(np.int64))
        seen = self.clip.text_model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return F.normalize(self.clip.text_projection(seen.pooler_output), dim=-1)


def retrieval(pictures: Tensor, captions: Tensor, among: int = 64) -> float:
    """Share of pictures whose own caption is the nearest of `among` (unit embeddings, in the same order)."""
    groups = max(1, len(pictures) // among)
    hits = [
        (p @ c.T).argmax(1) == torch.arange(len(p))
        for p, c in zip(pictures.chunk(groups), captions.chunk(groups), strict=True)
    ]
    return torch.cat(hits).float().mean().item()


def frechet(first: Tensor, second: Tensor) -> float:
    """Fréchet distance between two sets of embeddings [n, d], as of Gaussians, times 100."""
    a, b = first.double(), second.double()
    product = torch.cov(a.T) @ torch.cov(b.T)
    root = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return 100 * (apart + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * root).item()


class Heads(nn.Module):
    """A linear classifier for each judged fact, trained on world pictures whose truth is known."""

    def __init__(self, width: int, classes: dict[str, int]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.heads = nn.ModuleDict({name: nn.Linear(width, number) for name, number in classes.items()})

    def fit(self, features: Tensor, truth: dict[str, Tensor], steps: int = 400) -> Heads:
        """features [n, width]; truth [n] class numbers, -1 where unknown."""
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.02)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / steps)
            seen = self.norm(features)
            loss = sum(F.cross_entropy(head(seen), truth[name], ignore_index=-1) for name, head in self.heads.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self.eval()

    @torch.no_grad()
    def accuracy(self, features: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
        """Share right of those with a known truth."""
        out, seen = {}, self.norm(features)
        for name, head in self.heads.items():
            known = truth[name] >= 0
            out[name] = (head(seen).argmax(1) == truth[name])[known].float().mean().item()
        return out


def truth_table(pictures: list[Picture]) -> dict[str, Tensor]:
    rows = torch.tensor([truths(p) for p in pictures])
    return {name: rows[:, i] for i, name in enumerate(JUDGED)}


def backdrop_colour(pictures: Tensor, truth: Tensor) -> float:
    """Share of plain backdrops whose border has the named colour nearest (median of the frame's upper part)."""
    palette = torch.tensor([COLOURS[name] for name in COLOUR_NAMES]).float() / 255
    reach = max(2, pictures.shape[-1] // 32)
    known = truth >= 0
    seen = pictures[known]
    frame = torch.cat(
        [seen[:, :, :reach].flatten(2), seen[:, :, :, :reach].flatten(2), seen[:, :, :, -reach:].flatten(2)], 2
    )
    nearest = (frame.median(2).values[:, None] - palette).square().sum(-1).argmin(1)
    return (nearest == truth[known]).float().mean().item()
