"""The commands. Heavy imports happen inside them, so that help and mistakes answer at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune import __version__
from finetune.errors import UserError
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


def main() -> None:
    """Run a command; what the user can mend is printed without a traceback, with status 2."""
    quiet()
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # no right, no room, no such name: the user's to mend, whichever library met it
        print(f"error: {error}", file=sys.stderr)
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
    loaded = _load(recipe, overrides)
    from finetune import run

    at_work = run.prepare(loaded, resume=resume, overwrite=overwrite)
    if at_work.is_main:
        _print_plan(loaded, at_work.pictures, at_work.describe_machine())
        for text in at_work.warnings():
            print(f"warning: {text}")
    try:
        at_work.loop()
    except run.Stopped:
        print(f"stopped after step {at_work.trainer.step}; --resume goes on from there", file=sys.stderr)
        sys.exit(130)
    if not at_work.is_main:
        return
    result = at_work.finish()
    print(f"reloaded into a fresh pipeline: {result.verdict.error:.2%} off what was learnt")
    for file in result.files:
        print(f"{file}  ({_describe(file)})")
    print(*filter(None, [result.grid, result.card]), sep="\n")


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA, an embedding or a run's folder; `path=0.8` sets its weight."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base; default: that of the first adapter.")] = None,
    revision: Annotated[str | None, typer.Option(help="The base's revision on the Hub.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i has the seed `seed + i`.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures for each prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=1.0)] = 7.5,
    size: Annotated[int | None, typer.Option(min=8, help="Pixels; default: the base's own.")] = None,
    output: Annotated[Path, typer.Option(help="A folder, made if it does not exist.")] = Path("outputs/pictures"),
) -> None:
    """Make pictures with any mix of adapters."""
    from finetune.generate import generate_files
    from finetune.load import Adapter

    paths = generate_files(
        [text for text in prompt for _ in range(count)],
        [Adapter.parse(text) for text in adapter or []],
        base=base,
        revision=revision,
        seed=seed,
        steps=steps,
        guidance=guidance,
        size=size,
        folder=output,
    )
    print("\n".join(map(str, paths)))


@app.command("list")
def list_() -> None:
    """Recipes, methods and families."""
    from finetune.methods.base import methods
    from finetune.recipe import RECIPES, known_families

    rows: dict[str, dict[str, str]] = {
        "recipes": {path.stem: _headline(path) for path in sorted(RECIPES.glob("*.yaml"))},
        "methods": {name: methods[name].summary for name in methods.names()},
        "families": known_families(),
    }
    for title, entries in rows.items():
        width = max(map(len, entries), default=0)
        print(title, *(f"  {name:{width}}  {text}".rstrip() for name, text in entries.items()), sep="\n")


@app.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """A recipe with everything resolved, defaults included."""
    print(_load(recipe, overrides).to_yaml(), end="")


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """The recipe and its pictures, before any model is loaded."""
    loaded = _load(recipe, overrides)
    from finetune.plan import check

    _print_plan(loaded, check(loaded))


@app.command()
def bench(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Files or names.")],
    steps: Annotated[int, typer.Option(min=1, help="Counted updates of each.")] = 20,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Time recipes on this machine: steps, pictures, memory."""
    loaded = [_load(name, []) for name in recipes]
    import json
    from dataclasses import asdict

    from finetune import bench

    timings = [bench.measure(recipe, steps) for recipe in loaded]
    print(", ".join(f"{name} {value}" for name, value in bench.machine().items()), bench.table(timings), sep="\n")
    if output is not None:
        figures = {"machine": bench.machine(), "timings": [asdict(timing) for timing in timings]}
        output.write_text(json.dumps(figures, indent=2))


@app.command()
def version() -> None:
    """The version of this program."""
    print(__version__)


def _load(recipe: str, overrides: list[str] | None) -> Any:
    from finetune.recipe import load

    return load(recipe, overrides or [])


def _print_plan(recipe: Any, pictures: Any, machine: str | None = None) -> None:
    from finetune.plan import plan

    lines = plan(recipe, pictures) | ({"machine": machine} if machine else {})
    for title, text in lines.items():
        print(f"{title:10}{text}")


def _describe(file: Path) -> str:
    """Its size and, where a file holds less than was trained, how much it kept."""
    from finetune.load import read_header

    header = read_header(file)[1]
    kept = [
        f"{float(share):.1%} of the change of {name.removeprefix('energy_kept.')}"
        for name, share in header.items()
        if name.startswith("energy_kept.")
    ]
    return ", ".join([f"{file.stat().st_size / 1000:,.1f} kB", *kept])


def _headline(path: Path) -> str:
    """A recipe's first comment."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
