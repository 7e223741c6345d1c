"""The commands. Heavy imports happen inside them, so that help and mistakes answer at once."""

from __future__ import annotations

import shlex
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune import __version__
from finetune.errors import UserError, one_line
from finetune.quiet import quiet

app = typer.Typer(
    name="finetune",
    help="Teach a text-to-image model a person, a thing or a style from a few pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name that `finetune list` shows.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help="Settings that replace the recipe's.")
]
AdapterFile = Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA or an embedding.")]
OutputFile = Annotated[Path | None, typer.Option("--output", help="Default: beside what is read.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing file.")]
Rank = Annotated[int | None, typer.Option(min=1, help="The rank of every layer.")]
Energy = Annotated[float | None, typer.Option(help="Or the share of each layer's squared update to keep, to 1.")]


def main() -> None:
    """Run a command; what the user can mend is printed without a traceback, with status 2."""
    quiet()
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be text, and a terminal need not know UTF-8
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # no right, no room, no such name: the user's to mend, whichever library met it
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in the same folder.")] = False,
) -> None:
    """Train, export, and prove that the exported files hold what was learnt."""
    from finetune.headstart import head_start, hidden, unused

    loaded = _load(recipe, overrides)
    with hidden(unused(loaded)):
        with head_start(loaded.base):
            from finetune import run
            from finetune.session import carry_out

        try:
            carry_out(loaded, resume=resume, overwrite=overwrite)
        except run.Stopped as stopped:
            if str(stopped):  # one process of several speaks for all
                print(stopped, file=sys.stderr)
            sys.exit(130)


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts; for an edit, instructions.")],
    adapter: Annotated[list[str] | None, typer.Option(help="A LoRA, embedding or run; `path=0.8` weighs it.")] = None,
    base: Annotated[str | None, typer.Option(help="The base; default: that of the first adapter.")] = None,
    revision: Annotated[str | None, typer.Option(help="The base's revision on the Hub.")] = None,
    config: Annotated[str | None, typer.Option(help="Of a base in one file: where its configs are.")] = None,
    task: Annotated[str | None, typer.Option(help="Default: the one that the inputs are for.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to change, edit or grow.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where the picture is painted anew.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of the picture is given up, to 1.")] = None,
    extend: Annotated[str | None, typer.Option(help="Pixels to grow by: left=64,right=64.")] = None,
    control: Annotated[list[Path] | None, typer.Option(help="Edges, a pose or depths, for a ControlNet.")] = None,
    control_from: Annotated[list[Path] | None, typer.Option(help="A picture whose edges are followed.")] = None,
    controlnet: Annotated[list[str] | None, typer.Option(help="A ControlNet; `name=0.5` sets its scale.")] = None,
    editor: Annotated[str | None, typer.Option(help="An InstructPix2Pix model.")] = None,
    image_guidance: Annotated[float | None, typer.Option(help="How closely an edit keeps to the picture.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i has the seed `seed + i`.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures for each prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 25,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Default: the base's own.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels, 512 or 768x512; default: the base's own.")] = None,
    output: Annotated[Path, typer.Option(help="A folder, made if it does not exist.")] = Path("outputs/pictures"),
) -> None:
    """Make pictures with any mix of adapters: from prompts, pictures, masks, maps and instructions."""
    from finetune.headstart import importing

    with importing():
        from finetune.canvas import Margins, parse_size
        from finetune.generate import generate_files
        from finetune.load import Adapter
        from finetune.tasks import Inputs

    prompts = [text for text in prompt for _ in range(count)]
    adapters = [Adapter.parse(text) for text in adapter or []]
    grown, pixels = extend and Margins.parse(extend), size and parse_size(size)
    maps, drawings, networks = tuple(control or ()), tuple(control_from or ()), tuple(controlnet or ())
    inputs = Inputs(image, mask, strength, grown or None, maps, drawings, networks, editor, image_guidance)
    source = {"base": base, "revision": revision, "config": config}
    sampling = {"seed": seed, "steps": steps, "guidance": guidance, "size": pixels or None}
    paths = generate_files(prompts, adapters, inputs, task=task, folder=output, **source, **sampling)
    print("\n".join(map(str, paths)))


@app.command()
def evaluate(
    adapters: Annotated[list[str], typer.Argument(metavar="RUN_OR_ADAPTER[=WEIGHT]...", help="Folders or files.")],
    photos: Annotated[Path | None, typer.Option(help="A folder of photos that were not trained on.")] = None,
    base: Annotated[str | None, typer.Option(help="Of an adapter: what it is for. Default: what it says.")] = None,
    class_prompt: Annotated[str | None, typer.Option(help="What it is one of: 'a dog'. A run says it itself.")] = None,
    subject: Annotated[str | None, typer.Option(help="What it is called in a prompt: 'a sks dog'.")] = None,
    prompts: Annotated[str | None, typer.Option(help="objects, living, styles, embedded ..., or a text file.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 2,
    encoder: Annotated[list[str] | None, typer.Option(help="A CLIP or DINO: a folder, or a model of the Hub.")] = None,
    weights: Annotated[str, typer.Option(help="To find the best of; '' for none.")] = "0.4 0.6 0.8 1.0 1.2",
    steps: Annotated[int | None, typer.Option(min=1, help="Of the sampler. Default: as the run shows it.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Default: as the run shows it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Default: `evaluation` in the run's folder.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier evaluation.")] = False,
) -> None:
    """Measure runs: identity, prompt following, drift, diversity, copying, and the best weight."""
    from finetune.headstart import importing

    with importing():
        from finetune.evaluation.concept import Given
        from finetune.evaluation.evaluate import Settings, evaluate, parse_weights
        from finetune.evaluation.studio import Size
        from finetune.evaluation.words import compare, report
        from finetune.report import show

    given, size = Given(photos, base, class_prompt, subject), Size(seeds, weights=parse_weights(weights))
    settings = Settings(prompts, tuple(encoder or ()), size, steps, guidance, output, overwrite)
    found = evaluate(adapters, given, settings)
    print(*(line for each in found for line in report(each)), *(compare(found) if found[1:] else []), sep="\n")
    for folder in (Path(each.folder).parent for each in found):
        if (folder / "report.html").exists():  # which a run has, and shows what was found from now on
            show(folder)


@app.command()
def report(runs: list[Path], output: OutputFile = None) -> None:
    """Show a run as a page, RUN/report.html, or compare several on one, ./report.html."""
    from finetune.report import write_report

    print(write_report(runs, output))


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="A YAML file, such as data/studies/defaults.yaml.")],
    only: Annotated[list[str] | None, typer.Option(help="A comparison of it; may stand several times.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
) -> None:
    """Compare settings: teach the same concepts by several recipes, and judge them alike. Goes on where it was."""
    from finetune.stopping import Stopped
    from finetune.study.study import run_study

    try:
        print(run_study(file, only=only or (), jobs=jobs))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    target: Annotated[str, typer.Argument(help="A repository of the Hub, or a new folder such as ./to-share.")],
    public: Annotated[bool, typer.Option(help="Let everybody see the repository.")] = False,
    with_training_pictures: Annotated[bool, typer.Option(help="Also push grid.png, which shows them.")] = False,
) -> None:
    """Share a run: its adapters, card, recipe and last pictures, without local paths."""
    from finetune import push

    pushed = push.push(run, target, public=public, with_training_pictures=with_training_pictures)
    print(*pushed.files, *(f"note: {note}" for note in pushed.notes), f"pushed to {pushed.where}", sep="\n")


@app.command("list")
def list_() -> None:
    """Recipes, methods, families, tasks and formats."""
    from finetune.methods.base import methods
    from finetune.recipe import RECIPES, known_families
    from finetune.registry import headlines

    rows: dict[str, dict[str, str]] = {
        "recipes": {path.stem: _headline(path) for path in sorted(RECIPES.glob("*.yaml"))},
        "methods": {name: methods[name].summary for name in methods.names()},
        "families": known_families(),
        "tasks": headlines("finetune.tasks"),
        "formats": headlines("finetune.formats"),
    }
    for title, entries in rows.items():
        width = max(map(len, entries), default=0)
        print(title, *(f"  {name:{width}}  {text}".rstrip() for name, text in entries.items()), sep="\n")


@app.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """A recipe with everything resolved, defaults included."""
    print(_load(recipe, overrides).to_yaml(), end="")


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    memory: Annotated[bool, typer.Option("--memory", help="And the GPU memory and the time that it needs.")] = False,
    card: Annotated[float | None, typer.Option(min=1, help="And how a GPU of so many GiB is enough.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs: one object.")] = False,
) -> None:
    """The recipe and its pictures, before any model is loaded; status 1 with warnings, 2 with errors."""
    from json import dumps

    from finetune.plan import failure, survey

    try:
        report = survey(loaded := _load(recipe, overrides))
        shown = {"lines": report.lines(), "json": report.as_dict()}
        if memory or card is not None:
            from finetune.needs import needs

            captions = [text for picture in report.pictures for text in picture.captions]
            lines, found = needs(loaded, captions, report.forecast, card)
            shown = {"lines": shown["lines"] + lines, "json": shown["json"] | found}
    except (UserError, OSError) as error:
        if json:
            print(dumps(failure(error), indent=2))
        raise
    print(dumps(shown["json"], indent=2) if json else "\n".join(map(one_line, shown["lines"])))
    if report.status:
        sys.exit(report.status)


@app.command()
def bench(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Files or names.")],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="'KEY=VALUE ...'", help="Time each with this; once for each --set."),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="With bases made of their configs alone.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Counted updates of each.")] = 20,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="COMMAND", help="Also time another program: its command, with {steps} and {folder}."),
    ] = None,
    command: Annotated[bool, typer.Option("--command", help="Also time each as a whole, to the adapter.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Time recipes on this machine: steps, pictures, memory."""
    if command and random:
        raise UserError("--command: a run compares its adapter with the base on the disk, and --random has none there.")
    loaded = [(_load(name, shlex.split(text)), text) for name in recipes for text in change or [""]]
    import json
    from dataclasses import asdict

    from finetune import bench
    from finetune.processes import is_main

    timings = [bench.measure(recipe, steps, text, random=random, command=command) for recipe, text in loaded]
    if not is_main():
        return
    timings += [bench.measure_peer(command, steps) for command in peer or []]
    print(", ".join(f"{name} {value}" for name, value in bench.machine().items()), bench.table(timings), sep="\n")
    if output is not None:
        figures = {"machine": bench.machine(), "timings": [asdict(timing) for timing in timings]}
        output.write_text(json.dumps(figures, indent=2))


@app.command()
def convert(
    file: AdapterFile,
    to: Annotated[str, typer.Option(help="diffusers, kohya, embedding, embedding_a1111 or embedding_comfyui.")],
    output: OutputFile = None,
    architecture: Annotated[str | None, typer.Option(help="Default: found. sd1, sdxl, flux ...")] = None,
    allow_pickle: Annotated[bool, typer.Option(help="Also read .pt and .ckpt, which may be unsafe.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter as another program reads it: ComfyUI, A1111, kohya, diffusers."""
    from finetune.convert import convert

    lines = convert(file, to, output=output, architecture=architecture, allow_pickle=allow_pickle, overwrite=overwrite)
    print(*lines, sep="\n")


@app.command()
def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="Files or runs' folders.")],
    output: Annotated[Path, typer.Option(help="A file; with --base, a folder.")],
    base: Annotated[str | None, typer.Option(help="Merge into this base, and write a full pipeline.")] = None,
    config: Annotated[str | None, typer.Option(help="Of a base in one file: where its configs are.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Keep the best of this rank. Default: all, exactly.")] = None,
    to: Annotated[str, typer.Option(help="The file's format: diffusers or kohya.")] = "diffusers",
    overwrite: Overwrite = False,
) -> None:
    """Fold adapters into one another, or into a base."""
    from finetune.load import Adapter
    from finetune.merge import merge, merge_into_base

    given = [Adapter.parse(text) for text in adapters]
    if base is not None and (rank is not None or to != "diffusers"):
        raise UserError("--rank and --to are for a file, and --base writes a full pipeline. Leave them out.")
    lines = (
        merge(given, output, rank=rank, to=to, overwrite=overwrite)
        if base is None
        else merge_into_base(given, base, output, config=config, overwrite=overwrite)
    )
    print(*lines, sep="\n")


@app.command()
def resize(
    file: AdapterFile, rank: Rank = None, energy: Energy = None, output: OutputFile = None, overwrite: Overwrite = False
) -> None:
    """Give a LoRA a lower rank, and say how much it keeps."""
    from finetune.resize import resize

    print(*resize(file, rank=rank, energy=energy, output=output, overwrite=overwrite), sep="\n")


@app.command()
def extract(
    tuned: Annotated[Path, typer.Argument(help="A full checkpoint: a folder in diffusers' layout, or one file.")],
    base: Annotated[Path, typer.Argument(help="What it was trained from.")],
    output: Annotated[Path, typer.Option(help="The small file.")],
    rank: Rank = None,
    energy: Energy = None,
    to: Annotated[str, typer.Option(help="The file's format: diffusers or kohya.")] = "diffusers",
    overwrite: Overwrite = False,
) -> None:
    """Take what was learnt out of a full checkpoint, as a LoRA."""
    from finetune.extract import extract

    print(*extract(tuned, base, output, rank=rank, energy=energy, to=to, overwrite=overwrite), sep="\n")


@app.command()
def inspect(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Adapters, checkpoints or folders.")],
    json: Annotated[bool, typer.Option("--json", help="For programs: a list with an entry for each file.")] = False,
) -> None:
    """Say what a file is and how it is used."""
    from json import dumps

    from finetune.inspection import as_lines, inspect

    found = [inspect(file) for file in files]
    print(dumps(found, indent=2) if json else "\n\n".join("\n".join(as_lines(entry)) for entry in found))


@app.command()
def version() -> None:
    """The version of this program."""
    print(__version__)


def _load(recipe: str, overrides: list[str] | None) -> Any:
    from finetune.recipe import load

    return load(recipe, overrides or [])


def _headline(path: Path) -> str:
    """A recipe's first comment."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
