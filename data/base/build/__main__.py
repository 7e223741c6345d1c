"""Make the embedded base model: `python data/base/build STAGE`.

    sprites    fetch the emoji sets from npm and render them to a pack          (CPU, a minute)
    train      draw the world and train CLIP, autoencoder and denoiser          (GPU, about 22 minutes on two H200)
    export     write the pipeline and the evaluation towers into data/base      (CPU)
    samples    paint the model card's picture                                   (CPU, a minute)
    measure    judge the pipeline, and another one beside it                    (CPU or GPU)
    card       put the measured numbers into the model card                     (CPU, at once)
    concepts   draw the sample concepts into data/concepts                      (CPU)
    all        everything, in this order; a finished stage is skipped

`--smoke` runs train, export and measure at toy size on toy sprites: two CPU cores, under a minute, no network.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields, replace
from pathlib import Path

from settings import Settings, smoke

BASE = Path(__file__).resolve().parents[1]
STAGES = ("sprites", "train", "export", "samples", "measure", "card", "concepts", "all")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data/base/build", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--smoke", action="store_true", help="toy sizes and toy sprites")
    parser.add_argument("--folder", type=Path, default=Path("outputs/base"), help="checkpoints, logs, the sprite pack")
    parser.add_argument("--target", type=Path, default=BASE, help="where export writes, and measure reads")
    parser.add_argument("--beside", type=Path, default=None, help="measure: another pipeline folder to judge as well")
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
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    return replace(settings, **{name: value for name, value in given.items() if name != "folder"})


def main() -> None:
    args, start = parse(), time.time()
    settings, pack, source = read_settings(args), args.folder / "pack", args.folder / "npm"
    stages = [s for s in STAGES[:-1] if args.stage in (s, "all")]
    if args.smoke:
        stages = [s for s in stages if s not in ("sprites", "samples", "card", "concepts")]
    if "sprites" in stages and not (pack / "index.json").exists():
        from sprites import build_pack, fetch_all

        fetch_all(source)
        build_pack(source, pack)
    if "train" in stages:
        from build import train

        train(None if args.smoke else pack, settings, start)
    if "export" in stages:
        from export import export

        export(settings, args.target)
    if "samples" in stages:
        from samples import paint_samples

        paint_samples(args.target)
    if "measure" in stages:
        from measure import measure

        measure(None if args.smoke else pack, settings, args.target, args.beside, args.prompts or settings.num_judged)
    if "card" in stages:
        from card import write_card

        write_card(args.folder / "measurements.json", args.target / "README.md")
    if "concepts" in stages:
        from concepts import write_concepts

        write_concepts(source, BASE.parent / "concepts")


if __name__ == "__main__":
    main()
