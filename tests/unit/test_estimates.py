import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from polyglu.estimates import Estimate, estimate, ratio_estimate, t_quantile, welch_freedom

PAIRS = st.lists(st.tuples(st.floats(-100, 100), st.floats(1, 50)), min_size=2, max_size=20)


@pytest.mark.parametrize(("n", "least"), [(8, 0.86), (60, 0.93)])
def test_the_interval_covers_the_known_ratio(n: int, least: float) -> None:
    """Documents of very unequal length, each with nats per token of its own, around a known ratio of 2.5."""
    rng = np.random.default_rng(0)
    repeats = 1500
    lengths = 1 + rng.geometric(1 / 80, (repeats, n))
    nats = lengths * rng.gamma(25, 0.1, (repeats, n))
    found = [ratio_estimate(*pair) for pair in zip(nats, lengths, strict=True)]
    covered = np.mean([one.low <= 2.5 <= one.high for one in found])  # type: ignore[operator]
    assert least < covered < 0.975
    spread = np.std([one.mean for one in found])
    assert np.mean([one.stderr for one in found]) == pytest.approx(spread, rel=0.15 if n > 8 else 0.3)


@given(PAIRS, st.floats(0.1, 10), st.floats(0.1, 10))
def test_units_of_measurement_do_not_matter(pairs: list[tuple[float, float]], up: float, down: float) -> None:
    x, y = zip(*pairs, strict=True)
    plain = ratio_estimate(x, y)
    scaled = ratio_estimate([up * value for value in x], [down * value for value in y])
    assert plain.stderr is not None and plain.low is not None and plain.high is not None
    assert plain.low <= plain.mean <= plain.high
    assert scaled.mean == pytest.approx(plain.mean * up / down, abs=1e-6)
    assert scaled.stderr == pytest.approx(plain.stderr * up / down, abs=1e-6)


def test_a_mean_is_student_s() -> None:
    found = estimate([1.0, 2.0, 3.0, 6.0])
    error = math.sqrt(14 / 3 / 4)
    assert found.mean == 3.0 and found.stderr == pytest.approx(error)
    assert found.high == pytest.approx(3 + 3.1824463 * error)  # t of 3 degrees of freedom, from tables
    assert ratio_estimate([4.0], [2.0]) == Estimate(2.0, None, None, 1)


def test_degrees_of_freedom_of_a_difference_are_those_of_scipy() -> None:
    a, b = [1.0, 2.0, 4.0, 7.0], [3.0, 3.5, 9.0, 1.0, 2.0, 12.0]
    errors = [estimate(values).stderr for values in (a, b)]
    found = welch_freedom(errors[0] or 0, errors[1] or 0, len(a), len(b))
    assert found == pytest.approx(stats.ttest_ind(a, b, equal_var=False).df)
    assert welch_freedom(1e200, 1e200, 5, 5) == pytest.approx(8)
    assert welch_freedom(0.0, 0.2, 5, math.inf) == math.inf and welch_freedom(0.0, 0.0, 5, 5) == math.inf
    assert t_quantile(math.inf) == pytest.approx(1.959964) and t_quantile(3) == pytest.approx(3.182446)
