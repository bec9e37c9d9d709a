"""AdamW and its parameter groups: weight decay on matrices only."""

from typing import Any

import torch
from torch import Tensor, nn

from polyglu.model.config import LoopSection


def is_decayed(name: str, parameter: nn.Parameter, alpha_decay: bool = False) -> bool:
    """Whether weight decay applies: to matrices, but not to alpha, which is 2-D yet a preference, not a matrix.

    ``alpha_decay`` makes it apply to alpha as well.
    """
    return parameter.ndim >= 2 and (alpha_decay or name.rsplit(".", 1)[-1] != "alpha")


def parameter_groups(model: nn.Module, weight_decay: float, alpha_decay: bool = False) -> list[dict[str, Any]]:
    """Two groups, decayed and not, that partition all trainable parameters."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in named if is_decayed(name, parameter, alpha_decay)]
    others = [parameter for name, parameter in named if not is_decayed(name, parameter, alpha_decay)]
    grouped = [id(parameter) for parameter in decayed + others]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(parameter) for parameter in model.parameters()}
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def create_optimizer(model: nn.Module, settings: LoopSection) -> torch.optim.AdamW:
    """AdamW over the groups; its learning rate is set anew before each step."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay, settings.alpha_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.adam_eps,
        fused=True,
    )


def step_if_finite(optimizer: torch.optim.AdamW, norm: Tensor) -> None:
    """Update the weights, unless the gradient's norm is not finite: then neither they nor the moments change.

    The device decides; fused AdamW offers that to gradient scalers, under the name ``found_inf``.
    """
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def adam_state(optimizer: torch.optim.AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's moments of a parameter and the count of its updates; made as zeros where AdamW has not made them yet."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def count_updates(optimizer: torch.optim.AdamW) -> int:
    """Updates that AdamW has made: of all parameters equally many, for each has a gradient in every step."""
    (count,) = {int(state["step"]) for state in optimizer.state.values()}
    return count


def set_updates(optimizer: torch.optim.AdamW, count: int) -> None:
    """Set what ``count_updates`` tells."""
    for state in optimizer.state.values():
        state["step"].fill_(count)
