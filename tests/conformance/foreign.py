"""transformers' own tests as modules. The installed package has none: its source distribution and a checkout do.

``make`` unpacks the source distribution into ``.venv/share/transformers-source``; ``TRANSFORMERS_SOURCE`` names another
folder, such as a checkout of the same version. Nothing of them is copied into this repository.
"""

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import transformers

SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE") or Path(sys.prefix) / "share/transformers-source")
PACKAGE = "transformers_tests"
STAND_INS: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "bos_token_id": 6, "dtype": "float16", "eos_token_id": 8, "id2label": {0: "label"}, "pad_token_id": 7,
            "output_hidden_states": True, "problem_type": "regression", "return_dict": False,
            "tie_word_embeddings": False,
        }
    },
}  # fmt: skip
"""Modules that only a checkout has -> what is imported from them: tests of none, and settings that are no defaults."""


def foreign_tests(*names: str) -> list[ModuleType]:
    """Modules of transformers' tests; without them, the tests that ask for them are skipped, with the reason."""
    pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
    about = SOURCE / "src/transformers/__init__.py"
    if not about.is_file():
        pytest.skip(f"transformers' tests are not in {SOURCE}; make fetches them", allow_module_level=True)
    if f'__version__ = "{transformers.__version__}"' not in about.read_text(encoding="utf-8"):
        reason = f"{SOURCE} has the tests of another version than transformers {transformers.__version__}"
        pytest.skip(reason, allow_module_level=True)
    folder = SOURCE / "tests"
    add_module(PACKAGE, path=folder)
    for name, content in STAND_INS.items():
        part = name.partition(".")[0]
        if not (folder / name.replace(".", "/")).with_suffix(".py").is_file():
            add_module(f"{PACKAGE}.{part}", path=folder / part)
            add_module(f"{PACKAGE}.{name}", content)
    # One of them looks for the package in a file that only a checkout has.
    itself = patch("transformers.utils.direct_transformers_import", lambda *_: transformers)
    with itself, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]


def add_module(name: str, content: dict[str, Any] | None = None, path: Path | None = None) -> None:
    """Make a module by that name; with a path, a package whose other modules lie there."""
    module = ModuleType(name)
    module.__dict__.update(content or {})
    if path is not None:
        module.__path__ = [str(path)]
    sys.modules[name] = module
