"""The measured numbers in the model card, as tables between two marks."""

from __future__ import annotations

import json
from pathlib import Path

START, END = "<!-- measurements -->", "<!-- end of measurements -->"
JUDGED = ("retrieval", "colour", "count", "scene", "style")


def percent(row: dict[str, float]) -> str:
    return " | ".join(f"{100 * row[name]:.0f} %" if name in row else "" for name in JUDGED)


def tables(found: dict) -> str:
    """Markdown of what `measure` found."""
    rows = [
        ("128 shared prompts, this base", "shared prompts: made"),
        ("128 shared prompts, the probe", "shared prompts: beside"),
        ("1,024 world prompts, this base", "world prompts: made"),
        ("1,024 world prompts, true pictures (ceiling)", "world prompts: true pictures"),
    ]  # fmt: skip
    lines = ["| | own caption nearest of 64 | backdrop colour | count | scene | style |", "| --- " * 6 + "|"]
    lines += [f"| {title} | {percent(found[name])} |" for title, name in rows if name in found]
    lines += ["", "| | this base | the probe |", "| --- | --- | --- |"]
    for title, name, form in (
        ("autoencoder, held-out world pictures, PSNR", "autoencoder psnr", "{:.1f} dB"),
        ("two CPU cores: a picture, 25 guided DDIM steps, batch 4", "seconds a picture", "{:.2f} s"),
        ("two CPU cores: a LoRA step, rank 16, batch 6, float32", "seconds a LoRA step", "{:.2f} s"),
    ):
        values = [
            form.format(found[f"{name}: {who}"]) if f"{name}: {who}" in found else "" for who in ("base", "beside")
        ]
        lines.append(f"| {title} | {values[0]} | {values[1]} |")
    distance = found["frechet"]
    words = "Fréchet distance on the judging CLIP's unit embeddings (times 100, 1,024 against 1,024 pictures)"
    return "\n".join(
        [*lines, "", f"{words}: {distance['made']:.2f}; true pictures: {distance['floor (true pictures)']:.2f}."]
    )


def write_card(measurements: Path, card: Path) -> None:
    """Replace what stands between the marks."""
    text = card.read_text()
    before, _, rest = text.partition(START)
    _, mark, after = rest.partition(END)
    assert mark, f"{card} has no {START} ... {END}"
    card.write_text(f"{before}{START}\n{tables(json.loads(measurements.read_text()))}\n{END}{after}")
