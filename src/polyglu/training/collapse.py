"""Collapse watch: tells when routing entropy falls so low that neurons have stopped choosing.

The limits are those of the guide's "Troubleshooting", made for K = 4 activations (at most ln 4 = 1.386 nats).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NOTE_BELOW = 0.5
"""Mean entropy in nats that a healthy run stays above."""
WARN_BELOW = 0.3
"""Mean entropy in nats under which routing is collapsing."""
REARM = 0.05
"""A limit must be left behind by this many nats before falling under it is told again: no flapping."""

WATCHED = {"routing_entropy": "static", "dynamic_routing_entropy": "dynamic"}
"""Metric -> what its entropy is of: softmax(alpha), or softmax of the full logits on the batch."""
LEVELS: tuple[Literal["note"], Literal["warning"]] = ("note", "warning")
"""From level 1 on; level 0 is health."""


@dataclass(frozen=True)
class Notice:
    """Something a person should know about a run."""

    kind: str
    """The metric: ``routing_entropy`` or ``dynamic_routing_entropy``."""
    level: Literal["note", "warning"]
    message: str
    """What fell below what, which layer is lowest, what to do."""


def collapse_limits(n_activations: int) -> tuple[float, float]:
    """Limits in nats of note and warning for K activations.

    The guide's from K = 4 on. For fewer they are the same share of ln K: two activations never exceed 0.69 nats, and
    one has entropy 0, which is no collapse: its limits are 0, and nothing is below them.
    """
    share = min(1.0, math.log(n_activations) / math.log(4))
    return NOTE_BELOW * share, WARN_BELOW * share


def collapse_notices(
    values: Mapping[str, float], announced: Mapping[str, int], n_activations: int
) -> tuple[list[Notice], dict[str, int]]:
    """What a step's routing metrics have to tell that has not been told.

    Args:
        values: metrics of a log step; ``routing_entropy/mean``, ``dynamic_routing_entropy/mean`` and those of
            ``/layer_N`` in nats are looked at. A model without routing has none.
        announced: level told already for each metric, as returned by the step before; empty at the start.
        n_activations: K.

    Returns:
        Notices, for each metric at most one and only where it got worse; and the levels to pass next time.
    """
    limits = collapse_limits(n_activations)
    notices, levels = [], dict(announced)
    for kind in WATCHED:
        value = values.get(f"{kind}/mean", math.nan)
        if not math.isfinite(value):
            continue
        level, told = _level(value, limits), announced.get(kind, 0)
        if level > told:
            notices.append(Notice(kind, LEVELS[level - 1], _message(kind, values, limits[level - 1], n_activations)))
        levels[kind] = max(level, min(told, _level(value - REARM, limits)))
    return notices, levels


def _level(value: float, limits: tuple[float, float]) -> int:
    return sum(value < limit for limit in limits)


def _message(kind: str, values: Mapping[str, float], limit: float, n_activations: int) -> str:
    layers = {key: value for key, value in values.items() if key.startswith(f"{kind}/layer_")}
    lowest = min(layers, key=layers.__getitem__, default=None)
    where = "" if lowest is None else f"; lowest in layer {lowest.rsplit('_', 1)[1]}, {layers[lowest]:.4f}"
    return (
        f"{WATCHED[kind]} routing entropy ({kind}/mean) is {values[f'{kind}/mean']:.4f} nats, below {limit:.2g} of at "
        f"most {math.log(n_activations):.3f}{where}: neurons are ceasing to choose among activations. "
        "Setting or raising training.entropy_reg (0.01 to 0.1) holds it up, from here on or from an earlier checkpoint."
    )
