"""Which activation each neuron prefers. Shapes as in ``polyglu.model.architecture``.

static      softmax(alpha / tau): what the neuron would choose without looking at the text
effective   mean of softmax((alpha + beta * f(h_bar)) / tau) over real text: what the model computes with

A neuron whose weights are as good as equal prefers nothing: its largest weight is noise and is not counted as a choice.
"""

from typing import Any

import torch
from torch import Tensor

from polyglu.errors import PolygluError
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.feed_forward import PolyGLU

NO_PREFERENCE = 0.01
"""Weights prefer nothing that differ from equal ones by less: a hundredth of the neuron's routing weight."""
AS_AT_THE_START = 0.95
"""Share of neurons without a static preference from which on the model as a whole is said to have none."""


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


def moved_weight(weights: Tensor) -> Tensor:
    """Routing weight that is not where equal shares would put it: ``[..., K]`` -> ``[...]``, in 0..1 - 1/K.

    The total variation distance of the weights from equal ones.
    """
    return 0.5 * (weights - 1 / weights.shape[-1]).abs().sum(-1)


def has_preference(weights: Tensor) -> Tensor:
    """Whether weights ``[..., K]`` are distinguishable from equal ones: bool ``[...]``. A lone activation always is."""
    if weights.shape[-1] == 1:
        return torch.ones(weights.shape[:-1], dtype=torch.bool)
    return moved_weight(weights) >= NO_PREFERENCE


def static_preference(alpha: Tensor, tau: float) -> dict[str, Any]:
    """How far the static preferences are from their initial values, which are exactly 0.

    Args:
        alpha: ``[L, F, K]``.
        tau: the checkpoint's temperature.

    Returns:
        ``rms_alpha`` and ``largest_alpha`` (less each neuron's mean, which changes nothing in a softmax);
        ``moved_weight``: routing weight that alpha alone would move away from equal shares at tau, ``median``,
        ``percentile_95`` and ``largest`` over neurons; ``without_preference``: share of neurons for which that is less
        than ``NO_PREFERENCE``, and ``without_preference_per_layer``; ``as_at_the_start``: whether that is the model's
        state as a whole; ``sentence``: the same in words.
    """
    centred = alpha - alpha.mean(-1, keepdim=True)
    weights = (alpha / tau).softmax(-1)
    moved = moved_weight(weights).double()
    without = (~has_preference(weights)).double()
    median, high = moved.flatten().quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    share = without.mean().item()
    as_at_the_start = share >= AS_AT_THE_START
    if alpha.shape[-1] == 1:
        sentence = "There is one activation, so there is nothing to prefer."
    elif as_at_the_start:
        sentence = (
            f"The static preferences cannot be told from their initial values: α began at 0, and at τ = {tau:.3g} it "
            f"moves less than {NO_PREFERENCE:.0%} of the routing weight of {share:.1%} of the neurons."
        )
    else:
        sentence = (
            f"α began at 0; at τ = {tau:.3g} it alone moves {median:.1%} of a neuron's routing weight away from equal "
            f"shares (median; {high:.1%} at the 95th percentile), and less than {NO_PREFERENCE:.0%} in {share:.1%} of "
            "the neurons. One checkpoint does not tell a learned preference from the drift of noisy updates."
        )
    return {
        "initial_alpha": 0.0,
        "rms_alpha": centred.double().square().mean().sqrt().item(),
        "largest_alpha": centred.abs().max().item(),
        "moved_weight": {"median": median, "percentile_95": high, "largest": moved.max().item()},
        "without_preference": share,
        "without_preference_per_layer": without.mean(1).tolist(),
        "as_at_the_start": as_at_the_start,
        "sentence": sentence,
    }


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
