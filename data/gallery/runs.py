"""The sheets demo, methods, subjects and style .webp: `python data/gallery/runs.py`, about 20 minutes on two CPU cores.

Each picture is of a run's own validation, seeds 0 to 5, none picked. Runs that are in `outputs/gallery` are not made
again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from finetune.grid import make_grid

ROOT = Path(__file__).parent.parent.parent
CONCEPTS, OUTPUTS = ROOT / "data/concepts", ROOT / "outputs/gallery"
TOYS = (
    "a {} toy on a pink background", "a {} toy wearing a top hat", "a {} toy in the snow", "a {} toy under water",
    "a {} toy next to a cupcake", "three {} toys on a white background",
)  # fmt: skip
TOY = f"validation.prompts=[{', '.join(map(repr, TOYS))}]"
RUNS = {
    "demo": ["demo"],
    "textual-inversion": ["subject-textual-inversion"],
    "pivotal": ["subject-pivotal-tuning"],
    "whole": ["subject-dreambooth-whole"],
    "robot": ["demo", f"dataset.folder={CONCEPTS / 'robot'}", "method.class_prompt=a toy", TOY],
    "bear": ["subject-pivotal-tuning", f"dataset.folder={CONCEPTS / 'teddy_bear'}", "method.init=a toy", TOY],
    "style": ["style-lora"],
}
SIZE = 256


def train(name: str) -> None:
    recipe, *changes = RUNS[name]
    folder = OUTPUTS / name
    if not (folder / "README.md").exists():
        command = [sys.executable, "-m", "finetune", "train", recipe, f"output.folder={folder}", "--overwrite"]
        subprocess.run([*command, *changes], cwd=ROOT, check=True)


def pictures(name: str, when: int = -1) -> list[Image.Image]:
    """Of the first (0) or the last (-1) validation."""
    return [Image.open(path) for path in sorted(sorted((OUTPUTS / name / "samples").iterdir())[when].glob("*.png"))]


def photos(concept: str) -> list[Image.Image]:
    return [Image.open(path) for path in sorted((CONCEPTS / concept).glob("*.png"))[:6]]


def prompts(name: str) -> list[str]:
    from finetune.recipe import load

    recipe, *changes = RUNS[name]
    return [prompt.replace("{}", "...") for prompt in load(recipe, changes).validation.prompts]


def size(name: str) -> str:
    """Of what a run exported."""
    num_bytes = sum(path.stat().st_size for path in (OUTPUTS / name).glob("*.safetensors"))
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes > 1e6 else f"{num_bytes / 1e3:.3g} kB"


def sheets() -> dict[str, tuple[dict[str, list[Image.Image]], list[str]]]:
    return {
        "demo": (
            {
                "the fox's pictures": photos("fox"),
                "before": pictures("demo", 0),
                f"after 120 steps, {size('demo')}": pictures("demo"),
            },
            prompts("demo"),
        ),
        "methods": (
            {
                f"Textual Inversion, {size('textual-inversion')}": pictures("textual-inversion"),
                f"pivotal tuning, {size('pivotal')}": pictures("pivotal"),
                f"DreamBooth of the whole denoiser, exported at rank 32, {size('whole')}": pictures("whole"),
            },
            prompts("pivotal"),
        ),
        "subjects": (
            {
                "the robot's pictures": photos("robot"),
                f"DreamBooth-LoRA, {size('robot')}": pictures("robot"),
                "the bear's pictures": photos("teddy_bear"),
                f"pivotal tuning, {size('bear')}": pictures("bear"),
            },
            prompts("bear"),
        ),
        "style": (
            {
                "six of the style's pictures": photos("fluent_3d"),
                "before": pictures("style", 0),
                f"LoRA, {size('style')}": pictures("style"),
            },
            prompts("style"),
        ),
    }


if __name__ == "__main__":
    for name in RUNS:
        train(name)
    for name, (rows, captions) in sheets().items():
        make_grid(rows, captions, SIZE).save(ROOT / f"data/gallery/{name}.webp", quality=80, method=6)
