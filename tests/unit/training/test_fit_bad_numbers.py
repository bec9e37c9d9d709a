"""Numbers that go wrong in the loop: steps that are left out, returns to a checkpoint, interruptions on the way."""

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_run import ROWS, Rows, Run, StopAt, plan_of, steps_bad

from polyglu.errors import Interrupted, PolygluError
from polyglu.training import saver
from polyglu.training.checkpoint import newest_whole
from polyglu.training.guard import SPIKE_MINIMUM


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


BAD = [
    (kind, value)
    for kind in ("loss", "times", "penalty", "gradient")
    for value in (math.nan, math.inf, -math.inf)
    if (kind, value) != ("times", -math.inf)
]


@pytest.mark.parametrize("place", [0, ROWS - 1])  # in the first micro batch, in the last
@pytest.mark.parametrize(("kind", "value"), BAD)
def test_nothing_of_a_bad_step_reaches_the_weights(tmp_path: Path, kind: str, value: float, place: int) -> None:
    run = Run(tmp_path, plan_of(6), steps_bad(2, kind=kind, value=value, place=place))
    state = run.go()
    assert [step.unchanged for step in run.engine.watched] == [False, False, True, False, False, False]
    assert (state.step, state.skipped, state.bad_in_a_row, state.passed, run.engine.updates) == (6, 1, 0, 0, 5)
    assert len(state.losses) == 5 and all(math.isfinite(loss) for loss in state.losses)
    assert [row["train/skipped_steps"] for row in run.rows()] == [0, 0, 1, 1, 1, 1]
    assert run.events() == [(3, "step skipped")]
    (event,) = map(json.loads, (tmp_path / "run/events.jsonl").read_text().splitlines())
    what = "loss" if kind in ("loss", "times") else "gradient"
    assert event["level"] == "warning" and event["message"] == f"the {what} is not finite: no update, 1 so far"


def test_steps_after_a_bad_one_are_as_if_it_had_not_been(tmp_path: Path) -> None:
    """The gradient that was left out leaves nothing behind: neither in the moments nor in the next gradient."""

    class Without(Rows):
        def step(self, index: int) -> Any:
            return super().step(index if index < 1 else index + 1)

    plan = plan_of(4, learning_rate=lambda _: 1e-3, tau=lambda _: 0.5)
    bad, without = Run(tmp_path / "bad", plan, steps_bad(1)), Run(tmp_path / "good", plan_of(3, **vars_of(plan)))
    bad.go()
    without.go(loader=Without())
    for one, other in zip(bad.engine.bits(), without.engine.bits(), strict=True):
        assert torch.equal(one, other)


def vars_of(plan: Any) -> dict[str, Any]:
    return {"learning_rate": plan.learning_rate, "tau": plan.tau}


def test_two_bad_steps_and_a_good_one_are_no_reason_to_go_back(tmp_path: Path) -> None:
    run = Run(tmp_path, plan_of(9), steps_bad(1, 2, 4, 5, 7))
    state = run.go()
    assert run.trained == [0, 3, 6, 8] and (state.skipped, state.rollbacks, state.passed) == (5, 0, 0)


def test_no_checkpoint_is_kept_of_a_bad_step(tmp_path: Path) -> None:
    run = Run(tmp_path, plan_of(9), steps_bad(3, 7))
    run.go()
    assert [path.name for path in sorted((tmp_path / "ds_checkpoint").iterdir())] == ["step_00000000", "step_00000009"]


def test_three_in_a_row_go_back_and_pass_over_the_data_since_then(tmp_path: Path) -> None:
    run = Run(tmp_path, plan_of(12), steps_bad(5, 6, 7))
    state = run.go()
    # Back to step 4: its batches 4 to 7 are passed over, and the run goes on with 8 until it has its 12 steps.
    assert run.trained == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 15]
    assert (state.step, state.passed, state.skipped, state.rollbacks, state.bad_in_a_row) == (12, 4, 3, 1, 0)
    assert run.events() == [(6, "step skipped"), (7, "step skipped"), (8, "step skipped"), (8, "rollback")]
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row.get("repeated") for row in rows] == [None] * 4 + [1] * 4 + [None] * 4
    replaced = [json.loads(line) for line in (tmp_path / "run/metrics_replaced.jsonl").read_text().splitlines()]
    assert [(row["step"], row["replaced_by"]) for row in replaced] == [(5, 1), (6, 1), (7, 1), (8, 1)]
    assert all(path.name.startswith("step_") for path in (tmp_path / "ds_checkpoint").iterdir())


def test_what_follows_a_return_has_the_bits_of_the_checkpoint(tmp_path: Path) -> None:
    """Weights, moments and their count: as a run that never saw the data that is passed over."""

    class Without(Rows):
        def step(self, index: int) -> Any:
            return super().step(index if index < 4 else index + 4)

    run, without = Run(tmp_path / "bad", plan_of(12), steps_bad(5, 6, 7)), Run(tmp_path / "good", plan_of(12))
    run.go()
    without.go(loader=Without())
    for one, other in zip(run.engine.bits(), without.engine.bits(), strict=True):
        assert torch.equal(one, other)
    assert [row["train/loss"] for row in run.rows()] == [row["train/loss"] for row in without.rows()]


def test_the_first_checkpoint_is_enough_to_go_back_to(tmp_path: Path) -> None:
    run = Run(tmp_path, plan_of(6, checkpoint_every=100), steps_bad(0, 1, 2))
    state = run.go()
    assert run.trained == [3, 4, 5, 6, 7, 8] and (state.step, state.passed, state.rollbacks) == (6, 3, 1)


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_run_that_stays_bad_gives_up_with_its_last_good_checkpoint(tmp_path: Path, most: int) -> None:
    run = Run(tmp_path, plan_of(12, max_rollbacks=most), steps_bad(*range(5, 100)))
    message = rf"^training failed at step 7: 3 steps in a row without an update, after {most} returns .*max_rollbacks"
    with pytest.raises(PolygluError, match=message if most else message.replace("step 7", "step 8")) as raised:
        run.go()
    assert str(raised.value).count("\n") == 0
    point = newest_whole(tmp_path / "ds_checkpoint")
    assert point is not None and (point.state.step, point.state.bad_in_a_row) == (4, 0)
    assert [kind for _, kind in run.events()].count("rollback") == most


def test_a_run_that_gives_up_ends_the_save_that_is_under_way(tmp_path: Path) -> None:
    """A slow disk: the checkpoint of the last good step is still being written when the third bad step is over."""
    write, run = saver.write_shard, Run(tmp_path, plan_of(12, max_rollbacks=0), steps_bad(4, 5, 6))

    def slow(file: Any, pieces: Any) -> None:
        threading.Event().wait(0.3 if run.engine.watched else 0)
        write(file, pieces)

    with patch.object(saver, "write_shard", slow), pytest.raises(PolygluError, match="training failed"):
        run.go()
    point = newest_whole(tmp_path / "ds_checkpoint")
    assert point is not None and point.state.step == 4


STREAK = st.integers(0, 5).map(lambda first: {first, first + 1, first + 2})
BAD_STEPS = st.one_of(STREAK, st.tuples(STREAK, STREAK).map(lambda two: two[0] | {step + 4 for step in two[1]}))


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    bad=BAD_STEPS,
    steps=st.integers(4, 8),
    every=st.integers(1, 4),
    stops=st.lists(st.integers(0, 6), min_size=1, max_size=3),
)
def test_interruptions_change_no_bit_whatever_goes_wrong(
    tmp_path_factory: pytest.TempPathFactory, bad: set[int], steps: int, every: int, stops: list[int]
) -> None:
    """Among bad steps, between a return and the next checkpoint, several times in a row: also whether the run fails."""
    plan, root = plan_of(steps, checkpoint_every=every, max_rollbacks=2), tmp_path_factory.mktemp("runs")
    whole, parts = Run(root / "whole", plan, steps_bad(*bad)), Run(root / "parts", plan, steps_bad(*bad))
    with patch("os.fsync", lambda _: None):
        expected = ended(whole)
        for at in stops:
            try:
                parts.go(StopAt(at))
            except Interrupted as interrupted:
                assert "saved in" in str(interrupted)
            except PolygluError:
                pass
        assert ended(parts) == expected
    if expected is None:
        assert parts.state == whole.state
        for one, other in zip(parts.engine.bits(), whole.engine.bits(), strict=True):
            assert torch.equal(one, other)
        assert numbers(parts) == numbers(whole)


def ended(run: Run) -> str | None:
    try:
        run.go()
    except PolygluError as error:
        return str(error)
    return None


def numbers(run: Run) -> list[tuple[Any, ...]]:
    keys = ("step", "train/loss", "train/grad_norm", "train/tau", "train/skipped_steps", "repeated")
    return [tuple(repr(row.get(key)) for key in keys) for row in run.rows()]


# --- spikes


def spiky(folder: Path, *steps: int, skip: bool, **settings: Any) -> Run:
    plan = plan_of(SPIKE_MINIMUM + 7, skip_spikes=skip, checkpoint_every=SPIKE_MINIMUM, **settings)
    return Run(folder, plan, steps_bad(*steps, kind="times", value=30.0))


def test_a_spike_is_reported_and_trained_on_by_default(tmp_path: Path) -> None:
    early, late = (spiky(tmp_path / str(step), step, skip=False) for step in (SPIKE_MINIMUM - 1, SPIKE_MINIMUM))
    for one, events in ((early, []), (late, [(SPIKE_MINIMUM + 1, "loss spike")])):  # first too few to compare with
        state = one.go()
        assert one.events() == events and len(one.trained) == state.step and state.skipped == 0


def test_a_spike_is_skipped_where_that_is_configured_and_three_go_back(tmp_path: Path) -> None:
    first = SPIKE_MINIMUM + 2
    one, three = spiky(tmp_path / "1", first, skip=True), spiky(tmp_path / "3", *range(first, first + 3), skip=True)
    state = one.go()
    assert one.events() == [(first + 1, "step skipped")] and one.engine.watched[first].unchanged
    assert (state.skipped, len(state.losses)) == (1, state.step - 1) and first not in one.trained
    state = three.go()
    assert [kind for _, kind in three.events()] == ["step skipped"] * 3 + ["rollback"]
    assert state.rollbacks == 1 and not {first, first + 1, first + 2} & set(three.trained)
    assert state.passed == 5 and three.trained[-1] == three.plan.total_steps - 1 + 5
    message = json.loads((tmp_path / "1/run/events.jsonl").read_text())["message"]
    assert "far above the latest ones: no update, 1 so far" in message
