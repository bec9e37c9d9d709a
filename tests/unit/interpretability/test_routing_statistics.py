import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.interpretability import statistics
from polyglu.interpretability.statistics import (
    group_difference,
    holm,
    mean_of_groups,
    ratio_error,
    t_interval,
    two_sided_p,
)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_interval_and_p_value_are_students() -> None:
    values = normal(12, seed=1) + 0.4
    error = values.std() / math.sqrt(12)
    expected = scipy.stats.ttest_1samp(values.numpy(), 0)
    low, high = expected.confidence_interval(0.95)
    found = t_interval(values.mean(), error, 11)
    assert (found.low.item(), found.high.item()) == pytest.approx((low, high))
    assert two_sided_p(values.mean(), error, 11).item() == pytest.approx(expected.pvalue)


def test_one_document_has_no_interval_and_no_evidence() -> None:
    found = t_interval(torch.tensor(2.0), torch.tensor(0.1), 0)
    assert (found.low.item(), found.high.item()) == (-math.inf, math.inf)
    assert two_sided_p(torch.tensor(2.0), torch.tensor(0.1), 0).item() == 1
    assert two_sided_p(torch.tensor(0.0), torch.tensor(0.0), 9).item() == 1


def test_ratio_of_equal_sizes_is_the_mean() -> None:
    values = normal(3, 20, seed=2)
    ratio, error = ratio_error(values, torch.full((20,), 5))
    torch.testing.assert_close(ratio, values.mean(1) / 5)
    torch.testing.assert_close(error, values.std(1) / math.sqrt(20) / 5)


def test_what_is_proportional_to_size_has_no_error() -> None:
    sizes = torch.tensor([3, 50, 7])
    ratio, error = ratio_error(0.25 * sizes.double(), sizes)
    assert (ratio.item(), error.item()) == pytest.approx((0.25, 0))


def test_groups_weigh_the_same_whatever_their_size() -> None:
    groups = [torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0], [10.0], [10.0], [14.0]])]
    found = mean_of_groups(groups)
    assert found.estimate.item() == 6.5
    error = math.sqrt(2 / 2 + 4 / 4) / 2
    reach = scipy.stats.t.ppf(0.975, 4) * error
    assert found.high.item() == pytest.approx(6.5 + reach)


def test_holm_of_a_known_case() -> None:
    assert holm(torch.tensor([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(torch.tensor([0.9, 0.8])).tolist() == [1, 1]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), groups=st.integers(2, 4))
def test_pseudo_f_of_single_numbers_is_that_of_anova(seed: int, groups: int) -> None:
    labels = torch.arange(groups).repeat_interleave(5)
    values = normal(5 * groups, seed=seed) + labels * (seed % 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "PERMUTATIONS", 9)
        patch.setattr(statistics, "BOOTSTRAPS", 9)
        found = group_difference(torch.outer(values, values)[None], labels, generator())
    expected = scipy.stats.f_oneway(*values.view(groups, 5).numpy()).statistic
    assert found.pseudo_f.item() == pytest.approx(expected, rel=1e-6)
    between, within = groups - 1, 5 * groups - groups
    omega = between * (expected - 1) / (between * expected + within + 1)
    assert found.effect.estimate.item() == pytest.approx(omega)


def test_a_common_point_changes_nothing() -> None:
    labels = torch.arange(3).repeat_interleave(4)
    values = normal(12, 5, seed=4)
    moved = values + 3
    first = group_difference((values @ values.T)[None], labels, generator())
    second = group_difference((moved @ moved.T)[None], labels, generator())
    torch.testing.assert_close(first.pseudo_f, second.pseudo_f)
    assert first.p_value.tolist() == second.p_value.tolist()
    torch.testing.assert_close(first.effect, second.effect)


def test_p_values_are_uniform_where_nothing_differs_and_effects_stay_near_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 99)
    monkeypatch.setattr(statistics, "BOOTSTRAPS", 99)
    labels = torch.arange(4).repeat_interleave(6)
    values = normal(300, 24, 3, seed=5)
    found = group_difference(values @ values.mT, labels, generator())
    assert scipy.stats.kstest(found.p_value.numpy(), "uniform").pvalue > 0.01
    assert 0.02 < (found.p_value <= 0.05).double().mean() < 0.08
    assert abs(found.effect.estimate.mean()) < 0.01
    assert ((found.effect.low <= 0) & (found.effect.high >= 0)).double().mean() > 0.93


def test_a_large_difference_is_found_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 199)
    monkeypatch.setattr(statistics, "BOOTSTRAPS", 199)
    labels = torch.arange(4).repeat_interleave(20)
    centres = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    true = 1 / (1 + 2)  # variance between groups over all variance
    values = normal(100, 80, 2, seed=6) + centres[labels]
    found = group_difference(values @ values.mT, labels, generator())
    assert (found.p_value == 1 / 200).all()
    assert found.effect.estimate.mean().item() == pytest.approx(true, abs=0.02)
    covered = (found.effect.low <= true) & (found.effect.high >= true)
    assert 0.88 < covered.double().mean() <= 1


def test_equal_documents_do_not_differ() -> None:
    found = group_difference(torch.zeros(1, 6, 6), torch.arange(2).repeat_interleave(3), generator())
    assert (found.p_value.item(), found.effect.estimate.item(), found.pseudo_f.item()) == (1, 0, 0)


def test_groups_without_any_spread_have_an_infinite_f() -> None:
    labels = torch.arange(2).repeat_interleave(5)
    values = torch.tensor([[1.0], [-1.0]])[labels]
    found = group_difference((values @ values.mT)[None], labels, generator())
    assert found.pseudo_f.item() == torch.inf and found.effect.estimate.item() == 1 and found.p_value.item() < 0.05
