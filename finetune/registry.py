"""Find methods and families by the name a recipe gives them.

A plug-in is one module in `finetune/methods/` or `finetune/families/` that
decorates one class; its name is the module's. Nothing else mentions it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Generic, TypeVar

from finetune.errors import UserError, did_you_mean

T = TypeVar("T")
C = TypeVar("C")


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
        """Known without importing the modules, some of which are heavy."""
        modules = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return sorted(module.name for module in modules if module.name != "base")

    def __getitem__(self, name: str) -> type[T]:
        if name not in self.names():
            raise UserError(f"unknown {self.kind} {name!r}. {did_you_mean(name, self.names())}")
        importlib.import_module(f"{self.package}.{name}")
        return self._classes[name]
