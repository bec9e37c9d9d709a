"""A small model for tests of decoding: routing and attention matter in it, and no two logits are near."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from polyglu.files import write_json
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig
from polyglu.model.folder import MODEL_TYPE
from polyglu.model.model import Checkpoint, create_model, describe_shape

SHAPE = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "n_layers": 2, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 8}


def sharp_model(**settings: Any) -> PolychromaticLM:
    """A model of ``SHAPE`` with other settings, its weights larger than at the start of a training."""
    model = create_model(ModelConfig(**{**SHAPE, **settings}), seed=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(5 if name.startswith("embed") else 30)
            if name.endswith("alpha"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def random_tokens(n: int, seed: int) -> list[int]:
    """Token ids of that vocabulary."""
    return torch.randint(SHAPE["vocab_size"], (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def write_folder(folder: Path, checkpoint: Checkpoint, shards: int = 1) -> None:
    """A folder as transformers saves it, without its slow import: weights and config alone."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": weight.contiguous() for name, weight in checkpoint.weights.items()}
    said = {"model_type": MODEL_TYPE, "step": checkpoint.step, "tau": checkpoint.tau, "tokenizer": checkpoint.tokenizer}
    write_json(folder / "config.json", describe_shape(checkpoint.config) | said)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    places = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
