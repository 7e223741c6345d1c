"""README's tables of what there is, from the registries: `python -m finetune.listing README.md` writes them anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from finetune.errors import UserError, did_you_mean
from finetune.families import Family, families
from finetune.recipe import RECIPES
from finetune.registry import headlines
from finetune.tasks.base import pipeline_class, tasks

# The recipes' names: base, what is done, size of the card.
BASES = {
    "sd15": "Stable Diffusion 1.5",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3.5 medium",
    "flux": "FLUX.1 dev",
    "z-image": "Z-Image",
}
WAYS = ("lora", "dreambooth", "textual-inversion", "pivotal-tuning", "dreambooth-whole")
SIZED = re.compile(rf"({'|'.join(BASES)})-({'|'.join(sorted(WAYS, key=len, reverse=True))})-(\d+)gb")
TITLES = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5", "qwen3": "Qwen3"}
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def families_table() -> str:
    rows = []
    for name, headline in headlines("finetune.families").items():
        family = families[name]
        title, pipeline = headline.partition(":")[0], f"`{family.pipeline_class}`"
        rows.append(
            (f"`{name}`", title, pipeline, _encoders(family, family.tokenizers), _encoders(family, family.text_lora))
        )
    return _table(("family", "base", "pipeline", "text encoders with a new word", "text encoders with a LoRA"), rows)


def methods_table() -> str:
    return _table(("method", "name", "what it does"), _named("finetune.methods"))


def formats_table() -> str:
    rows = [(f"`{name}`", headline.rstrip(".")) for name, headline in headlines("finetune.formats").items()]
    return _table(("format", "what a file is"), rows)


def tasks_table() -> str:
    """Which pipeline of diffusers does a task on a family, found as `generate` finds it."""
    rows = []
    for name in families.names():
        found = [pipeline_class(families[name].pipeline_class, tasks[task].infix) for task in tasks.names()]
        rows.append((f"`{name}`", *(f"`{kind.__name__}`" if kind else "-" for kind in found)))
    return _table(("family", *(f"`{task}`" for task in tasks.names())), rows)


def recipes_table() -> str:
    """Of each base and way, the cards that there is a recipe for, each with what it is estimated to need."""
    cards: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for path in RECIPES.glob("*gb.yaml"):
        base, way, size = sized(path.stem)
        memory = re.search(r"^# Memory: (\S+) GiB", path.read_text(encoding="utf-8"), re.MULTILINE)
        cards.setdefault((base, way), []).append((size, memory[1] if memory else "?"))
    rows = []
    for base, title in BASES.items():
        cells = [", ".join(f"{size} ({need})" for size, need in sorted(cards.get((base, way), []))) for way in WAYS]
        rows.append((f"{title}, `{base}`", *(cell or "-" for cell in cells)))
    return _table(("base", *(f"`{way}`" for way in WAYS)), rows)


def sized(name: str) -> tuple[str, str, int]:
    """Base, way and size of the card in GB, from a recipe's name."""
    found = SIZED.fullmatch(name)
    assert found is not None, f"{name} is not named as base-way-size"
    return found[1], found[2], int(found[3])


TABLES: dict[str, Callable[[], str]] = {
    "families": families_table,
    "methods": methods_table,
    "formats": formats_table,
    "recipes": recipes_table,
    "tasks": tasks_table,
}


def rewrite(text: str) -> str:
    """The text with every table between `<!-- table: NAME -->` and `<!-- end -->` as the registries have it.

    Raises:
        UserError: no table has this name.
    """
    for _, name, _ in TABLE.findall(text):
        if name not in TABLES:
            raise UserError(f"<!-- table: {name} -->: unknown table. {did_you_mean(name, TABLES)}")
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def _named(package: str) -> list[tuple[str, str, str]]:
    """Of each plug-in its name, and its headline before and after the colon, with links for papers."""
    rows = []
    for name, headline in headlines(package).items():
        title, _, what = re.sub(r"https://arxiv.org/abs/([\d.]+)", r"[\1](\g<0>)", headline).partition(": ")
        rows.append((f"`{name}`", title, what.rstrip(".")))
    return rows


def _encoders(family: type[Family], names: Iterable[str]) -> str:
    """What text encoders are called; where a family has one CLIP, it is CLIP, of whichever size."""
    keys = list(family.word_keys.values())
    one_clip = sum(key.startswith("clip") for key in keys) == 1
    titles = [TITLES.get(key := family.word_keys[name], key) for name in names]
    return ", ".join("CLIP" if one_clip and title.startswith("CLIP") else title for title in titles) or "-"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(rewrite(file.read_text(encoding="utf-8")), encoding="utf-8")
