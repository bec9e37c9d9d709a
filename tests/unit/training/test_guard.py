"""The run's memory of itself as arithmetic: what is a fault, what is counted, where a return leads."""

import json
import math
import random
import statistics
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from polyglu.training.guard import (
    BAD_IN_A_ROW,
    SMALLEST_DEVIATION,
    SPIKE_DEVIATIONS,
    SPIKE_MINIMUM,
    SPIKE_WINDOW,
    RunState,
)

LOSSES = st.floats(1e-3, 100)
WINDOWS = st.lists(LOSSES, max_size=SPIKE_WINDOW).map(tuple)
COUNTS = st.integers(0, 10**9)
STATES = st.builds(
    RunState,
    step=COUNTS,
    passed=COUNTS,
    skipped=COUNTS,
    bad_in_a_row=st.integers(0, BAD_IN_A_ROW),
    rollbacks=COUNTS,
    losses=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=SPIKE_WINDOW).map(tuple),
    wandb_id=st.none() | st.text(max_size=8),
)


@given(WINDOWS, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_loss_that_is_not_finite_is_a_fault_from_the_first_step_on(window: tuple[float, ...], loss: float) -> None:
    assert RunState(losses=window).fault_of(loss) == "not finite"


@given(WINDOWS.filter(lambda window: len(window) < SPIKE_MINIMUM), st.floats(0, 3e38))
def test_nothing_is_a_spike_before_there_is_enough_to_compare_with(window: tuple[float, ...], loss: float) -> None:
    assert RunState(losses=window).fault_of(loss) is None


@given(st.lists(LOSSES, min_size=SPIKE_MINIMUM, max_size=SPIKE_WINDOW).map(tuple))
def test_six_deviations_above_the_mean_make_a_spike(window: tuple[float, ...]) -> None:
    mean = sum(window) / len(window)
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in window) / len(window))
    threshold = mean + 6 * max(deviation, 0.005 * mean)
    state = RunState(losses=window)
    assert state.fault_of(threshold * 1.0001) == "spike"
    assert state.fault_of(threshold * 0.9999) is None
    assert state.fault_of(0.0) is None  # far below is no fault


def test_the_constants_are_those_of_the_documentation() -> None:
    assert (SPIKE_DEVIATIONS, SPIKE_MINIMUM, SPIKE_WINDOW, SMALLEST_DEVIATION) == (6.0, 20, 100, 0.005)
    assert BAD_IN_A_ROW == 3


@given(LOSSES, st.integers(SPIKE_MINIMUM, SPIKE_WINDOW))
def test_a_flat_window_leaves_room_for_noise(level: float, length: int) -> None:
    state = RunState(losses=(level,) * length)
    assert state.fault_of(level) is None and state.fault_of(level * 1.029) is None
    assert state.fault_of(level * 1.031) == "spike"


def test_noise_of_a_usual_kind_is_no_spike() -> None:
    """A loss that falls slowly, with a deviation of 2%: no false alarm in two thousand steps."""
    generator = random.Random(0)
    state = RunState()
    for step in range(2000):
        loss = (2 + 8 / (1 + step / 50)) * generator.gauss(1, 0.02)
        assert state.fault_of(loss) is None
        state = state.after_step(loss, updated=True)


@given(STATES.filter(lambda state: state.bad_in_a_row < BAD_IN_A_ROW), LOSSES)
def test_a_good_step_ends_a_streak_and_joins_the_window(state: RunState, loss: float) -> None:
    after = state.after_step(loss, updated=True)
    expected = [*state.losses, loss][-SPIKE_WINDOW:]
    assert after == replace(state, step=state.step + 1, bad_in_a_row=0, losses=tuple(expected))


def test_the_window_holds_the_latest_losses() -> None:
    state = RunState()
    for loss in range(1, SPIKE_WINDOW + 9):
        state = state.after_step(float(loss), updated=True)
    assert state.losses == tuple(float(loss) for loss in range(9, SPIKE_WINDOW + 9))


@given(STATES, st.floats())
def test_a_bad_step_is_counted_and_its_loss_forgotten(state: RunState, loss: float) -> None:
    after = state.after_step(loss, updated=False)
    expected = {"step": state.step + 1, "skipped": state.skipped + 1, "bad_in_a_row": state.bad_in_a_row + 1}
    assert after == replace(state, **expected)


@given(st.data())
def test_no_batch_comes_twice_and_none_is_lost_but_those_passed_over(data: st.DataObject) -> None:
    """Any course of good steps, bad steps, checkpoints and returns, against a list of batches written by hand."""
    state = RunState()
    saved, fed, passed_over = [state], [], []
    for good in data.draw(st.lists(st.booleans(), max_size=60)):
        fed.append(state.step + state.passed)
        state = state.after_step(1.0, updated=good)
        if state.bad_in_a_row == BAD_IN_A_ROW:
            point = data.draw(st.sampled_from(saved))
            saved = saved[: saved.index(point) + 1]
            state = state.rolled_back_to(point)
            passed_over.append(state.passed)
            assert (state.step, state.losses, state.bad_in_a_row) == (point.step, point.losses, 0)
        elif not state.bad_in_a_row and data.draw(st.booleans()):
            saved.append(state)
        assert state.step + state.passed == len(fed)  # the next batch is the one after the last
    assert fed == list(range(len(fed))) and passed_over == sorted(passed_over)
    assert state.rollbacks == len(passed_over)


@given(STATES, STATES)
def test_a_return_keeps_the_counts_of_the_run(now: RunState, good: RunState) -> None:
    back = now.rolled_back_to(good)
    assert (back.skipped, back.rollbacks, back.step) == (now.skipped, now.rollbacks + 1, good.step)
    assert back.step + back.passed == now.step + now.passed and back.wandb_id == good.wandb_id


@given(STATES)
def test_a_state_comes_back_from_json_to_the_last_bit(state: RunState) -> None:
    text = json.dumps(asdict(state))
    assert TypeAdapter(RunState).validate_json(text, strict=True) == state
    assert "NaN" not in text and "Infinity" not in text


@pytest.mark.parametrize("change", [{"step": 1.5}, {"losses": ["1"]}, {"skipped": None}, {"rollbacks": "3"}])
def test_a_state_of_other_types_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(RunState).validate_json(json.dumps(asdict(RunState()) | change), strict=True)


@given(st.lists(LOSSES, min_size=SPIKE_MINIMUM, max_size=40))
def test_faults_follow_from_the_state_alone(losses: list[float]) -> None:
    """The window is what counts, not how it came about: a resumed run decides as the one that was not interrupted."""
    state = RunState()
    for loss in losses:
        state = state.after_step(loss, updated=True)
    again = TypeAdapter(RunState).validate_json(json.dumps(asdict(state)), strict=True)
    for loss in (statistics.fmean(losses), max(losses) * 2, math.nan):
        assert state.fault_of(loss) == again.fault_of(loss)
