"""Make the embedded base model: `python data/base/build STAGE`.

    sprites    fetch the emoji sets from npm and render them to a pack          (CPU, a minute)
    train      draw the world and train CLIP, autoencoder and denoiser          (GPU, about 22 minutes on two H200)
    export     write the pipeline and the evaluation towers into data/base      (CPU)
    refine     train the denoiser on, then a ControlNet and an InstructPix2Pix   (GPU, about 15 minutes on one H200)
    samples    paint the model card's picture                                   (CPU, a minute)
    paint      make the pictures that measure judges                                    (GPU, a minute)
    measure    judge the pipeline, and another one beside it                    (CPU or GPU)
    personalise  teach both bases the sample concepts and three more, and judge them    (GPU, minutes)
    card       put the measured numbers into the model card                     (CPU, at once)
    concepts   draw the sample concepts into data/concepts                      (CPU)
    studied    draw the concepts of the studies into data/studies/concepts      (CPU)
    shown      judge true pictures of their subjects into data/studies/shown.csv (CPU, minutes)
    all        everything, in this order; a finished stage is skipped

`--smoke` runs train, export and measure at toy size on toy sprites: two CPU cores, under a minute, no network.
"""

from __future__ import annotations

import argparse
import importlib
import time
from dataclasses import fields, replace
from pathlib import Path

from settings import Settings, smoke

BASE = Path(__file__).resolve().parents[1]
STAGES = (
    "sprites", "train", "export", "refine", "samples", "paint", "measure", "personalise", "card", "concepts", "studied",
    "shown", "all",
)  # fmt: skip
NOT_SMOKED = ("sprites", "samples", "personalise", "card", "concepts", "studied", "shown")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data/base/build", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--smoke", action="store_true", help="toy sizes and toy sprites")
    parser.add_argument("--eager", action="store_true", help="refine: compile nothing, paint a few at a time")
    parser.add_argument("--folder", type=Path, default=Path("outputs/base"), help="checkpoints, logs, the sprite pack")
    parser.add_argument("--target", type=Path, default=BASE, help="where export writes, and measure reads")
    parser.add_argument("--beside", type=Path, default=None, help="measure: another pipeline folder to judge as well")
    parser.add_argument("--beside-world", type=Path, default=None, help="measure: pictures of that one's own world")
    parser.add_argument("--jobs", type=int, default=1, help="personalise: runs at a time")
    parser.add_argument("--prompts", type=int, default=None, help="measure: how many prompts")
    for setting in fields(Settings):
        if setting.type in ("float", "int"):
            flag = "--" + setting.name.replace("_", "-")
            parser.add_argument(flag, type=float if setting.type == "float" else int, default=None)
    return parser.parse_args()


def read_settings(args: argparse.Namespace) -> Settings:
    settings = Settings(args.folder)
    if args.smoke:
        settings = smoke(settings)
    if args.eager:
        settings = replace(settings, compile=False)
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    return replace(settings, **{name: value for name, value in given.items() if name != "folder"})


def main() -> None:
    args, start = parse(), time.time()
    chosen = STAGES[:-1] if args.stage == "all" else (args.stage,)
    for stage, (module, function, *arguments) in plan(args, start).items():
        if stage in chosen and not (args.smoke and stage in NOT_SMOKED):
            getattr(importlib.import_module(module), function)(*arguments)


def plan(args: argparse.Namespace, start: float) -> dict[str, tuple]:
    """Stage -> module, function and arguments; a module is imported when its turn comes."""
    settings, target, run = read_settings(args), args.target, args.folder
    pack = None if args.smoke else run / "pack"
    judged = (pack, settings, target, args.beside, args.beside_world, args.prompts or settings.num_judged)
    return {
        "sprites": ("sprites", "make_pack", run / "npm", run / "pack"),
        "train": ("build", "train", pack, settings, start),
        "export": ("export", "export", settings, target),
        "refine": ("refine", "refine", pack, settings, start, target),
        "samples": ("samples", "paint_samples", target),
        "paint": ("measure", "paint", *judged),
        "measure": ("measure", "measure", *judged),
        "personalise": ("personalise", "personalise", run, target, args.beside, args.jobs),
        "card": ("card", "write_card", run, target / "README.md"),
        "concepts": ("concepts", "write_concepts", run / "npm", BASE.parent / "concepts"),
        "studied": ("concepts", "write_studied", run / "npm", BASE.parent / "studies" / "concepts"),
        "shown": ("shown", "measure_shown", run / "npm", target, BASE.parent / "studies" / "defaults.yaml"),
    }


if __name__ == "__main__":
    main()
