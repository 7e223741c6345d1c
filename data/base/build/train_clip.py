"""Contrastive training of text and image towers on the world's captions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gallery import Gallery
from muon import Muon
from settings import Settings
from team import Team, schedule
from transformers import CLIPModel

SHORT = 40  # tokens: captions are shorter, and what follows the end token cannot be seen by it


def train_clip(clip: CLIPModel, gallery: Gallery, settings: Settings, team: Team, seconds: float) -> None:
    """Train in place; each process contrasts within its own batch."""
    clip.to(team.device).train()
    optimizer = Muon(clip, lr=1e-3, weight_decay=0.05, edges=("embed", "projection", "logit_scale"))
    truth = torch.arange(settings.batch_clip, device=team.device)
    for step, gone in team.ticks(seconds, settings.steps):
        rows = gallery.some(settings.batch_clip)
        ids, pictures = gallery.ids[rows, :SHORT].long(), gallery.small(rows, settings.clip_size)
        with torch.autocast(team.device.type, dtype=torch.bfloat16):
            logits = clip(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pictures).logits_per_image
        loss = (F.cross_entropy(logits.float(), truth) + F.cross_entropy(logits.float().T, truth)) / 2
        loss.backward()
        team.average(optimizer.gradients())
        optimizer.step(schedule(gone, step))
        clip.logit_scale.data.clamp_(max=4.6)
        if step % 100 == 0:
            share = (logits.argmax(1) == truth).float().mean()
            team.log(f"clip {step} loss {loss.item():.3f} matched {share.item():.3f}")
    clip.eval().requires_grad_(False)
