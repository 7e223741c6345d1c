"""How things are said: other words, plurals and articles."""

from __future__ import annotations

SYNONYMS = {
    "car": "automobile", "gift": "present", "doughnut": "donut", "chick": "baby bird", "airplane": "plane",
    "rabbit face": "bunny face", "rabbit": "bunny", "bicycle": "bike", "t-rex": "tyrannosaurus", "ufo": "spaceship",
    "ewe": "sheep", "house": "home", "cookie": "biscuit", "television": "tv", "mobile phone": "smartphone",
    "steam train": "train", "motorcycle": "motorbike", "candy": "sweet", "cap": "baseball cap",
    "sneaker": "running shoe",
    "french fries": "fries", "soccer ball": "football", "cup of coffee": "hot drink", "passenger ship": "cruise ship",
    "dinosaur": "brontosaurus", "diamond": "gem", "smiling face": "happy face", "pig face": "piglet face",
    "cat face": "kitten face", "dog face": "puppy face", "crying face": "sad face", "enraged face": "furious face",
}  # fmt: skip

PLURALS = {
    "sheep": "sheep", "fish": "fish", "tropical fish": "tropical fish", "pufferfish": "pufferfish", "mouse": "mice",
    "wolf": "wolves", "goose": "geese", "deer": "deer", "bison": "bison", "shrimp": "shrimp", "squid": "squid",
    "cherry": "cherries", "candy": "candies", "man": "men", "woman": "women", "person": "people", "boy": "boys",
    "ladybug": "ladybugs", "old man": "old men", "old woman": "old women", "police officer": "police officers",
    "hippopotamus": "hippopotamuses", "rhinoceros": "rhinoceroses", "knife": "knives", "broccoli": "broccoli",
    "french fries": "french fries", "grapes": "grapes", "fruit": "fruits", "aircraft": "aircraft", "toy": "toys",
    "smiley": "smileys", "fairy": "fairies", "baby": "babies", "bus": "buses", "blueberries": "blueberries",
    "clothing": "clothes", "jeans": "jeans", "glasses": "glasses", "sunglasses": "sunglasses", "key": "keys",
    "donkey": "donkeys", "turkey": "turkeys", "monkey": "monkeys", "maple leaf": "maple leaves", "penguin": "penguins",
}  # fmt: skip

UNCOUNTABLE = frozenset(
    [
        "glasses",
        "sunglasses",
        "jeans",
        "scissors",
        "headphones",
        "popcorn",
        "broccoli",
        "corn",
        "cheese",
        "bread",
        "spaghetti",
        "salad",
        "soap",
        "yarn",
        "fire",
        "luggage",
        "clothing",
        "grapes",
        "french fries",
        "fries",
        "blueberries",
        "maracas",
        "gloves",
        "socks",
        "nesting dolls",
        "goggles",
        "fried shrimp",
        "garlic",
        "sushi",
        "chopsticks",
        "food",
        "coral",
        "money",
    ]
)
"""Said without an article, and never counted."""

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def spoken(entry: str) -> tuple[str, str]:
    """`label>spoken` -> (label, spoken); a plain label says itself in lower case."""
    label, _, said = entry.partition(">")
    return label, said or label.lower().replace("\u2019", "").replace(":", "")


def article(noun: str) -> str:
    """The noun with the article that it takes."""
    if noun in UNCOUNTABLE or noun.split(" ", 1)[-1] in UNCOUNTABLE:
        return noun
    return ("an " if noun[0] in "aeio" or noun.startswith("umb") else "a ") + noun


def plural(noun: str) -> str:
    if noun in PLURALS:
        return PLURALS[noun]
    if " with " in noun or " of " in noun:
        head, joint, rest = noun.partition(" with ") if " with " in noun else noun.partition(" of ")
        return plural(head) + joint + rest
    last = noun.rsplit(" ", 1)[-1]
    if last in PLURALS and last != noun:
        return noun.removesuffix(last) + PLURALS[last]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("tomato", "potato", "mango")):
        return noun + "es"
    return noun + "s"
