"""Draws packed specifications in batches, on whatever device the sprites are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from brushes import below, mix
from scenes import PATTERNS, SCENE_NAMES, SCENES, paint_pattern, paint_scene
from specification import BACKDROPS, MAX_LAYERS, Picture, pack, unpack
from sprites import Sprite
from torch import Tensor
from vocabulary import COLOURS, TINT_NAMES, TINTS, TREATMENT_NAMES

LUMINANCE = (0.3, 0.59, 0.11)


class Composer:
    """Sprites and palettes on a device, and the picture size to draw at.

    Sprites are kept premultiplied by alpha at two sizes, so that small ones are not aliased.
    """

    def __init__(
        self, pictures: Tensor, sprites: list[Sprite], size: int = 256, device: str | torch.device = "cpu"
    ) -> None:
        """pictures: uint8 [n, 4, h, w] of the sprites."""
        self.size, self.device = size, torch.device(device)
        whole = [self._premultiply(part.to(device)) for part in pictures.split(256)]
        self.sprites = torch.cat(whole)
        self.halves = torch.cat([F.avg_pool2d(part.float(), 2).round().byte() for part in whole])
        self.means = torch.tensor([s.mean for s in sprites], device=device)
        self.feet = torch.tensor([s.box[3] for s in sprites], device=device)
        self.colours = torch.tensor(list(COLOURS.values()), device=device).float() / 255
        self.tints = torch.tensor([TINTS[name] for name in TINT_NAMES], device=device).float() / 255
        self.lights = torch.tensor(
            [(1.0, 1.0, 1.0)] * len(PATTERNS) + [SCENES[n].light for n in SCENE_NAMES], device=device
        )
        ramp = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
        self.y, self.x = ramp.view(1, 1, -1, 1), ramp.view(1, 1, 1, -1)

    @staticmethod
    def _premultiply(part: Tensor) -> Tensor:
        alpha = part[:, 3:].float()
        return torch.cat([(part[:, :3].float() * alpha / 255).round(), alpha], 1).byte()

    def draw(self, pictures: list[Picture]) -> Tensor:
        """[n, 3, size, size] in 0..1."""
        return self.compose(*unpack(*pack(pictures), self.device))

    @torch.no_grad()
    def compose(self, layers: Tensor, grounds: Tensor) -> Tensor:
        """[n, 3, size, size] in 0..1 from packed layers [n, L, 9] and grounds [n, 12]."""
        picture = self._backdrop(grounds)
        picture = picture * (1 - self._shadows(layers))
        canvas = torch.zeros(len(layers), 4, self.size, self.size, device=self.device)
        for place in range(MAX_LAYERS):
            rows = (layers[:, place, 0] >= 0).nonzero().flatten()
            if len(rows):
                drawn = self._layer(layers[rows, place])
                canvas[rows] = drawn + canvas[rows] * (1 - drawn[:, 3:])
        light = self.lights[grounds[:, 0].long()].view(-1, 3, 1, 1)
        colour, alpha = (canvas[:, :3] * light).clamp(max=1.0), canvas[:, 3:]
        treatment = grounds[:, 3].long()
        rows = (treatment == TREATMENT_NAMES.index("sticker")).nonzero().flatten()
        if len(rows):
            picture[rows] = self._sticker_border(picture[rows], alpha[rows])
        picture = torch.minimum(colour, alpha) + picture * (1 - alpha)
        return self._treat(picture, treatment).clamp(0, 1)

    def _backdrop(self, grounds: Tensor) -> Tensor:
        out = torch.empty(len(grounds), 3, self.size, self.size, device=self.device)
        kinds = grounds[:, 0].long()
        for kind in kinds.unique().tolist():
            rows = (kinds == kind).nonzero().flatten()
            some, draws, name = grounds[rows], grounds[rows, 4:], BACKDROPS[kind]
            if name in SCENES:
                out[rows] = paint_scene(name, draws, self.x, self.y)
            else:
                one, two = self.colours[some[:, 1].long()], self.colours[some[:, 2].long()]
                out[rows] = paint_pattern(name, one, two, draws, self.x, self.y)
        return out

    def _shadows(self, layers: Tensor) -> Tensor:
        """[n, 1, h, w]: soft ellipses where shadowed layers touch the ground."""
        out = torch.zeros(len(layers), 1, self.size, self.size, device=self.device)
        for place in range(MAX_LAYERS):
            rows = ((layers[:, place, 8] > 0) & (layers[:, place, 0] >= 0)).nonzero().flatten()
            if not len(rows):
                continue
            _, scale, x, y, _, _, _, _, strength = (v.view(-1, 1, 1, 1) for v in layers[rows, place].unbind(1))
            foot = y + self.feet[layers[rows, place, 0].long()].view(-1, 1, 1, 1) * scale
            away = ((self.x - x) / (scale * 0.72)) ** 2 + ((self.y - foot) / (scale * 0.14)) ** 2
            out[rows] = torch.maximum(out[rows], torch.exp(-away * 1.4) * strength)
        return out

    def _layer(self, fields: Tensor) -> Tensor:
        """Sprites placed in the picture, premultiplied: [m, 4, h, w]."""
        _, scale, x, y, turn, flip, tint, clip, _ = fields.unbind(1)
        index = fields[:, 0].long()
        cos, sin = turn.cos() / scale, turn.sin() / scale
        across = torch.stack([flip * cos, flip * sin, -flip * (cos * x + sin * y)], -1)
        down = torch.stack([-sin, cos, sin * x - cos * y], -1)
        grid = F.affine_grid(
            torch.stack([across, down], 1), [len(fields), 4, self.size, self.size], align_corners=False
        )
        small = scale * self.size < self.sprites.shape[-1] / 1.6
        out = torch.empty(len(fields), 4, self.size, self.size, device=self.device)
        for source, chosen in ((self.sprites, ~small), (self.halves, small)):
            rows = chosen.nonzero().flatten()
            if len(rows):
                texture = source[index[rows]].float() / 255
                out[rows] = F.grid_sample(texture, grid[rows], align_corners=False)
        if (clip > -1).any():
            out = out * below(
                self.y, torch.where(clip > -1, y + clip * scale, torch.full_like(y, -9.0)).view(-1, 1, 1, 1)
            )
        rows = (tint > 0).nonzero().flatten()
        if len(rows):
            out[rows] = self._tinted(out[rows], tint[rows].long() - 1, self.means[index[rows]])
        return out

    def _tinted(self, drawn: Tensor, tint: Tensor, mean: Tensor) -> Tensor:
        """Recolour by luminance: shadows, middle (the sprite's mean) and highlights take the tint's three colours."""
        weights = torch.tensor(LUMINANCE, device=self.device).view(1, 3, 1, 1)
        alpha, pivot = drawn[:, 3:], mean.view(-1, 1, 1, 1).clamp(0.15, 0.85)
        bright = (drawn[:, :3] * weights).sum(1, keepdim=True) / alpha.clamp(min=1e-3)
        dark, middle, light = (self.tints[tint, k].view(-1, 3, 1, 1) for k in range(3))
        colour = mix(
            mix(dark, middle, (bright / pivot).clamp(0, 1)),
            light,
            ((bright - pivot) / (1 - pivot)).clamp(0, 1),
        )
        return torch.cat([colour * alpha, alpha], 1)

    def _sticker_border(self, picture: Tensor, alpha: Tensor) -> Tensor:
        """A white rim around everything, with a soft shadow."""
        reach = self.size // 36 * 2 + 1
        rim = F.avg_pool2d(F.max_pool2d(alpha, reach, 1, reach // 2), 3, 1, 1)
        soft = F.avg_pool2d(rim, reach, 1, reach // 2, count_include_pad=False)
        return mix(picture * (1 - 0.3 * soft.roll(self.size // 64, 2)), torch.ones_like(picture), rim)

    def _treat(self, picture: Tensor, treatment: Tensor) -> Tensor:
        """Pixel art, black and white, or a pencil sketch, on the rows that ask for it."""
        weights = torch.tensor(LUMINANCE, device=self.device).view(1, 3, 1, 1)
        rows = (treatment == TREATMENT_NAMES.index("pixel")).nonzero().flatten()
        if len(rows):
            block = self.size // 32
            picture[rows] = F.interpolate(F.avg_pool2d(picture[rows], block), scale_factor=block)
        rows = (treatment == TREATMENT_NAMES.index("gray")).nonzero().flatten()
        if len(rows):
            picture[rows] = (picture[rows] * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)
        rows = (treatment == TREATMENT_NAMES.index("sketch")).nonzero().flatten()
        if len(rows):
            gray = F.avg_pool2d((picture[rows] * weights).sum(1, keepdim=True), 3, 1, 1)
            padded = F.pad(gray, (1, 1, 1, 1), mode="replicate")
            edge = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]).abs() + (
                padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
            ).abs()
            ink = (0.75 + 0.23 * gray - 2.6 * F.avg_pool2d(edge, 3, 1, 1)).clamp(0.12, 1)
            picture[rows] = ink * torch.tensor([1.0, 0.99, 0.96], device=self.device).view(1, 3, 1, 1)
        return picture
