"""``src.X`` is ``polyglu.X``, for commands like ``python -m src.training.train`` and imports ``from src.model…``.

The same module objects under a second name; no class exists twice.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import cast

PREFIX = __name__ + "."
PACKAGE = "polyglu."

sys.path.insert(0, str(Path(__file__).parent))  # a checkout runs its own sources, installed or not


class _AliasLoader(importlib.abc.InspectLoader):
    """Hands out the module of another name."""

    def __init__(self, spec: importlib.machinery.ModuleSpec) -> None:
        self.target = spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Import the module that the alias stands for."""
        return importlib.import_module(self.target.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the module is imported; only give it back its own spec."""
        module.__spec__ = self.target

    def get_code(self, fullname: str) -> CodeType | None:
        """Code of the module, for ``python -m``."""
        return cast(importlib.abc.InspectLoader, self.target.loader).get_code(self.target.name)

    def get_source(self, fullname: str) -> str | None:
        """Source of the module, for tracebacks."""
        return cast(importlib.abc.InspectLoader, self.target.loader).get_source(self.target.name)


class _AliasFinder(importlib.abc.MetaPathFinder):
    """Finds ``src.X`` wherever ``polyglu.X`` is."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(PREFIX) or fullname.startswith(PREFIX + PACKAGE[:-1]):
            return None
        spec = importlib.util.find_spec(PACKAGE + fullname.removeprefix(PREFIX))
        if spec is None:
            return None
        alias = importlib.machinery.ModuleSpec(fullname, _AliasLoader(spec), origin=spec.origin)
        alias.submodule_search_locations = spec.submodule_search_locations
        return alias


sys.meta_path.insert(0, _AliasFinder())
