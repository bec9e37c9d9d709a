"""Estimates from independent units (documents, samples) and how far to trust them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
"""Of all confidence intervals."""


class Estimate(NamedTuple):
    """A number with its standard error and confidence interval; None where one unit says nothing of the spread."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int
    """Units."""


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum over sum, such as nats over tokens, of units that were drawn at random: documents, not their tokens.

    With r = sum(x) / sum(y), the variance of r is that of a linear approximation (delta method; Cochran, Sampling
    Techniques, 3rd ed. 1977, section 2.11): n / (n - 1) * sum((x - r y)^2) / sum(y)^2. The interval is
    r +- t(n - 1) * stderr, t Student's quantile. Of few units of very unequal size it is too narrow: with 8 documents
    of geometric length it holds the true ratio in 88% of the draws.

    Args:
        numerators: x, one of each unit.
        denominators: y, one of each unit; their sum is positive.
    """
    x, y = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    n, ratio = len(x), float(x.sum() / y.sum())
    if n < 2:
        return Estimate(ratio, None, None, None, n)
    error = math.sqrt(n / (n - 1) * float(((x - ratio * y) ** 2).sum())) / float(y.sum())
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    return Estimate(ratio, error, ratio - half, ratio + half, n)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean with its t interval: mean +- t(n - 1) * s / sqrt(n), s the sample's standard deviation (Student 1908)."""
    return ratio_estimate(values, [1.0] * len(values))
