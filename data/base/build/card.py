"""The measured numbers in the model card, as tables between marks."""

from __future__ import annotations

import json
from pathlib import Path

JUDGED = ("retrieval", "colour", "count", "scene", "style")
WHO = {"base": "this base", "beside": "the probe"}
Rows = list[list[str]]


def percent(row: dict[str, float], name: str) -> str:
    return f"{100 * row[name]:.0f} %" if name in row else ""


def table(head: list[str], rows: Rows) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def prompt_tables(found: dict) -> str:
    """Prompt following, sizes and distances, of `measure`."""
    count, shared = found["prompts"], found["shared prompts"]
    titles = {
        f"{shared} shared prompts, this base": "shared prompts: made",
        f"{shared} shared prompts, the probe": "shared prompts: beside",
        f"{count:,} world prompts, this base": "world prompts: made",
        f"{count:,} world prompts, true pictures (ceiling)": "world prompts: true pictures",
    }
    head = ["", "own caption nearest of 64", "backdrop colour", "count", "scene", "style"]
    first = table(
        head, [[t, *(percent(found[name], j) for j in JUDGED)] for t, name in titles.items() if name in found]
    )
    distance, forms = found["frechet"], {
        "autoencoder, held-out world pictures, PSNR": ("autoencoder psnr", "{:.1f} dB"),
        "two CPU cores: a picture, 25 guided DDIM steps, batch 4": ("seconds a picture", "{:.2f} s"),
        "two CPU cores: a LoRA step, rank 16, batch 6, float32": ("seconds a LoRA step", "{:.2f} s"),
    }  # fmt: skip
    rows = [
        [title, *(form.format(found[f"{name}: {who}"]) if f"{name}: {who}" in found else "" for who in WHO)]
        for title, (name, form) in forms.items()
    ]
    for title, names in {
        "Fréchet distance to pictures of its own world": ("made", "beside"),
        "the same of true pictures (floor)": ("floor (true pictures)", "floor beside"),
    }.items():
        rows.append([title, *(f"{distance[name]:.2f}" if name in distance else "" for name in names)])
    return f"{first}\n\n{table(['', *WHO.values()], rows)}"


def companion_tables(found: dict) -> str:
    """How well the companions do, of `measure`."""
    control = [[name, f"{row['edge F1']:.2f}", percent(row, "retrieval")] for name, row in found["controlnet"].items()]
    first = table(["ControlNet", "edges, F1", "own caption nearest of 64"], control)
    ways, rows = ("edited", "source", "afresh", "target"), []
    for kind, row in found["edits"].items():
        near = [percent(row, f"{way}: nearer the target") for way in ways]
        moved = [f"{row[name]:.1f}" if (name := f"{way}: moved elsewhere") in row else "" for way in ways[:3]]
        judged = [percent(row, f"{way}: judged") for way in ("edited", "source")]
        rows.append([kind, *near, *moved, *judged])
    head = ["InstructPix2Pix", "nearer the target", "(the source itself)", "(painted afresh)", "(the target itself)"]
    head += [
        "moved elsewhere, of 255",
        "(autoencoder alone)",
        "(painted afresh)",
        "judged right",
        "(the source itself)",
    ]
    return f"{first}\n\n{table(head, rows)}"


def personal_table(found: dict) -> str:
    """Means over the concepts of `personalise`."""
    columns = (
        "before: the prompt's own", "after: the prompt's own", "before: all left-out photos",
        "after: all left-out photos", "left-out photos, each other", "after: own prompt of six",
    )  # fmt: skip
    rows = []
    for recipe in dict.fromkeys(recipe for recipes in found.values() for recipe in recipes):
        for who, recipes in found.items():
            if recipe in recipes:
                concepts = list(recipes[recipe].values())
                means = [sum(c[name] for c in concepts) / len(concepts) for name in columns]
                cells = [*(f"{mean:.2f}" for mean in means[:-1]), f"{100 * means[-1]:.0f} %"]
                rows.append([f"{recipe}, {len(concepts)} concepts, {WHO[who]}", *cells])
    head = [
        "",
        "the prompt's own photo, before",
        "after",
        "all photos, before",
        "after",
        "(photos among each other)",
        "own prompt nearest of six, after",
    ]
    return table(head, rows)


def replaced(text: str, name: str, inside: str) -> str:
    """The text with new words between the marks of `name`."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    _, mark, after = rest.partition(end)
    assert mark, f"the card has no {start} ... {end}"
    return f"{before}{start}\n{inside}\n{end}{after}"


def write_card(run: Path, card: Path) -> None:
    """Replace what stands between the marks by what the run's folder holds."""
    text, found = card.read_text(), json.loads((run / "measurements.json").read_text())
    text = replaced(text, "measurements", prompt_tables(found))
    if "controlnet" in found:
        text = replaced(text, "companions", companion_tables(found))
    if (run / "personalised.json").exists():
        text = replaced(text, "personalisation", personal_table(json.loads((run / "personalised.json").read_text())))
    card.write_text(text)
