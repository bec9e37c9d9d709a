"""Collapse watch: who is told what, and how often."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyglu.training.collapse import NOTE_BELOW, REARM, WARN_BELOW, Notice, collapse_limits, collapse_notices


def metrics(static: float, dynamic: float) -> dict[str, float]:
    """Routing metrics of a step of two layers, the second the lower by 0.2 nats (not below 0)."""
    values = {"train/loss": 0.1, "train/tau": 0.1}
    for kind, mean in (("routing_entropy", static), ("dynamic_routing_entropy", dynamic)):
        lower = max(0.0, mean - 0.1)
        values |= {f"{kind}/layer_0": 2 * mean - lower, f"{kind}/layer_1": lower, f"{kind}/mean": mean}
    return values


def told(dynamics: list[float], n_activations: int = 4) -> list[list[str]]:
    """Levels of the notices at each of a run's log steps, for a dynamic entropy that goes this way."""
    announced: dict[str, int] = {}
    levels = []
    for dynamic in dynamics:
        notices, announced = collapse_notices(metrics(1.38, dynamic), announced, n_activations)
        levels.append([notice.level for notice in notices])
    return levels


def test_thresholds_are_the_guides() -> None:
    assert collapse_limits(4) == (0.5, 0.3)
    assert told([1.38]) == told([0.5]) == [[]]
    assert told([math.nextafter(0.5, 0)]) == told([0.3]) == [["note"]]
    assert told([math.nextafter(0.3, 0)]) == told([0.0]) == [["warning"]]


def test_only_a_change_for_the_worse_speaks() -> None:
    assert told([1.2, 0.45, 0.44, 0.31, 0.29, 0.1, 0.0]) == [[], ["note"], [], [], ["warning"], [], []]
    assert told([0.29, 0.4, 0.45, 0.48]) == [["warning"], [], [], []]


def test_hovering_at_a_limit_speaks_once_and_a_second_fall_again() -> None:
    assert told([0.49, 0.51, 0.49, 0.54, 0.49]) == [["note"], [], [], [], []]
    assert told([0.49, 0.56, 0.49]) == [["note"], [], ["note"]]
    assert told([0.29, 0.34, 0.29, 0.36, 0.29]) == [["warning"], [], [], [], ["warning"]]
    assert told([0.1, 1.2, 0.1]) == [["warning"], [], ["warning"]]


def test_both_entropies_are_watched_apart() -> None:
    notices, announced = collapse_notices(metrics(0.4, 0.2), {}, 4)
    assert [(notice.kind, notice.level) for notice in notices] == [
        ("routing_entropy", "note"),
        ("dynamic_routing_entropy", "warning"),
    ]
    notices, announced = collapse_notices(metrics(0.1, 0.2), announced, 4)
    assert [(notice.kind, notice.level) for notice in notices] == [("routing_entropy", "warning")]
    assert announced == {"routing_entropy": 2, "dynamic_routing_entropy": 2}


def test_message_names_value_limit_layer_and_remedy() -> None:
    (notice,), _ = collapse_notices(metrics(1.38, 0.25), {}, 4)
    assert notice.kind == "dynamic_routing_entropy"
    for part in ("dynamic routing entropy", "0.2500 nats", "below 0.3", "1.386", "layer 1, 0.1500", "entropy_reg"):
        assert part in notice.message


def test_lowest_layer_is_found_among_many() -> None:
    values = {f"routing_entropy/layer_{index}": 0.4 for index in range(28)} | {"routing_entropy/layer_17": 0.01}
    (notice,), _ = collapse_notices(values | {"routing_entropy/mean": 0.4}, {}, 4)
    assert "layer 17, 0.0100" in notice.message


def test_a_model_without_routing_is_silent() -> None:
    assert collapse_notices({"train/loss": 0.0}, {}, 4) == ([], {})


def test_one_activation_is_no_collapse() -> None:
    assert told([0.0, 0.0], n_activations=1) == [[], []]


@pytest.mark.parametrize(("k", "note", "warning"), [(2, 0.25, 0.15), (3, 0.3962, 0.2377), (5, 0.5, 0.3), (6, 0.5, 0.3)])
def test_few_activations_have_lower_limits(k: int, note: float, warning: float) -> None:
    assert collapse_limits(k) == pytest.approx((note, warning), abs=1e-4)
    assert told([math.log(k)], k) == [[]]
    assert told([note - 0.001], k) == [["note"]]
    assert told([warning - 0.001], k) == [["warning"]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_change_nothing(value: float) -> None:
    assert told([0.1, value, 0.1]) == [["warning"], [], []]
    assert told([value]) == [[]]


def test_what_was_passed_in_stays_as_it_was() -> None:
    announced = {"routing_entropy": 1}
    collapse_notices(metrics(0.1, 0.1), announced, 4)
    assert announced == {"routing_entropy": 1}


@given(st.lists(st.floats(0, math.log(4)), min_size=1, max_size=30))
def test_a_run_is_told_of_its_worst_state_and_never_twice_without_recovery(dynamics: list[float]) -> None:
    """The last notice since the run was last healthy is of the lowest value since; between two alike lies recovery."""
    heard: list[tuple[int, str]] = [(index, level) for index, step in enumerate(told(dynamics)) for level in step]
    if min(dynamics) < WARN_BELOW:
        assert "warning" in {level for _, level in heard}
    elif min(dynamics) < NOTE_BELOW:
        assert {level for _, level in heard} == {"note"}
    else:
        assert heard == []
    for (before, _), (after, level) in zip(heard, heard[1:], strict=False):
        limit = WARN_BELOW if level == "warning" else NOTE_BELOW
        last_fall = max((index for index, other in heard if other == level and index <= before), default=None)
        if last_fall is not None:
            assert max(dynamics[last_fall:after]) >= limit + REARM


def test_a_notice_is_data() -> None:
    (notice,), _ = collapse_notices(metrics(1.38, 0.25), {}, 4)
    assert notice == Notice("dynamic_routing_entropy", "warning", notice.message)
