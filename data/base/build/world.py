"""The captioned picture world: draws what a picture shows and the words that are true of it."""

from __future__ import annotations

import zlib
from random import Random

from layouts import Arranger, Place
from scenes import PATTERNS, SCENE_NAMES, SCENES
from specification import Facts, Layer, Picture
from sprites import Sprite
from vocabulary import (
    COLOURS,
    CONTAINERS,
    HELD_IN_HAND,
    MADE_OF,
    MATERIALS,
    STYLES,
    THINGS,
    TINT_NAMES,
    TREATMENTS,
    WEARABLES,
    WEARERS,
)
from words import NUMBERS, SYNONYMS, UNCOUNTABLE, article, plural

COLOUR_NAMES = list(COLOURS)
KINDS = {
    "single": 46, "close up": 3, "several": 9, "beside": 8, "stacked": 6, "overlapped": 4, "between": 2, "inside": 4,
    "holding": 6, "wearing": 14,
}  # fmt: skip
RESERVED_SHARE = 16  # one thing-and-backdrop pair in so many is kept for measuring


def reserved(thing: str, backdrop: str) -> bool:
    """Whether this pairing is never trained on."""
    return zlib.crc32(f"{thing} / {backdrop}".encode()) % RESERVED_SHARE == 0


class World:
    """Draws pictures from a pack's sprites.

    A picture keeps to one style, as an illustrator would. `evaluation` draws only reserved pairings of thing and
    backdrop, training only the others.
    """

    def __init__(self, sprites: list[Sprite], evaluation: bool = False) -> None:
        self.sprites, self.evaluation = sprites, evaluation
        self.find = {(s.set, s.label): i for i, s in enumerate(sprites)}
        self.by_noun: dict[str, dict[str, list[int]]] = {name: {} for name in STYLES}
        for i, s in enumerate(sprites):
            self.by_noun[s.set].setdefault(s.noun, []).append(i)
        self.by_noun = {name: nouns for name, nouns in self.by_noun.items() if nouns}

    def picture(self, rng: Random) -> Picture:
        """One picture, redrawn until its pairing is of the right kind."""
        while True:
            picture = self._picture(rng)
            if reserved(picture.facts.thing, picture.backdrop) == self.evaluation:
                return picture

    def _picture(self, rng: Random) -> Picture:
        sizes = [sum(map(len, nouns.values())) ** 0.5 for nouns in self.by_noun.values()]
        style = rng.choices(list(self.by_noun), sizes)[0]
        backdrop, colours, where, colour = self._backdrop(rng)
        draws = tuple(round(rng.random(), 4) for _ in range(8))
        arranger = Arranger(self.sprites, Place.of(backdrop, draws, rng), rng)
        facts = Facts(style=STYLES[style], colour=colour, scene=backdrop if backdrop in SCENES else "")
        layers, phrase = self._things(style, arranger, facts, rng)
        treatment = rng.choices(list(TREATMENTS), (91, 3, 2, 2, 2))[0]
        picture = Picture(layers, backdrop, colours, draws, treatment, facts=facts)
        self._say(picture, phrase, where, rng)
        return picture

    def _backdrop(self, rng: Random) -> tuple[str, tuple[int, int], str, str]:
        """(backdrop, its colours, the words for it, the colour that they name)."""
        if rng.random() < 0.6:
            name = rng.choice(SCENE_NAMES)
            phrases = SCENES[name].phrases
            return name, (0, 0), " " + (phrases[0] if rng.random() < 0.6 else rng.choice(phrases)), ""
        name = rng.choices(PATTERNS, (72, 7, 8, 5, 8))[0]
        first, second = rng.sample(range(len(COLOURS)), 2)
        one, two = COLOUR_NAMES[first], COLOUR_NAMES[second]
        if name == "plain":
            first = 0 if rng.random() < 0.2 else first
            one = COLOUR_NAMES[first]
            bare = first == 0 and rng.random() < 0.5
            words = "" if bare else " on " + article(f"{one} background")
            return name, (first, first), words, "" if bare else one
        said = {
            "striped": f"{one} and {two} striped background", "dotted": f"{one} background with {two} dots",
            "checkered": f"{one} and {two} checkered background", "gradient": f"background from {one} to {two}",
        }[name]  # fmt: skip
        return name, (first, second), f" on {article(said)}", ""

    # -- things ---------------------------------------------------------------------------------------------------

    def _pick(self, style: str, rng: Random) -> int:
        nouns = self.by_noun[style]
        noun = rng.choices(list(nouns), [THINGS[n][0] for n in nouns])[0]
        return rng.choice(nouns[noun])

    def _pick_label(self, style: str, labels: frozenset[str] | list[str] | dict, rng: Random) -> int | None:
        found = sorted(self.find[style, label] for label in labels if (style, label) in self.find)
        return rng.choice(found) if found else None

    def _name(self, index: int, rng: Random) -> str:
        """A sprite's name, another word for it, or its class noun."""
        sprite, chance = self.sprites[index], rng.random()
        if chance < 0.15:
            return sprite.noun
        return SYNONYMS.get(sprite.said, sprite.said) if chance < 0.25 else sprite.said

    def _things(self, style: str, arranger: Arranger, facts: Facts, rng: Random) -> tuple[list[Layer], str]:
        """Layers and the words for them; the facts are filled in."""
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        index = self._pick(style, rng)
        if kind == "wearing":
            index = self._pick_label(style, WEARERS, rng) or index
        if kind == "holding" and self.sprites[index].noun not in (
            "animal",
            "bird",
            "smiley",
            "creature",
            "person",
        ):
            index = rng.choice(
                [i for n in ("animal", "bird", "creature", "person") for i in self.by_noun[style].get(n, [index])]
            )
        if kind == "several" and self.sprites[index].said in UNCOUNTABLE:
            kind = "single"
        sprite = self.sprites[index]
        facts.thing, facts.noun, facts.relation = (
            sprite.label,
            sprite.noun,
            kind if kind not in ("single", "several") else "",
        )
        name = self._name(index, rng)
        if kind in ("single", "several", "close up", "wearing", "holding"):
            return self._alone(kind, style, index, name, arranger, facts, rng)
        return self._together(kind, style, index, name, arranger, rng)

    def _tint(self, name: str, facts: Facts, rng: Random) -> tuple[int, str]:
        """Sometimes a colour or a material for the thing: (row of the tints plus one, the name with it)."""
        if rng.random() > 0.13 or any(word in name.split() for word in TINT_NAMES):
            return 0, name
        facts.tint = rng.choice(TINT_NAMES)
        if facts.tint in MATERIALS and rng.random() < 0.5 and " with " not in name:
            return TINT_NAMES.index(facts.tint) + 1, f"{name} made of {MADE_OF[facts.tint]}"
        return TINT_NAMES.index(facts.tint) + 1, f"{facts.tint} {name}"

    def _alone(
        self, kind: str, style: str, index: int, name: str, arranger: Arranger, facts: Facts, rng: Random
    ) -> tuple[list[Layer], str]:
        tint, name = self._tint(name, facts, rng)
        if kind == "wearing":
            item = self._pick_label(style, WEARABLES, rng)
            if item is not None and item != index:
                words = WEARABLES[self.sprites[item].label][0]
                return arranger.wearing(index, item, tint), f"{article(name)} wearing {words}"
        if kind == "holding":
            item = self._pick_label(style, HELD_IN_HAND, rng)
            if item is not None and item != index:
                words = article(self.sprites[item].said)
                return arranger.holding(index, item, tint), f"{article(name)} holding {words}"
        if kind == "close up":
            return arranger.close_up(index, tint), f"a close-up of {article(name)}"
        if kind == "several":
            facts.count = rng.choices((2, 3, 4, 5, 6), (5, 5, 4, 2, 2))[0]
            return arranger.several(index, facts.count, tint), f"{NUMBERS[facts.count]} {_plural(name)}"
        if rng.random() < 0.02:
            return arranger.single(index, rng.uniform(0.5, 0.75), tint, True), f"{article(name)} upside down"
        scale = rng.triangular(0.3, 0.92, 0.66)
        size = ""
        if scale < 0.42 and rng.random() < 0.7:
            size = rng.choice(("small ", "small ", "tiny "))
        elif scale > 0.82 and rng.random() < 0.6:
            size = rng.choice(("big ", "big ", "huge "))
        facts.relation = ""
        return arranger.single(index, scale, tint), article(size + name) if name not in UNCOUNTABLE else size + name

    def _together(
        self, kind: str, style: str, index: int, name: str, arranger: Arranger, rng: Random
    ) -> tuple[list[Layer], str]:
        other = self._pick(style, rng)
        if kind == "inside":
            other = self._pick_label(style, CONTAINERS, rng)
            if other is None or other == index:
                return arranger.single(index, 0.6), article(name)
            words = CONTAINERS[self.sprites[other].label][0]
            return arranger.inside(index, other), f"{article(name)} {rng.choice(('in', 'inside'))} {words}"
        one, two = article(name), article(self._name(other, rng))
        if kind == "between":
            return arranger.between(index, other), f"{one} between two {_plural(self.sprites[other].said)}"
        if kind == "beside":
            said = (
                f"{one} next to {two}",
                f"{one} beside {two}",
                f"{one} and {two}",
                f"{one} to the left of {two}",
            )
            if rng.random() < 0.15:
                return arranger.beside(other, index), f"{one} to the right of {two}"
            return arranger.beside(index, other), rng.choices(said, (50, 10, 25, 15))[0]
        if kind == "stacked":
            said = (f"{one} on top of {two}", f"{one} on {two}", f"{two} under {one}")
            return arranger.stacked(index, other), rng.choices(said, (55, 20, 25))[0]
        said = (f"{one} in front of {two}", f"{two} behind {one}")
        return arranger.overlapped(index, other), rng.choice(said)

    # -- words ----------------------------------------------------------------------------------------------------

    def _say(self, picture: Picture, phrase: str, where: str, rng: Random) -> None:
        """Write the caption, and drop from the facts what it leaves unsaid."""
        facts, chance = picture.facts, rng.random()
        if picture.treatment != "none":
            facts.treatment, facts.style, facts.colour = picture.treatment, "", ""
            adjective, adverb = TREATMENTS[picture.treatment]
            forms = (
                f"{phrase}{where}, {adjective}",
                f"{phrase}{where} {adverb}",
                f"a {adjective} picture of {phrase}{where}",
            )
            picture.caption = rng.choice(forms)
            return
        style = facts.style
        if chance < 0.44:
            picture.caption = f"{phrase}{where}, {style} style"
        elif chance < 0.52:
            picture.caption = f"a {style} style drawing of {phrase}{where}"
        elif chance < 0.59:
            picture.caption = f"{phrase}, {style} style"
            facts.scene = facts.colour = ""
        else:
            picture.caption = f"a picture of {phrase}{where}" if chance < 0.7 else phrase + where
            facts.style = ""


def _plural(name: str) -> str:
    """The plural of a name that may be `... made of gold`."""
    head, joint, rest = name.partition(" made of ")
    return plural(head) + joint + rest
