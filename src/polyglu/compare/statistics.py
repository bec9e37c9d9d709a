"""What a few runs allow to be said: intervals, paired differences, correction for many comparisons, a verdict.

The spread over seeds is that of initialisation, data order and noise together. Two variants with the same seed have
the same data order, so their difference is taken seed by seed (paired): what the seed does to both cancels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from polyglu.estimates import LEVEL, SIGNIFICANT, Estimate, estimate, holm, two_sided_p

Outcome = Literal["lower", "higher", "undecided", "untested"]
ROUNDING = 1e-12
"""Differences whose spread is less, as a share of the losses, are equal: it is that of subtracting."""


@dataclass(frozen=True)
class Difference:
    """Of a variant's loss and the reference's, seed by seed."""

    estimate: Estimate
    p: float | None
    """Two-sided, of Student's paired t test; None: fewer than two seeds, or all differences equal."""
    p_holm: float | None = None
    """The same after Holm's correction for all comparisons of the suite."""

    @property
    def outcome(self) -> Outcome:
        """What may be claimed."""
        if self.p_holm is None:
            return "untested"
        if self.p_holm > SIGNIFICANT:
            return "undecided"
        return "lower" if self.estimate.mean < 0 else "higher"


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Difference ``ours - theirs`` over the keys that both have; None if there are none.

    Differences that are all equal show no spread from which an interval could follow, so there is none: nor a p-value,
    but for 1 where nothing differs at all.

    Args:
        ours: seed -> loss.
        theirs: seed -> loss.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    found = estimate(differences)
    if found.stderr is None:
        return Difference(found, None)
    if max(differences) - min(differences) <= ROUNDING * max(abs(ours[seed]) for seed in seeds):
        return Difference(Estimate(found.mean, None, None, found.n), 1.0 if found.mean == 0 else None)
    return Difference(found, float(two_sided_p(found.mean / found.stderr, found.n - 1)))


def corrected(differences: Mapping[str, Difference]) -> dict[str, Difference]:
    """All comparisons of a suite, with Holm's correction for their number; those without a p-value do not count."""
    tested = {name: found.p for name, found in differences.items() if found.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {name: Difference(found.estimate, found.p, adjusted.get(name)) for name, found in differences.items()}


def verdict(differences: Mapping[str, Difference], reference: str, missing: int = 0) -> str:
    """One sentence that claims no more than the intervals and their number allow.

    Args:
        differences: variant -> its corrected difference from the reference.
        reference: name of the reference.
        missing: runs that ended without a result.
    """
    lost = f" ({missing} of the runs failed, and are not in it)" if missing else ""
    tested = {name: found for name, found in differences.items() if found.outcome != "untested"}
    if not tested:
        return (
            f"Nothing can be said of any variant against {reference}: that takes two seeds at least of each, and "
            f"differences that are not all equal{lost}."
        )
    groups = []
    for outcome, words in (("lower", "is lower for"), ("higher", "is higher for")):
        found = [_in_words(name, tested[name]) for name in tested if tested[name].outcome == outcome]
        if found:
            groups.append(f"{words} {_listed(found)}")
    open_ = [name for name, found in differences.items() if found.outcome in ("undecided", "untested")]
    if open_:
        groups.append(f"is undecided for {_listed(open_)}")
    seeds = sorted({found.estimate.n for found in tested.values()})
    n = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    correction = f"{len(tested)} comparisons, Holm-corrected" if len(tested) > 1 else "one comparison"
    return (
        f"At this size and budget, with {n} ({correction}, level {SIGNIFICANT}), the held-out loss against "
        f"{reference} {'; it '.join(groups)}{lost}."
    )


def _in_words(name: str, found: Difference) -> str:
    value = found.estimate
    assert value.low is not None and value.high is not None
    low, high = sorted((abs(value.low), abs(value.high)))
    spec = digits(low, high)
    return f"{name} by {abs(value.mean):{spec}} nats ({LEVEL:.0%} interval {low:{spec}} to {high:{spec}})"


def digits(*ends: float) -> str:
    """How nats are written: with four decimals; with up to eight where the larger end has not two digits in four."""
    end = max(map(abs, ends))
    return f".{4 if end == 0 else min(8, max(4, 1 - math.floor(math.log10(end))))}f"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
