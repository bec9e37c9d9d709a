"""Intervals, corrected p-values and a permutation test, all over documents: a document is one observation.

The tokens of a document are not independent of one another, so an interval over tokens would be too narrow.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyglu import estimates

PERMUTATIONS = 1999
"""Of a permutation test: no p-value is below 1 / 2000."""
BOOTSTRAPS = 999
"""Samples of a bootstrap."""


class Interval(NamedTuple):
    """An estimate with its confidence interval, each of the same shape."""

    estimate: Tensor
    low: Tensor
    high: Tensor


def t_interval(estimate: Tensor, error: Tensor, freedom: int, confidence: float = estimates.LEVEL) -> Interval:
    """Student's t interval around an estimate with a standard error; infinite where there are no degrees of freedom."""
    if freedom < 1:
        return Interval(estimate, torch.full_like(estimate, -torch.inf), torch.full_like(estimate, torch.inf))
    reach = error * estimates.t_quantile(freedom, confidence)
    return Interval(estimate, estimate - reach, estimate + reach)


def mean_of_groups(groups: Sequence[Tensor]) -> Interval:
    """Mean of the groups' means, each group weighing the same: a stratified sample.

    Args:
        groups: values ``[documents of the group, ...]``.

    Returns:
        Interval ``[...]``; the standard error is sqrt(sum of variance / documents of each group) / groups.
    """
    estimate = torch.stack([values.mean(0) for values in groups]).mean(0)
    freedom = sum(len(values) - 1 for values in groups)
    if min(len(values) for values in groups) < 2:
        return t_interval(estimate, estimate, 0)
    variance = torch.stack([values.var(0) / len(values) for values in groups]).sum(0)
    return t_interval(estimate, variance.sqrt() / len(groups), freedom)


def ratio_error(values: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of values over sum of sizes, and its standard error over documents (linearised; Cochran 1977, section 6.5).

    Args:
        values: ``[..., documents]``.
        sizes: ``[documents]``, tokens of each.
    """
    n = len(sizes)
    ratio = values.sum(-1) / sizes.sum()
    residuals = values - ratio[..., None] * sizes
    return ratio, (residuals.square().sum(-1) * n / max(1, n - 1)).sqrt() / sizes.sum()


def two_sided_p(estimate: Tensor, error: Tensor, freedom: int) -> Tensor:
    """P-value of Student's t test that the estimated quantity is 0; 1 where nothing differs at all."""
    if freedom < 1:
        return torch.ones_like(estimate)
    ratio = torch.where(estimate == 0, 0.0, estimate.abs() / error).double()
    return torch.as_tensor(estimates.two_sided_p(ratio.numpy(), freedom), dtype=torch.float64)


def holm(p_values: Tensor) -> Tensor:
    """P-values ``[n]`` corrected for their number, as ``estimates.holm`` does."""
    return torch.tensor(estimates.holm(p_values.tolist()), dtype=p_values.dtype)


class Difference(NamedTuple):
    """How groups of documents differ, for each of several grams (layers)."""

    pseudo_f: Tensor
    """Infinite where documents of a group do not vary at all."""
    p_value: Tensor
    effect: Interval
    """Omega squared: share of the variance between documents that the groups explain, corrected for chance; 0..1, or
    slightly below 0 by chance."""


def group_difference(gram: Tensor, labels: Tensor, generator: torch.Generator) -> Difference:
    """Permutation test of whether groups of documents differ, and by how much (PERMANOVA; Anderson 2001).

        SS_total  = sum_i |x_i - mean|^2          SS_between = SS_total - SS_within
        SS_within = sum_g sum_(i in g) |x_i - mean_g|^2
        pseudo-F  = (SS_between / (groups - 1)) / (SS_within / (n - groups))
        omega^2   = (SS_between - (groups - 1) MS_within) / (SS_total + MS_within)

    The p-value is the share of random relabellings, the one at hand included, with a pseudo-F as large. Groups that
    differ only in how much their documents scatter can be found different too. The interval of omega^2 is a bootstrap
    within groups, shifted by its bias.

    Args:
        gram: inner products of the documents ``[L, n, n]``; any common point may be subtracted from them before.
        labels: group of each document ``[n]``, 0 to groups - 1, at least two documents each.
        generator: of permutations and bootstrap samples.
    """
    gram = gram.double()
    n, groups = len(labels), int(labels.max()) + 1
    shuffled = torch.stack([labels[torch.randperm(n, generator=generator)] for _ in range(PERMUTATIONS)])
    between, total = _sums_of_squares(gram, _one_hot(torch.cat([labels[None], shuffled]), groups))
    pseudo_f = (between / (groups - 1)) / ((total - between).clamp(min=0) / (n - groups))
    pseudo_f = pseudo_f.nan_to_num(nan=0.0, posinf=torch.inf)  # 0: all documents alike
    exceeding = (pseudo_f[:, 1:] >= pseudo_f[:, :1] * (1 - 1e-9)).sum(1)
    effect = _omega_squared(between[:, 0], total[:, 0], n, groups)
    resampled = _one_hot(labels[None], groups) * _resampled_counts(labels, groups, generator)[:, None]
    samples = _omega_squared(*_sums_of_squares(gram, resampled), n, groups)
    tail = estimates.SIGNIFICANT / 2
    low, high = samples.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=1)
    shift = effect - samples.mean(1)
    return Difference(
        pseudo_f[:, 0],
        (exceeding + 1).double() / (PERMUTATIONS + 1),
        Interval(effect, low + shift, (high + shift).clamp(max=1)),
    )


def _one_hot(labels: Tensor, groups: int) -> Tensor:
    """``[R, n]`` -> fp64 ``[R, groups, n]``."""
    return (labels[:, None] == torch.arange(groups)[:, None]).double()


def _resampled_counts(labels: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """How often each document is drawn when as many are drawn from each group: ``[BOOTSTRAPS, n]``."""
    counts = torch.zeros(BOOTSTRAPS, len(labels), dtype=torch.float64)
    for group in range(groups):
        members = (labels == group).nonzero()[:, 0]
        drawn = members[torch.randint(len(members), (BOOTSTRAPS, len(members)), generator=generator)]
        counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return counts


def _sums_of_squares(gram: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Between groups and in total, each ``[L, R]``, for R memberships with counts ``[R, groups, n]``."""
    n_members = members.sum(-1)  # [R, groups]
    of_groups, of_all = [], []
    for layer in gram:  # one at a time bounds the memory
        squared_sums = ((members @ layer) * members).sum(-1)  # [R, groups]: |sum of the group's vectors|^2
        everyone = members.sum(1)  # [R, n]
        centre = ((everyone @ layer) * everyone).sum(-1) / everyone.sum(-1)
        of_groups.append((squared_sums / n_members).sum(-1) - centre)
        of_all.append(everyone @ layer.diagonal() - centre)
    return torch.stack(of_groups).clamp(min=0), torch.stack(of_all).clamp(min=0)


def _omega_squared(between: Tensor, total: Tensor, n: int, groups: int) -> Tensor:
    mean_within = (total - between) / (n - groups)
    return ((between - (groups - 1) * mean_within) / (total + mean_within)).nan_to_num(nan=0.0)
