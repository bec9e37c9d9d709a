"""Folders as transformers writes them: ``config.json`` and safetensors, in one file or in shards. Nothing is executed.

``polyglu export`` makes such a folder. Its config has the fields of ``ModelConfig`` and step, tau and tokenizer; its
weights have this project's names, behind ``model.``
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from polyglu.errors import PolygluError
from polyglu.files import read_json, sha256
from polyglu.model.config import ModelConfig

MODEL_TYPE = "polychromatic"
"""``model_type`` of the config."""
WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE = "model.safetensors", "model.safetensors.index.json", "config.json"
HEAD, PREFIX = "lm_head.weight", "model."


def weight_files(path: Path) -> list[Path]:
    """Files with the weights of a folder; of a file, itself.

    Raises:
        PolygluError: there are none, or the index names files elsewhere.
    """
    if not path.is_dir():
        return [path]
    if (path / WEIGHTS_FILE).is_file():
        return [path / WEIGHTS_FILE]
    index_file = path / INDEX_FILE
    if not index_file.is_file():
        raise PolygluError(f"{path} has no {WEIGHTS_FILE}; give a portable .pt file or a folder of polyglu export.")
    index = read_json(index_file)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise PolygluError(f"{index_file} has no 'weight_map'; export the checkpoint again.")
    names = {str(name) for name in places.values()}
    for name in sorted(names):
        if Path(name).name != name or not (path / name).is_file():
            raise PolygluError(f"{index_file} names '{name}', which is no file of that folder; export it again.")
    return [path / name for name in sorted(names)]


def weights_digest(path: str | Path) -> str:
    """SHA-256 (hex) that identifies a checkpoint: of the file, or of a folder's weights."""
    hashes = [sha256(file) for file in weight_files(Path(path))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a safetensors file or folder, under the names they have there.

    Raises:
        PolygluError: missing or damaged.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            weights |= load_file(file)
        except (SafetensorError, ValueError, OSError):
            raise PolygluError(f"{file} is not a whole safetensors file; copy or export it again.") from None
    return weights


def own_names(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights as transformers names them, under this project's names.

    Raises:
        PolygluError: the head is not the embedding, or a name is there twice.
    """
    renamed = {name.removeprefix(PREFIX): weight for name, weight in weights.items() if name != HEAD}
    head = weights.get(HEAD)
    if twice := {name for name in weights if PREFIX + name in weights}:
        raise PolygluError(
            f"{path} has '{min(twice)}' twice, with and without '{PREFIX}'; export the checkpoint again."
        )
    if head is not None and not torch.equal(head, renamed.get("embed_tokens.weight", head[:0])):
        raise PolygluError(f"{path}: the head differs from the embedding, to which it is tied here; tie them first.")
    return renamed


def read_description(file: Path) -> dict[str, Any]:
    """What a ``config.json`` says: ``config`` (fields of ModelConfig), ``step``, ``tau``, ``tokenizer``; unchecked.

    Raises:
        PolygluError: missing, or of another kind of model.
    """
    said = read_json(file)
    kind = said.get("model_type") if isinstance(said, dict) else None
    if kind != MODEL_TYPE:
        what = "says no model_type" if kind is None else f"describes a {kind!r:.40} model"
        raise PolygluError(f"{file} {what}, expected '{MODEL_TYPE}'; give a folder that polyglu export wrote.")
    fields = ModelConfig.model_fields.keys() - {"kernels"}
    if missing := {*fields, "tau"} - said.keys() - {"routing"}:  # not said where both parts route
        raise PolygluError(f"{file}: '{min(missing)}' is missing; export the checkpoint again.")
    described = {key: said[key] for key in ("step", "tokenizer") if said.get(key) is not None}
    return {"config": {key: said[key] for key in fields & said.keys()}, "tau": said["tau"], **described}
