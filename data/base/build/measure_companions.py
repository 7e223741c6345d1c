"""How well the companions do what they are for, on edge maps and sources that training never saw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from edits import KINDS
from judges import Heads, Judge, backdrop_colour, retrieval, truth_table
from paint import Studio
from specification import Picture
from torch import Tensor

from finetune.edges import gray, grown, lines

CHANGED = 0.06  # of the range: what differs by more between source and target is inside the edit


def edges_of(pictures: Tensor) -> Tensor:
    """Lines of pictures as they are stored, in 256 steps."""
    return lines(gray(*((pictures * 255).round() / 255).unbind(1)))


def agreement(made: Tensor, truth: Tensor) -> float:
    """Mean F1 of edge maps [n, h, w], a pixel of slack allowed."""
    hit = (made & grown(truth)).sum((1, 2)) / made.sum((1, 2)).clamp(min=1)
    found = (truth & grown(made)).sum((1, 2)) / truth.sum((1, 2)).clamp(min=1)
    return (2 * hit * found / (hit + found).clamp(min=1e-6)).mean().item()


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    parts = [vae.decode(vae.encode(p * 2 - 1).latent_dist.mode()).sample for p in pictures.split(8)]
    return (torch.cat(parts).clamp(-1, 1) / 2 + 0.5).contiguous()


def measure_control(studio: Studio, judge: Judge, vae: AutoencoderKL) -> dict[str, dict[str, float]]:
    prompts = studio.control_prompts
    truth = studio.draw(prompts)
    wanted, read = edges_of(truth), judge.read([p.caption for p in prompts])
    seen = {
        "with the ControlNet": studio.controlled("controlled", [p.caption for p in prompts], []),
        "without (floor)": studio.said("uncontrolled", [p.caption for p in prompts]),
        "autoencoder alone (ceiling)": reconstructed(vae, truth),
    }
    return {
        name: {
            "edge F1": agreement(edges_of(pictures), wanted),
            "retrieval": retrieval(judge.look(pictures)[0], read),
        }
        for name, pictures in seen.items()
    }


def measure_edits(studio: Studio, judge: Judge, heads: Heads, vae: AutoencoderKL) -> dict[str, dict[str, float]]:
    """For each kind of edit and each way to a picture: judged success, and how far it is from the source elsewhere."""
    edits = studio.edits
    sources, targets = studio.draw([e.source for e in edits]), studio.draw([e.target for e in edits])
    ways = {
        "edited": studio.edited("edited", [e.instruction for e in edits], []),
        "source": reconstructed(vae, sources),
        "afresh": studio.said("afresh", [e.caption for e in edits]),
        "target": reconstructed(vae, targets),
    }
    near = judge.look(sources)[0], judge.look(targets)[0]
    outside = 1 - F.max_pool2d(((targets - sources).abs().amax(1, True) > CHANGED).float(), 9, 1, 4)
    out: dict[str, dict[str, float]] = {}
    for way, pictures in ways.items():
        seen, features = judge.look(pictures)
        better = ((seen * near[1]).sum(1) > (seen * near[0]).sum(1)).float()
        moved = 255 * ((pictures - sources).abs() * outside).sum((1, 2, 3)) / (3 * outside.sum((1, 2, 3))).clamp(min=1)
        large = outside.mean((1, 2, 3)) > 0.2  # else next to nothing is to be kept
        for kind in (*KINDS, "all"):
            rows = torch.tensor([kind in (e.kind, "all") for e in edits])
            row = out.setdefault(kind, {})
            row[f"{way}: nearer the target"] = better[rows].mean().item()
            if (rows & large).any():
                row[f"{way}: moved elsewhere"] = moved[rows & large].mean().item()
            judged = judged_share(
                kind, heads, pictures[rows], features[rows], [e.target for e in edits if e.kind == kind]
            )
            if judged is not None:
                row[f"{way}: judged"] = judged
    return out


def judged_share(kind: str, heads: Heads, made: Tensor, features: Tensor, targets: list[Picture]) -> float | None:
    """What a classifier says of the kinds that it knows."""
    if kind == "scene":
        return heads.accuracy(features, truth_table(targets))["scene"]
    if kind == "backdrop":
        return backdrop_colour(made, truth_table(targets)["colour"])
    return None
