"""What a run left in its folder, as far as it is there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from finetune.config import build, read_tree
from finetune.dataset import DatasetConfig, Picture, scan, split
from finetune.errors import UserError, brief, reason
from finetune.evaluation.files import RESULT
from finetune.evaluation.result import Evaluation
from finetune.export import PIPELINE_FOLDER
from finetune.files import read_bytes, read_shapes
from finetune.folder import EVALUATION, RECIPE_FILE, REPORT_FILE, SAMPLES
from finetune.tracking import METRICS_FILE

LARGEST = 2**30  # bytes of a file of numbers
MOST = 1e30  # of a number
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """One run. `gaps` says for each part that is not there, by its name, why."""

    name: str  # tells it from the others of a report
    folder: Path
    recipe: str  # as its file has it
    settings: dict[str, Any]  # by `section.key`
    pictures: tuple[Picture, ...]
    held_out: frozenset[str]  # the paths of those pictures that were not trained on
    lines: tuple[dict[str, Any], ...]  # of the metrics, in the order of steps
    samples: dict[int, dict[int, Path]]  # by step, and by the prompt's number
    kept: int | None  # the step whose weights were exported
    evaluation: Evaluation | None
    sizes: dict[str, int]  # bytes of the files, and of folders in sum
    gaps: dict[str, str]

    @property
    def prompts(self) -> list[str]:
        given = self.settings.get("validation.prompts") or []
        return [self.fill(prompt) for prompt in given] if isinstance(given, list) else []

    def fill(self, text: object) -> str:
        return str(text).replace("{}", str(self.settings.get("placeholder", "{}")))

    def curve(self, name: str) -> Points:
        """(step, value) of one of the metrics where it is a number."""
        return [(line["step"], line[name]) for line in self.lines if _is_number(line.get(name))]

    def newest(self, name: str) -> float | None:
        """The newest value of one of the metrics."""
        found = self.curve(name)
        return found[-1][1] if found else None

    def trade_off(self) -> list[tuple[int, float, float]]:
        """(step, prompt following, identity) of each step that was scored."""
        identity = dict(self.curve("validation_score/identity"))
        return [
            (int(step), prompt, identity[step])
            for step, prompt in self.curve("validation_score/prompt")
            if step in identity
        ]

    @property
    def last(self) -> int:
        """The last step that left anything."""
        return max([*self.samples, *(line["step"] for line in self.lines)], default=0)

    @property
    def exported(self) -> int | None:
        """Bytes of what the run made to be used."""
        made = (name for name in self.sizes if name.endswith(".safetensors") or name == f"{PIPELINE_FOLDER}/")
        return sum(self.sizes[name] for name in made) or None


def read(folders: Sequence[Path]) -> list[Run]:
    """Raises: UserError, with every folder that is no run, or holds nothing to show."""
    runs, problems = [], []
    for folder, name in zip(folders, _names(folders), strict=True):
        try:
            runs.append(_read(folder, name))
        except UserError as error:
            problems += error.problems
    if len({folder.resolve() for folder in folders}) < len(folders):
        problems.append("RUNS: a folder is named twice. Leave one out.")
    if problems:
        raise UserError(problems)
    return runs


def _read(folder: Path, name: str) -> Run:
    if not (folder / RECIPE_FILE).is_file():
        what = "holds no recipe.yaml" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {what}, so it is no run. Name the output.folder of one.")
    tree = read_tree(folder / RECIPE_FILE)
    gaps: dict[str, str] = {}
    pictures, held_out = _pictures(tree, gaps)
    run = Run(
        name=name,
        folder=folder,
        recipe=read_bytes(folder / RECIPE_FILE, LARGEST).decode(),
        settings=_flat(tree),
        pictures=pictures,
        held_out=held_out,
        lines=_lines(folder / METRICS_FILE),
        samples=_samples(folder / SAMPLES),
        kept=_kept(folder),
        evaluation=_evaluation(folder / EVALUATION / RESULT, gaps),
        sizes=_sizes(folder),
        gaps=gaps,
    )
    if not (run.lines or run.samples or run.evaluation):
        raise UserError(
            f"{folder} has no metrics, samples or evaluation yet, so there is nothing to show. Train first."
        )
    return run


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder by its last parts, as few as tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=1)):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder.resolve()) for folder in folders]


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _pictures(tree: dict[str, Any], gaps: dict[str, str]) -> tuple[tuple[Picture, ...], frozenset[str]]:
    """All of them, and the paths of those that are held out."""
    try:
        section = tree.get("dataset")
        config = build(DatasetConfig, section if isinstance(section, dict) else {})
        pictures = scan(config)
        return tuple(pictures), frozenset(picture.path for picture in split(pictures, config.held_out)[1])
    except UserError as error:
        more = f" (and {len(error.problems) - 1} more)" if error.problems[1:] else ""
        gaps["data"] = f"The pictures cannot be shown any more: {error.problems[0]}{more}"
        return (), frozenset()


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    """One for each step, from one or more of the file's; a run that was killed may have left half of one."""
    try:
        text = read_bytes(path, LARGEST).decode(errors="replace")
    except (OSError, ValueError):
        return ()
    found: dict[int, dict[str, Any]] = {}
    for row in text.splitlines():
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            found.setdefault(line["step"], {}).update(line)
    return tuple(found[step] for step in sorted(found))


def _samples(folder: Path) -> dict[int, dict[int, Path]]:
    """Files such as `step-000040/02-a-prompt.png`."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("step-*/*.png")):
        step, number = re.fullmatch(r"step-(\d+)", path.parent.name), re.match(r"(\d+)-", path.name)
        if step and number:
            found.setdefault(int(step[1]), {})[int(number[1])] = path
    return dict(sorted(found.items()))


def _evaluation(path: Path, gaps: dict[str, str]) -> Evaluation | None:
    if not path.is_file():
        gaps["evaluation"] = "This run was not evaluated yet: finetune evaluate RUN does it."
        return None
    try:
        return TypeAdapter(Evaluation).validate_json(read_bytes(path, LARGEST))
    except (OSError, ValidationError, ValueError) as error:
        why = brief(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else reason(error)
        gaps["evaluation"] = (
            f"{path} is not what this version writes ({why}). Do it again: finetune evaluate RUN --overwrite."
        )
        return None


def _kept(folder: Path) -> int | None:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            steps = read_shapes(path)[1].get("steps", "")
        except (UserError, OSError):
            continue
        if steps.isdecimal():
            return int(steps)
    return None


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.name + ("/" if path.is_dir() else ""): sum(
            file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()
        )
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.name != REPORT_FILE
    }


def _is_number(value: object) -> bool:
    """One that a chart can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST < value < MOST
