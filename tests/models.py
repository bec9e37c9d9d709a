"""A small model for tests of decoding: routing and attention matter in it, and no two logits are near."""

from typing import Any

import torch

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model

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
