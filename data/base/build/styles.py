"""A judge of drawing style that favours no base: a small network trained on the pictures of both worlds.

It sees true pictures as they are and through either base's autoencoder, so that blur tells it nothing, and answers for
whole pictures in 0..1, which are averaged to 128 px.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from composer import Composer
from diffusers import AutoencoderKL
from gallery import STYLE_NAMES
from paint import from_image
from PIL import Image
from sprites import Sprite
from torch import Tensor, nn
from vocabulary import STYLES
from world import World

SIZE, BATCH = 128, 64


class StyleJudge(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 160)) -> None:
        super().__init__()
        layers, before = [], 3
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.look, self.decide = nn.Sequential(*layers), nn.Linear(2 * before, len(STYLE_NAMES))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits [n, styles] of pictures [n, 3, 128, 128] in 0..1."""
        seen = self.look(pictures * 2 - 1)
        return self.decide(torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], 1))

    @torch.no_grad()
    def right(self, pictures: Tensor, truth: Tensor) -> float:
        """Share of pictures [n, 3, h, w] whose style is the true one; -1 where none is said."""
        known = truth >= 0
        guess = [self(shrink(part)).argmax(1) for part in pictures[known].split(64)]
        return (torch.cat(guess) == truth[known]).float().mean().item()


def shrink(pictures: Tensor) -> Tensor:
    return F.interpolate(pictures, (SIZE, SIZE), mode="area")


@torch.no_grad()
def through(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures [n, 3, h, w] as the autoencoder gives them back, at 128 px."""
    size = vae.config.sample_size
    sized = F.interpolate(pictures, (size, size), mode="area" if size <= pictures.shape[-1] else "bicubic")
    return shrink(vae.decode(vae.encode(sized * 2 - 1).latent_dist.mode()).sample.clamp(-1, 1) / 2 + 0.5)


def own_pictures(composer: Composer, sprites: list[Sprite], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Untreated pictures of this world at 128 px or smaller, and their styles."""
    world, rng, pictures = World(sprites), Random(seed), []
    while len(pictures) < count:
        picture = world.picture(rng)
        if picture.treatment == "none":
            pictures.append(picture)
    truth = [STYLE_NAMES.index(STYLES[sprites[p.layers[0].sprite].set]) for p in pictures]
    drawn = torch.cat([shrink(composer.draw(pictures[i : i + 32])) for i in range(0, count, 32)])
    return drawn, torch.tensor(truth)


def other_pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """The other world's: `styled/*.webp`, and a style a line in `styles.txt`."""
    paths = sorted((folder / "styled").glob("*.webp"))
    truth = [STYLE_NAMES.index(line) for line in (folder / "styles.txt").read_text().split()]
    return torch.stack([shrink(from_image(Image.open(p))[None])[0] for p in paths]), torch.tensor(truth[: len(paths)])


def fit_style_judge(
    composer: Composer, sprites: list[Sprite], vaes: list[AutoencoderKL], others: Path | None, count: int, steps: int
) -> tuple[StyleJudge, dict[str, float]]:
    """The judge, and its accuracy on true pictures that it was not trained on, a tenth of each world's."""
    worlds = {"this world": own_pictures(composer, sprites, count, 31)}
    if others:
        worlds["the other world"] = other_pictures(others)
    kept = {name: max(1, len(pictures) // 10) for name, (pictures, _) in worlds.items()}
    pictures = torch.cat([p[kept[name] :] for name, (p, _) in worlds.items()])
    truth = torch.cat([t[kept[name] :] for name, (_, t) in worlds.items()])
    some = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[: len(pictures) // 6]
    blurred = [torch.cat([through(vae, part) for part in pictures[some].split(16)]) for vae in vaes]
    pictures, truth = torch.cat([pictures, *blurred]), torch.cat([truth, *[truth[some]] * len(vaes)])
    torch.manual_seed(0)
    judge = StyleJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.02)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(0, len(pictures), (BATCH,))
        seen = pictures[rows].flip(3) if torch.rand(()) < 0.3 else pictures[rows]
        F.cross_entropy(judge(seen), truth[rows], label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        plan.step()
    judge.eval()
    return judge, {name: judge.right(p[: kept[name]], t[: kept[name]]) for name, (p, t) in worlds.items()}
