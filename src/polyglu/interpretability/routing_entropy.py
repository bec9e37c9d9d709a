"""Entropy of routing, per layer and over the model. In nats; the maximum is ln K."""

import math
from typing import Any

from torch import Tensor


def entropy_stats(entropies: Tensor, n_activations: int) -> dict[str, Any]:
    """Summarise the entropies ``[L, F]`` of all neurons.

    Returns:
        ``per_layer_mean`` and ``per_layer_std`` (lists of L), ``aggregate_mean``, ``aggregate_std``, ``max_entropy``
        (ln K) and ``normalized_mean`` (share of the maximum; 0 for a single activation). Standard deviations are those
        of the neurons at hand, divided by their number.
    """
    values = entropies.double()
    mean, maximum = values.mean().item(), math.log(n_activations)
    return {
        "per_layer_mean": values.mean(1).tolist(),
        "per_layer_std": values.std(1, correction=0).tolist(),
        "aggregate_mean": mean,
        "aggregate_std": values.std(correction=0).item(),
        "max_entropy": maximum,
        "normalized_mean": mean / maximum if maximum > 0 else 0.0,
    }
