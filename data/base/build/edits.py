"""Pairs of pictures that differ by one instruction, for InstructPix2Pix: the same specification with one change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from scenes import SCENE_NAMES, SCENES
from specification import Layer, Picture
from sprites import Sprite
from vocabulary import COLOURS, MADE_OF, MATERIALS, STYLES, TINT_NAMES, TREATMENTS, WEARABLES
from words import UNCOUNTABLE, article, plural
from world import World, reserved

KINDS = {
    "scene": 26, "backdrop": 10, "colour": 13, "material": 6, "added": 24, "removed": 12, "thing": 9, "style": 7,
    "treatment": 8, "size": 4,
}  # fmt: skip
WEATHER = {
    "night": ("make it night", "make it dark", "turn day into night"),
    "snow": ("make it winter", "make it snow", "let it snow"), "rain": ("make it rain", "make it rainy"),
    "sunset": ("make it sunset", "make it dusk", "let the sun set"), "autumn": ("make it autumn", "make it fall"),
    "aurora": ("add northern lights",), "rainbow": ("add a rainbow",), "party": ("make it a party",),
    "under water": ("put it under water", "flood it"), "stage": ("put it in the spotlight",),
}  # fmt: skip
TREATED = {
    "pixel": ("turn it into pixel art", "make it pixel art"), "sketch": ("turn it into a pencil sketch", "sketch it"),
    "gray": ("make it black and white", "remove the colours"), "sticker": ("turn it into a sticker", "make a sticker"),
}  # fmt: skip
HATS = ("a top hat", "a cap", "a sun hat")
ADDED = {
    "wearing": ("put {a} on {it}", "give {it} {a}", "let {it} wear {a}", "add {a}"),
    "holding": ("give {it} {a}", "let {it} hold {a}", "put {a} in its hand"),
    "beside": ("add {a} next to {it}", "put {a} beside {it}", "add {a}"),
    "stacked": ("put {a} on top of {it}", "add {a} on top"),
    "": ("add a second one", "add another one", "make it two"),
}
REMOVED = {
    "wearing": ("take off {the}", "remove {the}", "take {the} away"), "": ("remove one", "leave just one"),
    "other": ("remove {the}", "take {the} away", "without {the}"),
}  # fmt: skip
TREATMENTS_TRUE = tuple(name for name in TREATMENTS if name != "none")


@dataclass(frozen=True)
class Edit:
    """A picture, what is asked, and the picture that it asks for; `caption` describes the last to a base model."""

    source: Picture
    instruction: str
    target: Picture
    kind: str
    caption: str


class Editor:
    """Draws edits of a world's pictures. Training never sees a reserved pairing, neither before nor after."""

    def __init__(self, world: World) -> None:
        self.world, self.sprites = world, world.sprites

    def edit(self, rng: Random, kind: str = "") -> Edit:
        """One edit, of the kind if one is named."""
        chosen = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
        while True:
            source = self.world.picture(rng)
            found = getattr(self, chosen)(source, rng)
            if found is None:
                continue
            source, instruction, target = found
            thing = target.facts.thing
            if self.world.evaluation or not reserved(thing, target.backdrop):
                return Edit(source, instruction, target, chosen, self.describe(target))

    def main(self, picture: Picture) -> int:
        """The sprite that the picture is of."""
        return next(one.sprite for one in picture.layers if self.sprites[one.sprite].label == picture.facts.thing)

    def it(self, picture: Picture, rng: Random) -> str:
        several = picture.facts.count > 1
        if rng.random() < 0.6:
            return "them" if several else "it"
        said = self.sprites[self.main(picture)].said
        return f"the {plural(said) if several else said}"

    # -- each kind: (source, instruction, target), or None where the picture does not allow it ----------------------

    def scene(self, picture: Picture, rng: Random) -> tuple[Picture, str, Picture] | None:
        name = rng.choice([n for n in SCENE_NAMES if n != picture.backdrop])
        phrase, it = rng.choice(SCENES[name].phrases), self.it(picture, rng)
        place = phrase.split(" ", 1)[1]
        said = rng.choice((f"change the background to {rng.choice((name, place))}", f"put {it} {phrase}"))
        if name in WEATHER and rng.random() < 0.5:
            said = rng.choice(WEATHER[name])
        return picture, said, self.moved(picture, name, (0, 0))

    def backdrop(self, picture: Picture, rng: Random) -> tuple[Picture, str, Picture] | None:
        colour = rng.randrange(len(COLOURS))
        name = list(COLOURS)[colour]
        if picture.backdrop == "plain" and picture.colours[0] == colour:
            return None
        forms = ("make the background {c}", "change the background to {c}", "put {it} on {a} background")
        said = rng.choice(forms).format(c=name, a=article(name), it=self.it(picture, rng))
        return picture, said, self.moved(picture, "plain", (colour, colour))

    def moved(self, picture: Picture, name: str, colours: tuple[int, int]) -> Picture:
        """The same things before another backdrop, with its kind of shadow."""
        grounded = name in SCENES and SCENES[name].horizon is not None
        stand = picture.facts.relation in ("", "beside")
        strength = 0.34 if grounded else 0.16 if name == "plain" else 0.0
        layers = [replace(one, shadow=strength if stand or one.shadow else 0.0) for one in picture.layers]
        facts = replace(picture.facts, scene=name if name in SCENES else "", colour="")
        if name == "plain":
            facts.colour = list(COLOURS)[colours[0]]
        return replace(picture, layers=layers, backdrop=name, colours=colours, facts=facts)

    def colour(self, picture: Picture, rng: Random) -> tuple[Picture, str, Picture] | None:
        name = rng.choice([n for n in TINT_NAMES if n not in MATERIALS])
        forms = ("make {it} {c}", "paint {it} {c}", "turn {it} {c}", "change the colour of {it} to {c}")
        return self.tinted(picture, name, rng.choice(forms).format(it=self.it(picture, rng), c=name))

    def material(self, picture: Picture, rng: Random) -> tuple[Picture, str, Picture] | None:
        name = rng.choice(MATERIALS)
        forms = ("make {it} out of {m}", "turn {it} into {m}", "make {it} {c}" if name != "candy" else "make it candy")
        said = rng.choice(forms).format(it=self.it(picture, rng), m=MADE_OF[name], c=name)
        return self.tinted(picture, name, said)

    def tinted(self, picture: Picture, name: str, said: str) -> tuple[Picture, str, Picture] | None:
        tint, index = TINT_NAMES.index(name) + 1, self.main(picture)
        if any(one.tint == tint for one in picture.layers) or picture.treatment in ("gray", "sketch"):
            return None
        layers = [replace(one, tint=tint) if one.sprite == index else one for one in picture.layers]
        return picture, said, replace(picture, layers=layers, facts=replace(picture.facts, tint=name))

    def added(self, picture: Picture, rng: Random) -> tuple[Picture, str, Picture] | None:
        parted = self.parted(picture)
        if parted is None:
            return None
        less, other = parted
        a = self.named(other, rng)
        said = rng.choice(ADDED[picture.facts.relation]).format(a=a, it=self.it(less, rng))
        return less, said, picture

    def removed(self, picture: Picture, rng: Random) -> tuple[Picture, str, Picture] | None:
        parted = self.parted(picture)
        if parted is None:
            return None
        less, other = parted
        relation = picture.facts.relation
        named = self.named(other, rng).removeprefix("a ").removeprefix("an ")
        forms = REMOVED.get(relation, REMOVED["other"])
        return picture, rng.choice(forms).format(the=f"the {named}"), less

    def parted(self, picture: Picture) -> tuple[Picture, int] | None:
        """(the picture without its second thing, that thing's sprite)."""
        relation, layers = picture.facts.relation, picture.layers
        if len(layers) != 2 or relation not in ADDED:
            return None
        index = self.main(picture)
        kept, other = layers
        if relation == "beside" and layers[0].sprite != index:
            kept, other = layers[1], layers[0]
        facts = replace(picture.facts, count=1, relation="")
        if relation == "stacked":  # what stays is the lower thing
            lower = self.sprites[kept.sprite]
            facts = replace(facts, thing=lower.label, noun=lower.noun)
        return replace(picture, layers=[kept], facts=facts), other.sprite

    def named(self, index: int, rng: Random) -> str:
        words = WEARABLES.get(self.sprites[index].label, (article(self.sprites[index].said),))[0]
        return "a hat" if words in HATS and rng.random() < 0.3 else words

    def thing(self, picture: Picture, rng: Random) -> tuple[Picture, str, Picture] | None:
        old = self.main(picture)
        new = self.world._pick(self.sprites[old].set, rng)
        if picture.facts.relation not in ("", "beside", "stacked") or new == old or picture.facts.count > 3:
            return None
        first, other = self.sprites[old].said, self.sprites[new].said
        several = picture.facts.count > 1
        if several:
            forms = (f"replace the {plural(first)} with {plural(other)}", f"turn them into {plural(other)}")
        else:
            a = article(other)
            forms = (f"replace the {first} with {a}", f"turn the {first} into {a}", f"make it {a}", f"turn it into {a}")
        layers = [self.swapped(one, new) if one.sprite == old else one for one in picture.layers]
        facts = replace(picture.facts, thing=self.sprites[new].label, noun=self.sprites[new].noun)
        return picture, rng.choice(forms), replace(picture, layers=layers, facts=facts)

    def swapped(self, layer: Layer, index: int) -> Layer:
        """Another sprite at the layer's size, with the same foot."""
        old, new = self.sprites[layer.sprite].box, self.sprites[index].box
        x = layer.x + layer.scale * ((old[0] + old[2]) - (new[0] + new[2])) / 2
        y = layer.y + layer.scale * (old[3] - new[3])
        return replace(layer, sprite=index, x=x, y=y)

    def style(self, picture: Picture, rng: Random) -> tuple[Picture, str, Picture] | None:
        drawn = self.sprites[picture.layers[0].sprite].set
        name = rng.choice([n for n in self.world.by_noun if n != drawn] or [drawn])
        layers = [self.redrawn(one, name) for one in picture.layers]
        if name == drawn or any(one is None for one in layers):
            return None
        word = STYLES[name]
        forms = (f"make it {word} style", f"redraw it in {word} style", f"turn it into {word} style", f"{word} style")
        facts = replace(picture.facts, style=word)
        return picture, rng.choice(forms), replace(picture, layers=layers, facts=facts)

    def redrawn(self, layer: Layer, name: str) -> Layer | None:
        index = self.world.find.get((name, self.sprites[layer.sprite].label))
        return None if index is None else self.swapped(layer, index)

    def treatment(self, picture: Picture, rng: Random) -> tuple[Picture, str, Picture] | None:
        if picture.treatment != "none":
            return None
        name = rng.choice(TREATMENTS_TRUE)
        facts = replace(picture.facts, treatment=name)
        return picture, rng.choice(TREATED[name]), replace(picture, treatment=name, facts=facts)

    def size(self, picture: Picture, rng: Random) -> tuple[Picture, str, Picture] | None:
        if len(picture.layers) != 1 or not 0.35 < picture.layers[0].scale < 0.8:
            return None
        layer, bigger = picture.layers[0], picture.layers[0].scale < 0.58
        scale = layer.scale * (1.5 if bigger else 0.6)
        _, top, _, bottom = self.sprites[layer.sprite].box
        y = max(layer.y + (layer.scale - scale) * bottom, -0.97 - scale * top)  # the foot stays, unless it cuts the top
        changed = replace(layer, scale=scale, y=y)
        words = ("make {it} bigger", "enlarge {it}") if bigger else ("make {it} smaller", "shrink {it}")
        return picture, rng.choice(words).format(it=self.it(picture, rng)), replace(picture, layers=[changed])

    # -- words ----------------------------------------------------------------------------------------------------

    def describe(self, picture: Picture) -> str:
        """A plain caption of the picture, as the base understands it."""
        facts, sprite = picture.facts, self.sprites[self.main(picture)]
        said = f"{facts.tint} {sprite.said}" if facts.tint else sprite.said
        phrase = said if sprite.said in UNCOUNTABLE else article(said)
        if facts.count > 1:
            phrase = f"{('two', 'three', 'four', 'five', 'six')[facts.count - 2]} {plural(said)}"
        others = [one.sprite for one in picture.layers if self.sprites[one.sprite].label != facts.thing]
        if others and facts.relation in RELATIONS:
            phrase += RELATIONS[facts.relation].format(self.named(others[0], Random(1)))
        where = f" {SCENES[picture.backdrop].phrases[0]}" if picture.backdrop in SCENES else ""
        if facts.colour:
            where = f" on {article(facts.colour)} background"
        if picture.treatment != "none":
            return f"{phrase}{where}, {TREATMENTS[picture.treatment][0]}"
        return f"{phrase}{where}, {STYLES[sprite.set]} style"


RELATIONS = {
    "wearing": " wearing {}", "holding": " holding {}", "beside": " next to {}", "stacked": " on top of {}",
    "overlapped": " in front of {}", "inside": " inside {}",
}  # fmt: skip


def draw_edits(sprites: list[Sprite], seed: int, count: int, evaluation: bool = False, kind: str = "") -> list[Edit]:
    editor, rng = Editor(World(sprites, evaluation)), Random(seed)
    return [editor.edit(rng, kind) for _ in range(count)]
