"""Which activation each neuron prefers. Shapes as in ``polyglu.model.architecture``.

static      softmax(alpha): what the neuron would choose without looking at the text
effective   mean of softmax((alpha + beta * f(h_bar)) / tau) over real text: what the model computes with

A neuron whose weights are as good as equal prefers nothing: its largest weight is noise and is not counted as a choice.
"""

import math

import torch
from torch import Tensor

from polyglu.errors import PolygluError
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.routing import entropy

NO_PREFERENCE_NATS = 1e-3
"""Weights whose entropy is this close to ln K prefer nothing; alpha then deviates by less than about 0.05."""


def stack_alpha(model: PolychromaticLM) -> Tensor:
    """Static preference logits of all layers: fp32 ``[L, F, K]``.

    Raises:
        PolygluError: the model's feed-forward layers have one fixed activation and nothing to choose.
    """
    layers = [module.alpha for module in model.modules() if isinstance(module, PolyGLU)]
    if not layers:
        raise PolygluError(
            f"the checkpoint's feed-forward layers are '{model.config.ffn}', one fixed activation: there is no routing "
            "to analyse; give a checkpoint trained with ffn: polyglu."
        )
    return torch.stack([alpha.detach().float() for alpha in layers])


def has_preference(weights: Tensor) -> Tensor:
    """Whether weights ``[..., K]`` are distinguishable from equal ones: bool ``[...]``. A lone activation always is."""
    n_activations = weights.shape[-1]
    if n_activations == 1:
        return torch.ones(weights.shape[:-1], dtype=torch.bool)
    return math.log(n_activations) - entropy(weights) > NO_PREFERENCE_NATS


def preferred_activation(weights: Tensor) -> Tensor:
    """Index of the largest of ``[..., K]`` weights, K where there is no preference: ``[...]``."""
    return weights.argmax(-1).masked_fill(~has_preference(weights), weights.shape[-1])


def preference_shares(weights: Tensor) -> Tensor:
    """Share of each layer's neurons that prefer each activation, and last of those that prefer none.

    Args:
        weights: ``[L, F, K]``.

    Returns:
        ``[L, K + 1]``, rows sum to 1.
    """
    categories = torch.arange(weights.shape[-1] + 1)
    return (preferred_activation(weights)[..., None] == categories).float().mean(1)


def neuron_order(static: Tensor, effective: Tensor) -> Tensor:
    """Order of each layer's neurons for drawing: by static choice, then effective choice, then strongest first.

    Args:
        static: weights ``[L, F, K]``.
        effective: weights ``[L, F, K]``.

    Returns:
        Neuron indices ``[L, F]``.
    """
    choices = preferred_activation(static) * (static.shape[-1] + 1) + preferred_activation(effective)
    strength = (static.amax(-1) + effective.amax(-1)).double() / 2  # in (0, 1]
    return (choices - strength).argsort(dim=1)
