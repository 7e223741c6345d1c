"""What the base is for, measured: the toolkit's default runs on it, and on another base, side by side.

Every concept is drawn once more in views that no run sees, one for each validation prompt, so that a picture has a true
one to be compared with. Both bases get the same photos, prompts, seeds and recipes; only the resolution is each one's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from concepts import STYLES, SUBJECTS, draw_style, draw_subject
from diffusers import UNet2DConditionModel
from judges import Judge
from paint import from_image
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
MORE = {
    "owl": ("noto", "owl", "bird"), "rocket": ("twemoji", "rocket", "aircraft"),
    "mushroom": ("fluent-emoji-flat", "mushroom", "plant"),
}  # fmt: skip
LEFT_OUT = (
    ("red", 0.62, 0.05, 0.0), ("night", 0.55, -0.08, 0.0), ("desert", 0.5, 0.12, 0.0), ("sunset", 0.58, -0.1, 0.0),
    ("blue", 0.5, -0.05, 0.1), ("sky", 0.6, 0.08, 0.0),
)  # fmt: skip
"""Places that both worlds know and that no sample picture shows."""
LEFT_OUT_THINGS = (
    ("dog face", "blue"), ("banana", "white"), ("bus", "desert"), ("rose", "meadow"), ("whale", "under water"),
    ("tiger face", "night"),
)  # fmt: skip
RECIPES = {"DreamBooth-LoRA": "demo", "Textual Inversion": "subject-textual-inversion", "style LoRA": "style-lora"}


@dataclass(frozen=True)
class Run:
    """One concept taught to one base by one recipe, in `folder`."""

    base: Path
    recipe: str
    concept: str
    noun: str
    photos: Path
    left_out: Path
    folder: Path

    @property
    def captions(self) -> list[str]:
        return [path.read_text().strip() for path in sorted(self.left_out.glob("*.txt"))]

    def train(self) -> None:
        """Nothing where the pictures after training are there already."""
        if len(self.pictures(-1)) == len(self.captions):
            return
        size = 8 * UNet2DConditionModel.load_config(self.base / "unet")["sample_size"]
        settings = {
            "base.source": self.base.resolve(), "dataset.folder": self.photos.resolve(),
            "dataset.resolution": size, "output.folder": self.folder.resolve(),
            "validation.prompts": json.dumps(self.captions),
        }  # fmt: skip
        if self.recipe == "DreamBooth-LoRA":
            settings["method.class_prompt"] = f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"
        if self.recipe == "Textual Inversion":
            settings["method.init"] = f"a {self.noun}"
        command = [sys.executable, "-m", "finetune", "train", RECIPES[self.recipe], "--overwrite"]
        command += [f"{key}={value}" for key, value in settings.items()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log").write_text(f"{done.stdout}\n{done.stderr}")
        print(self.folder.name, "done" if not done.returncode else f"failed: {done.stderr[-300:]}", flush=True)

    def pictures(self, when: int) -> list[Path]:
        """Validation pictures of the first (0) or the last (-1) time, in the order of the prompts."""
        times = sorted((self.folder / "samples").glob("step-*"))
        return sorted(times[when].glob("*.png")) if times else []


def draw_concepts(source: Path, folder: Path) -> None:
    """The left-out views of every concept, and the photos of those that `data/concepts` lacks."""
    for name, (set_name, label, noun) in (SUBJECTS | MORE).items():
        if not (folder / "left_out" / name).exists():
            draw_subject(source, folder / "left_out" / name, set_name, label, noun, LEFT_OUT, "left out")
        if name in MORE and not (folder / "photos" / name).exists():
            draw_subject(source, folder / "photos" / name, set_name, label, noun)
    for name, set_name in STYLES.items():
        if not (folder / "left_out" / name).exists():
            draw_style(source, folder / "left_out" / name, set_name, LEFT_OUT_THINGS, "left out")


def plan(folder: Path, bases: dict[str, Path]) -> list[Run]:
    runs, samples = [], ROOT / "data" / "concepts"
    for who, base in bases.items():
        for recipe, file in RECIPES.items():
            subjects = {name: noun for name, (_, _, noun) in (SUBJECTS | MORE).items()}
            concepts = dict.fromkeys(STYLES, "") if recipe == "style LoRA" else subjects
            for name, noun in concepts.items():
                photos = folder / "photos" / name if name in MORE else samples / name
                place = folder / f"{who}-{file}-{name}"
                runs.append(Run(base, recipe, name, noun, photos, folder / "left_out" / name, place))
    return runs


def read(paths: list[Path], judge: Judge) -> Tensor:
    """Unit embeddings of stored pictures, all at the smaller base's 128 px."""
    small = [from_image(Image.open(p).convert("RGB").resize((128, 128), Image.Resampling.BOX)) for p in paths]
    return judge.look(torch.stack(small))[0]


def judged(run: Run, judge: Judge) -> dict[str, float]:
    """Cosines to the left-out photos, and how often a picture's own prompt, by class noun, is the nearest of six."""
    truth = read(sorted(run.left_out.glob("*.png")), judge)
    said = judge.read([c.replace("{} style", "").replace("{} ", "").strip(" ,") for c in run.captions])
    out = {"left-out photos, each other": off_diagonal(truth @ truth.T)}
    for when, name in ((0, "before"), (-1, "after")):
        made = read(run.pictures(when), judge)
        alike = made @ truth.T
        out[f"{name}: all left-out photos"] = alike.mean().item()
        out[f"{name}: the prompt's own"] = alike.diagonal().mean().item()
        out[f"{name}: own prompt of six"] = ((made @ said.T).argmax(1) == torch.arange(len(made))).float().mean().item()
    return out


def off_diagonal(square: Tensor) -> float:
    return ((square.sum() - square.trace()) / (square.numel() - len(square))).item()


def personalise(run_folder: Path, base: Path, beside: Path | None, jobs: int) -> None:
    """Draw, train what is missing, and write `personalised.json` beside the runs' folder."""
    folder = run_folder / "personalised"
    draw_concepts(run_folder / "npm", folder)
    runs = plan(folder, {"base": base} | ({"beside": beside} if beside else {}))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(Run.train, runs))
    judge, found = Judge.load(base), {}
    for run in runs:
        if len(run.pictures(-1)) == len(run.captions):
            rows = found.setdefault(run.folder.name.split("-")[0], {}).setdefault(run.recipe, {})
            rows[run.concept] = judged(run, judge)
    text = json.dumps(found, indent=2)
    folder.with_suffix(".json").write_text(text + "\n")
    for who, recipes in found.items():
        for recipe, concepts in recipes.items():
            means = {k: sum(c[k] for c in concepts.values()) / len(concepts) for k in next(iter(concepts.values()))}
            print(who, recipe, {k: round(v, 3) for k, v in means.items()})
