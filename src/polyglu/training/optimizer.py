"""AdamW and its parameter groups: weight decay on matrices only."""

from typing import Any

import torch
from torch import nn

from polyglu.model.config import LoopSection


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to alpha, which is 2-D yet a preference, not a matrix."""
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] != "alpha"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, decayed and not, that partition all trainable parameters."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in named if is_decayed(name, parameter)]
    others = [parameter for name, parameter in named if not is_decayed(name, parameter)]
    grouped = [id(parameter) for parameter in decayed + others]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(parameter) for parameter in model.parameters()}
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def create_optimizer(model: nn.Module, settings: LoopSection) -> torch.optim.AdamW:
    """AdamW over the groups; its learning rate is set anew before each step."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.adam_eps,
        fused=next(model.parameters()).is_cuda,
    )
