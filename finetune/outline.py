"""What is known of a base and its family without torch: where it is, how its parts are cut, and how large they are."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finetune.recipe import BaseConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """A base that is on this machine, as far as its configs tell."""

    folder: Path  # of the configs
    weights: Path  # the folder, or a single file
    kind: str  # the family's class
    stated: Mapping[str, Any]  # what that class says of itself
    index: Mapping[str, Any]  # model_index.json

    def has(self, part: str) -> bool:
        entry = self.index.get(part)
        return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)

    def config(self, part: str) -> dict[str, Any]:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return read_json(self.folder / part / name)

    @property
    def text_encoders(self) -> dict[str, str]:
        """Text encoder -> tokenizer, of those that the base has."""
        return {encoder: name for encoder, name in self.stated["tokenizers"].items() if self.has(encoder)}

    @property
    def multiple(self) -> int:
        """What the sides of a picture must be a multiple of."""
        levels = self.config("vae").get("block_out_channels")
        halvings = len(levels) - 1 if isinstance(levels, list) and 0 < len(levels) < 8 else 3
        return 2**halvings * self.stated["size_multiple"]

    def shapes(self, part: str) -> dict[str, Shape]:
        """A part's tensors; none where its weights are not here, or in a single file."""
        if self.weights.is_file():
            return {}
        files = sorted((self.weights / part).glob("*.safetensors"))
        return {name: shape for file in files for name, shape in _header(file)}


def folder_of(base: BaseConfig) -> Path | None:
    """Where the base's configs are, if they are on this machine; in the Hub's cache a file names the snapshot."""
    source = base.config if base.is_single_file else base.source
    if source is None or Path(source).is_dir():
        return Path(source) if source else None
    home = os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"
    cached = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{source.replace('/', '--')}"
    name = cached / "refs" / (base.revision or "main")
    snapshot = cached / "snapshots" / (name.read_text().strip() if name.is_file() else base.revision or "main")
    return snapshot if snapshot.is_dir() else None


def outline(base: BaseConfig) -> Outline | None:
    """None where the base is elsewhere or of no known family."""
    folder = folder_of(base)
    if folder is None:
        return None
    index = read_json(folder / "model_index.json")
    for name, stated in stated_by_families().items():
        if base.family == name or (base.family == "auto" and stated["pipeline_class"] == index.get("_class_name")):
            weights = Path(base.source) if base.is_single_file else folder
            return Outline(folder, weights, stated["class"], stated, index)
    return None


@cache
def stated_by_families() -> dict[str, dict[str, Any]]:
    """Family -> what its class says of itself in plain values, without importing it: that would import torch."""
    files = sorted((Path(__file__).parent / "families").glob("[a-z]*.py"))
    bodies = {file.stem: ast.parse(file.read_text(encoding="utf-8")).body for file in files}
    own = {name: _assigned(body, {}) for name, body in bodies.items()}
    shared = {constant: value for found in own.values() for constant, value in found.items()}
    classes = {
        name: {"class": node.name, **_assigned(node.body, shared | own[name])}
        for name, body in bodies.items()
        for node in body
        if isinstance(node, ast.ClassDef) and (_is_registered(node) or (name, node.name) == ("base", "Family"))
    }
    defaults = classes.pop("base")
    return {name: {**defaults, **found} for name, found in classes.items()}


def read_json(file: Path) -> dict[str, Any]:
    """Nothing where there is no such file, or something else in it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_registered(node: ast.ClassDef) -> bool:
    return any(ast.unparse(decorator) == "families.register" for decorator in node.decorator_list)


def _assigned(body: list[ast.stmt], known: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.expr):
            with contextlib.suppress(LookupError, TypeError):
                found[target.id] = _value(value, known)
    return found


def _value(node: ast.expr | None, known: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return known[name]
        case ast.Tuple(elts=parts):
            return tuple(item for part in parts for item in _items(part, known))
        case ast.Dict(keys=keys, values=values):
            return {_value(key, known): _value(value, known) for key, value in zip(keys, values, strict=True)}
    raise TypeError("no plain value")


def _items(part: ast.expr, known: Mapping[str, Any]) -> tuple[Any, ...]:
    return _value(part.value, known) if isinstance(part, ast.Starred) else (_value(part, known),)


def _header(file: Path) -> Iterator[tuple[str, Shape]]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 10**8)))
        yield from ((name, tuple(map(int, entry["shape"]))) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return  # the libraries that load the base say what is wrong with it
