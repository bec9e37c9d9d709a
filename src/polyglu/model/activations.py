"""The activations a neuron chooses among: one table of function, name, neurotransmitter and colour, used everywhere."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """One entry of the table."""

    name: str
    transmitter: str
    colour: str
    function: Callable[[Tensor], Tensor]


def _gaussian(x: Tensor) -> Tensor:
    return torch.exp(-x * x)


ACTIVATIONS = (
    Activation("ReLU", "Glutamate", "#d1495b", F.relu),
    Activation("Tanh", "GABA", "#2e86ab", torch.tanh),
    Activation("SiLU", "Dopamine", "#edae49", F.silu),
    Activation("GELU", "Acetylcholine", "#3d9970", F.gelu),
    Activation("Sine", "Serotonin", "#8e6c8a", torch.sin),
    Activation("Gaussian", "Noradrenaline", "#7f7f7f", _gaussian),
)
"""The paper uses the first four."""
