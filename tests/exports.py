"""Fixtures: small exports, made once. transformers copies a folder's code, here to a folder of the session."""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from models import sharp_model
from transformers import AutoModelForCausalLM, PreTrainedModel, dynamic_module_utils

from polyglu.data.tokenizer import train_bpe
from polyglu.export.export_folder import export
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.model import load_checkpoint, save_portable

TEXTS = ["one two three four", "three two one: two and two is four", "1 + 2 = 3; 3 + 4 = 7"]
TAU = 0.3

Exported = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session", autouse=True)
def own_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No code of a test stays in the user's cache."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path, folder])
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Checkpoint and export of a small model with some settings, made once each."""
    root = tmp_path_factory.mktemp("exports")
    tokenizer = train_bpe(TEXTS, 290, root / "tokenizer")

    @cache
    def make(**settings: Any) -> tuple[Path, Path]:
        model = sharp_model(vocab_size=tokenizer.vocab_size, seq_length=96, **settings)
        name = "_".join(str(value) for value in settings.values())
        checkpoint, folder = root / f"{name}.pt", root / name
        save_portable(checkpoint, model.state_dict(), model.config, 11, TAU, tokenizer.identity())
        export(checkpoint, folder)
        return checkpoint, folder

    return make


@pytest.fixture(scope="session")
def pair(exported: Exported) -> Callable[..., tuple[PolychromaticLM, PreTrainedModel]]:
    """Our model and transformers', from the same checkpoint."""

    @cache
    def load(**settings: Any) -> tuple[PolychromaticLM, PreTrainedModel]:
        checkpoint, folder = exported(**settings)
        return load_checkpoint(checkpoint)[0], AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    return load
