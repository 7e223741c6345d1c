"""The prompts that the base is judged by: pairings of thing and place that training left out."""

from __future__ import annotations

from random import Random

from scenes import SCENES
from specification import Facts, Picture
from sprites import Sprite
from vocabulary import COLOURS, STYLES
from words import NUMBERS, article, plural
from world import World, reserved

SHARED_SCENES = ("meadow", "beach", "snow", "night", "desert", "sunset", "under water", "sky")
"""Places that smaller emoji worlds know by the same words."""


def world_prompts(sprites: list[Sprite], count: int, seed: int = 77) -> list[Picture]:
    """The world's own pictures, over everything that it can say."""
    world, rng = World(sprites, evaluation=True), Random(seed)
    return [world.picture(rng) for _ in range(count)]


def shared_prompts(sprites: list[Sprite], count: int, seed: int = 78) -> list[Picture]:
    """Plain sentences of thing, number, place and style that another emoji base can follow too. No layers are drawn."""
    rng, pictures = Random(seed), []
    plain = [s for s in sprites if s.said == s.label.lower() and plural(s.said) == s.said + "s"]
    while len(pictures) < count:
        sprite, number = rng.choice(plain), rng.choice((1, 1, 1, 2, 3, 4))
        scene, colour = (rng.choice(SHARED_SCENES), "") if rng.random() < 0.5 else ("", rng.choice(list(COLOURS)))
        if not reserved(sprite.label, scene or "plain"):
            continue
        thing = article(sprite.said) if number == 1 else f"{NUMBERS[number]} {plural(sprite.said)}"
        where = SCENES[scene].phrases[0] if scene else f"on {article(colour)} background"
        style = STYLES[sprite.set]
        facts = Facts(sprite.label, sprite.noun, number, colour, "", scene, style)
        pictures.append(Picture([], scene or "plain", caption=f"{thing} {where}, {style} style", facts=facts))
    return pictures
