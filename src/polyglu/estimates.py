"""Estimates from independent units (seeds, documents, samples), and how far to trust them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

SIGNIFICANT = 0.05
"""A corrected p-value up to this shows a difference."""
LEVEL = 1 - SIGNIFICANT
"""Of all confidence intervals."""


@dataclass(frozen=True)
class Estimate:
    """A mean, or a ratio of two, with its t interval; without an interval if it is of one unit."""

    mean: float
    low: float | None
    high: float | None
    n: int
    """Units."""
    stderr: float | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and two-sided t interval: mean +- t(n - 1) * s / sqrt(n), s the sample's standard deviation (Student 1908).

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean of nothing")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Estimate(mean, None, None, 1)
    return _interval(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n), n)


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum over sum with its interval, over units drawn at random: nats over tokens, over documents, say.

    With r = sum(x) / sum(y), the variance of r is that of its linear approximation (delta method; Cochran, Sampling
    Techniques, 3rd ed. 1977, section 2.11): n / (n - 1) * sum((x - r y)^2) / sum(y)^2. The interval is
    r +- t(n - 1) * stderr. Of few units of very unequal size it is too narrow: with 8 documents of geometric length
    it holds the true ratio in 88% of the draws.

    Args:
        numerators: x, one of each unit.
        denominators: y, one of each unit; their sum is positive.
    """
    x, y = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    n, ratio = len(x), float(x.sum() / y.sum())
    if n < 2:
        return Estimate(ratio, None, None, n)
    return _interval(ratio, math.sqrt(n / (n - 1) * float(((x - ratio * y) ** 2).sum())) / float(y.sum()), n)


def t_quantile(freedom: float, confidence: float = LEVEL) -> float:
    """Half the width, in standard errors, of Student's two-sided interval; the normal one's if ``freedom`` is inf."""
    return float(stdtrit(freedom, (1 + confidence) / 2))


def welch_freedom(a: float, b: float, n_a: float, n_b: float) -> float:
    """Degrees of freedom of a difference of two independent means (Welch 1947), from standard errors and units."""
    both = math.hypot(a, b) or 1.0
    each = (a / both) ** 4 / (n_a - 1) + (b / both) ** 4 / (n_b - 1)
    return 1 / each if each else math.inf


def two_sided_p(t: Any, freedom: int) -> Any:
    """P-value of Student's t, a number or an array of such."""
    return 2 * stdtr(freedom, -np.abs(t))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected so that the chance of any false claim among them stays at the level (Holm 1979).

    The i-th smallest of m, from 0, is multiplied by m - i; none becomes smaller than the one before it, or above 1.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _interval(mean: float, stderr: float, n: int) -> Estimate:
    half = t_quantile(n - 1) * stderr
    return Estimate(mean, mean - half, mean + half, n, stderr)
