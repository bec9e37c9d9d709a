"""Against scipy's own tests and published examples; and what a verdict may claim on numbers whose answer is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from polyglu.compare.statistics import Difference, corrected, digits, paired_difference, verdict
from polyglu.estimates import Estimate, estimate, holm, ratio_estimate

STUDENT = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
"""Extra hours of sleep with two drugs (Student 1908): t = -4.0621 on 9 degrees of freedom, p = 0.002833."""


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_students_own_example() -> None:
    found = paired_difference(*map(by_seed, STUDENT))
    assert found is not None and found.p is not None
    assert found.estimate.mean == pytest.approx(-1.58)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((-2.459886, -0.700114), abs=1e-6)


@given(st.lists(st.integers(-300, 300), min_size=2, max_size=9, unique=True), st.integers(0, 2**31))
def test_intervals_and_p_are_scipys(hundredths: list[int], seed: int) -> None:
    values = [value / 100 for value in hundredths]
    others = (np.array(values) + np.random.default_rng(seed).normal(size=len(values))).tolist()
    found = estimate(values)
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    difference = paired_difference(by_seed(values), by_seed(others))
    assert difference is not None
    assert difference.p == pytest.approx(stats.ttest_rel(values, others).pvalue, rel=1e-6, abs=1e-12)


def test_pairs_are_the_seeds_that_both_have() -> None:
    found = paired_difference({0: 1.0, 1: 3.0, 5: 9.0}, {1: 2.0, 0: 0.5, 7: 1.0})
    assert found is not None and (found.estimate.n, found.estimate.mean) == (2, 0.75)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    alone = paired_difference({0: 1.0}, {0: 1.5})
    assert alone is not None and (alone.estimate.low, alone.p, alone.outcome) == (None, None, "untested")
    same = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same is not None and same.p == 1.0


def test_holm() -> None:
    """Example of Holm (1979) as R's p.adjust computes it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_what_step_down_rejects(p_values: list[float]) -> None:
    """The definition: from the smallest, reject while p < 0.05 / (those left), then stop."""
    rejected, order = set(), sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        if p_values[index] * (len(p_values) - rank) >= 0.05:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(p_values)) if p < 0.05} == rejected


def test_a_ratios_interval_covers() -> None:
    """Documents of very different lengths: about 95 of 100 intervals contain the true ratio."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        sizes = rng.integers(1, 200, 60)
        nats = 3.0 * sizes + rng.normal(size=60) * sizes**0.5 * 4
        found = ratio_estimate(nats.tolist(), sizes.tolist())
        assert found.low is not None and found.high is not None
        hits += found.low <= 3.0 <= found.high
    assert 0.92 <= hits / 400 <= 0.98
    equal = ratio_estimate([1.0, 2.0, 4.0], [1, 1, 1])  # of equal units it is a mean
    assert (equal.low, equal.high) == pytest.approx((estimate([1.0, 2.0, 4.0]).low, estimate([1.0, 2.0, 4.0]).high))
    assert ratio_estimate([2.0], [4]).low is None


def compared(**variants: list[float]) -> dict[str, Difference]:
    reference = variants.pop("swiglu")
    pairs = {name: paired_difference(by_seed(values), by_seed(reference)) for name, values in variants.items()}
    return corrected({name: pair for name, pair in pairs.items() if pair is not None})


REFERENCE = [3.00, 3.10, 2.95, 3.05]


def shifted(*changes: float) -> list[float]:
    return [loss + change for loss, change in zip(REFERENCE, changes, strict=True)]


def test_a_clear_win_is_claimed_with_its_interval() -> None:
    found = verdict(compared(swiglu=REFERENCE, routed=shifted(-0.10, -0.11, -0.10, -0.09)), "swiglu")
    assert "4 seeds (one comparison, level 0.05)" in found
    assert "against swiglu is lower for routed by 0.1000 nats (95% interval 0.0870 to 0.1130)" in found
    assert "higher" not in found and "undecided" not in found and "At this size and budget" in found


def test_a_clear_loss_is_a_loss() -> None:
    found = verdict(compared(swiglu=REFERENCE, routed=shifted(0.10, 0.11, 0.10, 0.09)), "swiglu")
    assert "is higher for routed by 0.1000 nats" in found and "lower" not in found


def test_what_is_within_its_interval_is_undecided() -> None:
    found = verdict(compared(swiglu=REFERENCE, routed=shifted(-0.10, 0.12, -0.11, 0.05)), "swiglu")
    assert found.endswith("against swiglu is undecided for routed.")


def test_one_seed_claims_nothing() -> None:
    found = verdict(compared(swiglu=REFERENCE[:1], routed=[1.0]), "swiglu")
    assert found.startswith("Nothing can be said of any variant against swiglu") and "two seeds" in found
    assert "is not in it" not in found and "2 of the runs failed" in verdict({}, "swiglu", missing=2)


def test_many_comparisons_are_corrected() -> None:
    """A difference that would count alone does not among many; its outcome says so."""
    near = shifted(-0.10, -0.04, -0.06, -0.05)
    alone = compared(swiglu=REFERENCE, near=near)
    assert alone["near"].outcome == "lower"
    noise = {f"other{index}": shifted(*np.random.default_rng(index).normal(size=4)) for index in range(6)}
    among = compared(swiglu=REFERENCE, near=near, **noise)
    assert among["near"].outcome == "undecided" and among["near"].p == alone["near"].p
    assert "7 comparisons, Holm-corrected" in verdict(among, "swiglu")


def test_each_group_is_in_the_one_sentence() -> None:
    found = verdict(
        compared(
            swiglu=REFERENCE,
            good=shifted(-0.1, -0.101, -0.1, -0.099),
            bad=shifted(0.1, 0.101, 0.1, 0.099),
            open=shifted(0.1, -0.1, 0.2, -0.2),
        ),
        "swiglu",
        missing=1,
    )
    assert found.index("lower for good") < found.index("higher for bad") < found.index("undecided for open")
    assert found.count(". ") == 0 and found.endswith("(1 of the runs failed, and are not in it).")


@pytest.mark.parametrize("losses", [(3.0, 4.0), (3.0, 3.1, 2.7)])
def test_equal_differences_have_no_interval_and_claim_nothing(losses: tuple[float, ...]) -> None:
    """Even where subtracting leaves the last bits different."""
    found = compared(swiglu=list(losses), shifted=[loss - 0.1 for loss in losses], same=list(losses))
    assert found["shifted"].outcome == "untested" and found["same"].outcome == "undecided"
    for one in found.values():
        assert (one.estimate.low, one.estimate.high, one.estimate.n) == (None, None, len(losses))
    assert "is undecided for shifted and same" in verdict(found, "swiglu")
    alone = verdict({"shifted": found["shifted"]}, "swiglu")
    assert alone.startswith("Nothing can be said") and "not all equal" in alone


@pytest.mark.parametrize(("p", "outcome"), [(0.05, "lower"), (0.0500001, "undecided")])
def test_the_level_itself_is_significant(p: float, outcome: str) -> None:
    assert corrected({"a": Difference(Estimate(-1.0, -2.0, 0.0, 3), p)})["a"].outcome == outcome


def test_two_digits_of_an_interval_are_seen() -> None:
    assert [digits(0.00005, 0.00041), digits(-0.075, 0.0754), digits(0.0, 0.0)] == [".5f", ".4f", ".4f"]
    small = verdict(compared(swiglu=REFERENCE, near=shifted(-2.3e-4, -2.2e-4, -2.4e-4, -2.3e-4)), "swiglu")
    assert "lower for near by 0.00023 nats (95% interval 0.00022 to 0.00024)" in small
