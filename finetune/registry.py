"""Find methods and families by the name a recipe gives them.

A plug-in is one module in `finetune/methods/` or `finetune/families/` that
decorates one class; its name is the module's. Nothing else mentions it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from finetune.errors import UserError, brief, did_you_mean

T = TypeVar("T")
C = TypeVar("C")


@cache
def headlines(package: str) -> dict[str, str]:
    """Each plug-in's name and the first line of its docstring, without importing it: some are heavy."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    files = sorted(Path(spec.submodule_search_locations[0]).glob("[a-z]*.py"))
    return {file.stem: _first_line(file) for file in files if file.stem != "base"}


def _first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


class Registry(Generic[T]):
    """Module name -> the class registered in it; a module is imported when it is asked for."""

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self.package = package
        self._classes: dict[str, Any] = {}

    def register(self, cls: type[C]) -> type[C]:
        self._classes[cls.__module__.rpartition(".")[2]] = cls
        return cls

    def names(self) -> list[str]:
        return list(headlines(self.package))

    def __getitem__(self, name: str) -> type[T]:
        if name not in self.names():
            raise UserError(f"unknown {self.kind} {brief(name)}. {did_you_mean(name, self.names())}")
        importlib.import_module(f"{self.package}.{name}")
        return self._classes[name]
