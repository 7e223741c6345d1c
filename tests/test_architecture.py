"""The house's layering, held on the syntax tree: each room imports only the rooms beneath it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "finetune"
LEAVES = {"errors", "quiet"}
MAY_IMPORT = {
    "config": {"files"},
    "registry": set(),
    "objectives": set(),
    "tracking": set(),
    "stopping": set(),
    "checkpoint": {"files"},
    "folder": {"checkpoint", "config", "dataset", "export", "files", "recipe"},
    "shortage": {"recipe"},
    "base": {"detection", "families", "quantize", "recipe", "render", "shortage", "skeleton"},
    "grid": set(),
    "dataset": {"config", "files"},
    "fingerprint": set(),
    "families": {"exact", "files", "fingerprint", "objectives", "parts", "placeholder", "recall", "registry"},
    "parts": set(),
    "recall": set(),
    "shares": {"dataset", "schedule"},
    "assemble": {
        "batch",
        "dataset",
        "families",
        "prior",
        "recipe",
        "recomputing",
        "samples",
        "schedule",
        "shares",
        "shortage",
        "trainer",
        "validation",
    },
    "detection": {"families", "hub"},
    "hub": set(),
    "cache": set(),
    "batch": {"cache", "dataset", "families", "objectives"},
    "student": {"batch", "families", "fused", "methods"},
    "capture": set(),
    "replay": {"capture"},
    "processes": set(),
    "recomputing": set(),
    "lowrank": set(),
    "fused": {"packed"},
    "packed": set(),
    "gpu": {"exact"},
    "variants": {"adapter", "fused", "lowrank"},
    "placeholder": set(),
    "vocabulary": {"adapter", "families", "formats", "placeholder"},
    "exact": set(),
    "export": {"adapter", "batch", "families", "files", "lowrank", "originals", "student", "vocabulary"},
    "load": {"adapter", "formats", "placeholder", "shortage"},
    "files": set(),
    "lycoris": set(),
    "adapter": {"files", "lycoris"},
    "architectures": {"adapter"},
    "originals": {"adapter"},
    "single_file": {"originals"},
    "formats": {"adapter", "architectures", "files", "originals", "registry"},
    "listing": {"families", "recipe", "registry", "tasks"},
    "convert": {"adapter", "architectures", "formats"},
    "resize": {"adapter", "files", "formats", "lowrank"},
    "merge": {"adapter", "families", "files", "formats", "generate", "load", "resize"},
    "extract": {
        "adapter",
        "architectures",
        "files",
        "formats",
        "inspection",
        "lowrank",
        "originals",
        "resize",
        "single_file",
    },
    "inspection": {"adapter", "architectures", "files", "formats"},
    "companions": set(),
    "edges": set(),
    "canvas": {"dataset"},
    "tasks": {"canvas", "companions", "edges", "hub", "registry"},
    "render": {"placeholder", "replay"},
    "generate": {"adapter", "canvas", "detection", "families", "files", "formats", "load", "render", "tasks"},
    "float8": {"gpu", "packed"},
    "nf4": {"gpu", "packed"},
    "quantize": {"families", "float8", "nf4"},
    "schedule": {"config", "student"},
    "methods": {
        "batch",
        "config",
        "export",
        "families",
        "lowrank",
        "objectives",
        "registry",
        "student",
        "variants",
        "vocabulary",
    },
    "needs": {"duration", "forecast", "memory", "recipe", "shortage"},
    "judging": {"dataset", "evaluation", "recipe", "validation"},
    "cost": set(),
    "trainer": {
        "batch",
        "capture",
        "cost",
        "dataset",
        "gpu",
        "processes",
        "recomputing",
        "schedule",
        "shares",
        "stopping",
        "student",
        "validation",
    },
    "validation": {"batch", "dataset", "evaluation", "recipe", "student"},
    "samples": {"dataset", "families", "files", "folder", "grid", "recipe", "render"},
    "delivery": {
        "architectures",
        "base",
        "export",
        "families",
        "load",
        "recipe",
        "shortage",
        "stopping",
        "trainer",
    },
    "recipe": {"config", "dataset", "files", "methods", "registry", "schedule", "tracking"},
    "outline": {"recipe"},
    "headstart": {"gpu", "outline", "recipe", "schedule"},
    "spelling": {"dataset", "outline", "recipe"},
    "request": {"dataset", "fingerprint", "methods", "outline", "recipe"},
    "tally": {"methods", "outline", "recipe"},
    "forecast": {"dataset", "outline", "recipe", "request", "tally"},
    "plan": {"dataset", "forecast", "methods", "outline", "recipe", "request", "spelling"},
    "rehearsal": set(),
    "skeleton": {"detection", "families", "files", "hub", "recipe"},
    "duration": {"batch", "forecast", "recipe", "rehearsal"},
    "memory": {"batch", "families", "packed", "quantize", "recipe", "rehearsal", "skeleton", "trainer"},
    "prior": {"dataset", "families", "methods", "recipe", "render", "request"},
    "card": {"architectures", "export", "files", "recipe"},
    "push": {"card", "config", "files"},
    "evaluation": {
        "base",
        "batch",
        "canvas",
        "dataset",
        "detection",
        "families",
        "files",
        "folder",
        "generate",
        "hub",
        "load",
        "recipe",
        "render",
        "student",
    },
    "study": {
        "config",
        "dataset",
        "evaluation",
        "files",
        "fingerprint",
        "outline",
        "plan",
        "recipe",
        "run",
        "stopping",
        "trainer",
    },
    "session": {"dataset", "families", "files", "plan", "report", "run"},
    "report": {"config", "dataset", "evaluation", "export", "files", "folder", "tracking", "validation"},
    "bench": {"base", "families", "recipe", "run"},
    "run": None,  # the wiring
    "cli": None,
    "__main__": None,
}


def imported_rooms(source: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    names = {
        name
        for node in nodes
        for name in ([f"finetune.{alias.name}" for alias in node.names] if node.module == "finetune" else [node.module])
    }
    return {name.split(".")[1] for name in names if name and name.startswith("finetune.")} - {"__version__"}


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_the_rooms_beneath_it(path: Path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = MAY_IMPORT.get(room, set()) if room not in LEAVES else set()
    if allowed is None:
        return
    above = imported_rooms(path.read_text()) - {room} - LEAVES - allowed
    assert not above, f"{path.name} imports {sorted(above)}; {room} may import {sorted(allowed)}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_needs_a_scroll_bar_and_no_file_an_afternoon(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 45, f"{node.name} is too long"


def test_accelerate_and_peft_stay_in_their_rooms():
    for package, rooms in {
        "accelerate": {"assemble", "trainer", "run", "prior"},
        "peft": {"fused", "variants"},
    }.items():
        users = {
            path.stem
            for path in files()
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package
        }
        assert users <= rooms
