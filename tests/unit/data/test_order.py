from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.data import order as order_module
from polyglu.data.order import ROUNDING, MixSchedule, SampleOrder, cumulative_quotas, permute

PAPER = MixSchedule(start=(0.70, 0.25, 0.05), end=(0.85, 0.10, 0.05), anneal_start=0.8, total_steps=19531)


def test_paper_mix() -> None:
    assert PAPER.at(0) == pytest.approx([0.70, 0.25, 0.05])
    assert PAPER.at(int(19531 * 0.8)) == pytest.approx([0.70, 0.25, 0.05])
    assert PAPER.at(19531) == pytest.approx([0.85, 0.10, 0.05])
    assert PAPER.at(round(19531 * 0.9)) == pytest.approx([0.775, 0.175, 0.05], abs=1e-4)
    assert PAPER.at(np.arange(5)).shape == (5, 3)


def test_mix_without_annealing() -> None:
    flat = MixSchedule(start=(0.5, 0.5), end=(1.0, 0.0), anneal_start=1.0, total_steps=10)
    assert flat.at(10) == pytest.approx([0.5, 0.5])


@st.composite
def shares(draw: st.DrawFn, size: int) -> tuple[float, ...]:
    weights = draw(st.lists(st.integers(0, 20), min_size=size, max_size=size).filter(any))
    return tuple(weight / sum(weights) for weight in weights)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[MixSchedule, int]:
    size = draw(st.integers(1, 6))
    schedule = MixSchedule(
        start=draw(shares(size)),
        end=draw(shares(size)),
        anneal_start=draw(st.floats(0, 1)),
        total_steps=draw(st.integers(1, 60)),
    )
    return schedule, draw(st.integers(1, 7))


@settings(max_examples=300, deadline=None)
@given(schedules())
def test_quotas_are_exact(case: tuple[MixSchedule, int]) -> None:
    schedule, samples = case
    increments = schedule.at(np.arange(schedule.total_steps)) * samples
    targets = np.vstack([np.zeros(len(schedule.start)), increments.cumsum(0)])
    quotas = cumulative_quotas(targets, samples)
    assert (quotas.sum(1) == np.arange(schedule.total_steps + 1) * samples).all()
    assert (np.diff(quotas, axis=0) >= 0).all()
    assert np.abs(quotas - targets).max() < 1 + 1e-5


def plain_quotas(targets: np.ndarray, samples: int) -> list[list[int]]:
    """Earliest deadline first, sample by sample, as it stands in the books."""
    floors, ceilings = np.floor(targets + ROUNDING).astype(int), np.ceil(targets - ROUNDING).astype(int)
    taken, rows = [0] * targets.shape[1], []

    def deadline(source: int) -> int:
        late = np.flatnonzero(floors[:, source] > taken[source])
        return int(late[0]) if len(late) else len(floors)

    for step in range(len(floors)):
        while sum(taken) < step * samples:
            allowed = [source for source, most in enumerate(ceilings[step]) if taken[source] < most]
            taken[min(allowed, key=deadline)] += 1
        rows.append(list(taken))
    return rows


@settings(max_examples=300, deadline=None)
@given(schedules())
def test_quotas_are_those_of_the_plain_algorithm(case: tuple[MixSchedule, int]) -> None:
    schedule, samples = case
    increments = schedule.at(np.arange(schedule.total_steps)) * samples
    targets = np.vstack([np.zeros(len(schedule.start)), increments.cumsum(0)])
    assert cumulative_quotas(targets, samples).tolist() == plain_quotas(targets, samples)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_is_computed_place_by_place() -> None:
    everything = permute(np.arange(1000), 1000, 5)
    assert permute(np.array([17]), 1000, 5)[0] == everything[17]
    assert (everything != permute(np.arange(1000), 1000, 6)).any()
    huge = permute(np.array([3]), 10**12, 5)
    assert 0 <= huge[0] < 10**12


def order(samples: int = 8, seed: int = 0) -> SampleOrder:
    mix = MixSchedule(start=(0.6, 0.4), end=(0.8, 0.2), anneal_start=0.5, total_steps=50)
    return SampleOrder([37, 11], ["digest-a", "digest-b"], mix, samples, seed)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_thousand_steps_keep_the_mix_and_the_epochs(data: st.DataObject) -> None:
    """At every step of an annealed run: each source within one window of its target, no window twice in an epoch."""
    size = data.draw(st.integers(1, 5))
    mix = MixSchedule(
        start=data.draw(shares(size)),
        end=data.draw(shares(size)),
        anneal_start=data.draw(st.floats(0, 1)),
        total_steps=1000,
    )
    samples, seed = data.draw(st.integers(1, 16)), data.draw(st.integers(0, 2**32))
    windows = data.draw(st.lists(st.integers(1, 3000), min_size=size, max_size=size))
    run = SampleOrder(windows, [f"digest {index}" for index in range(size)], mix, samples, seed)
    drawn = [np.zeros(count, dtype=int) for count in windows]
    target = np.zeros(size)
    for step in range(1000):
        progress = max(0.0, (step / 1000 - mix.anneal_start) / (1 - mix.anneal_start)) if mix.anneal_start < 1 else 0.0
        target += [
            samples * (first + (last - first) * progress) for first, last in zip(mix.start, mix.end, strict=True)
        ]
        for source, window in zip(*run.step(step), strict=True):
            drawn[source][window] += 1
        for counts, wanted in zip(drawn, target, strict=True):
            assert abs(counts.sum() - wanted) < 1 + 1e-5
            assert counts.max() - counts.min() <= 1


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 20), block=st.integers(1, 200), steps=st.lists(st.integers(0, 49), min_size=1))
def test_a_step_depends_on_no_other(samples: int, block: int, steps: list[int]) -> None:
    """Neither on the steps that were asked for before, nor on the steps that are computed together."""
    run = order(samples)
    with patch.object(order_module, "BLOCK_SAMPLES", block):
        for step in steps:
            fresh, again = order(samples).step(step), run.step(step)
            assert [values.tolist() for values in fresh] == [values.tolist() for values in again]
    alone, together = order(samples), order(samples)
    with patch.object(order_module, "BLOCK_SAMPLES", 1):
        one_by_one = [alone.step(step)[1].tolist() for step in range(50)]
    assert one_by_one == [together.step(step)[1].tolist() for step in range(50)]


def test_a_step_before_the_run_is_refused() -> None:
    with pytest.raises(IndexError, match="step -1 of a run"):
        order().step(-1)


@settings(max_examples=40, deadline=None)
@given(schedules(), st.data())
def test_steps_beyond_the_run_go_on_with_its_last_mix(case: tuple[MixSchedule, int], data: st.DataObject) -> None:
    """They stand in for data that was passed over: quotas of the end, epochs that go on, nothing twice in an epoch."""
    mix, samples = case
    size, steps = len(mix.start), mix.total_steps
    windows = data.draw(st.lists(st.integers(1, 40), min_size=size, max_size=size))
    digests = [f"digest {index}" for index in range(size)]
    run, beyond = SampleOrder(windows, digests, mix, samples, 0), data.draw(st.integers(1, 70))
    drawn = [np.zeros(count, dtype=int) for count in windows]
    for step in range(steps + beyond):
        sources, places = run.step(step)
        assert len(sources) == samples
        for source, window in zip(sources, places, strict=True):
            drawn[source][window] += 1
        if step == steps - 1:
            taken = [counts.sum() for counts in drawn]
        assert all(counts.max() - counts.min() <= 1 for counts in drawn)
    last = mix.at(steps) * samples
    for counts, before, share in zip(drawn, taken, last, strict=True):
        assert abs(counts.sum() - before - beyond * share) < 1 + 1e-5 + beyond // steps  # exact in each length of a run
    assert [values.tolist() for values in SampleOrder(windows, digests, mix, samples, 0).step(step)] == [
        sources.tolist(), places.tolist()
    ]  # fmt: skip


@pytest.mark.parametrize("block", [1, 24, 8192])
def test_the_steps_of_the_run_do_not_depend_on_those_beyond_it(block: int) -> None:
    with patch.object(order_module, "BLOCK_SAMPLES", block):
        first, late = order(), order()
        late.step(170)
        for step in (0, 17, 49, 50, 51, 101, 170):
            assert [values.tolist() for values in first.step(step)] == [values.tolist() for values in late.step(step)]


def test_the_order_of_a_run_stays_what_it_was() -> None:
    """Another order would make a resumed run skip and repeat: a run's first samples, as (source, window)."""
    assert [order().sample(index) for index in range(8)] == [
        (1, 1), (0, 3), (1, 5), (0, 36), (0, 14), (0, 6), (0, 24), (1, 0)
    ]  # fmt: skip


def test_order_is_a_pure_function_of_the_step() -> None:
    forward = [order().sample(index) for index in range(400)]
    backward = [order().sample(index) for index in reversed(range(400))]
    assert forward == backward[::-1]


def windows_of(seed: int, digest: str) -> list[int]:
    """Windows of five epochs of a single source, a window a step."""
    run = SampleOrder([40], [digest], MixSchedule((1.0,), (1.0,), 1.0, total_steps=200), 1, seed)
    return [run.sample(index)[1] for index in range(200)]


def test_order_follows_seed_and_data() -> None:
    assert windows_of(0, "a") == windows_of(0, "a")
    assert len({tuple(windows_of(seed, digest)) for seed in (0, 1) for digest in ("a", "b")}) == 4


def test_each_epoch_has_an_order_of_its_own() -> None:
    windows = windows_of(0, "a")
    epochs = [tuple(windows[start : start + 40]) for start in range(0, 200, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len(set(epochs)) == 5


def test_large_run_starts_at_once() -> None:
    """The paper's run: no list of samples is ever made."""
    paper = SampleOrder([1_700_000, 600_000, 120_000], ["a", "b", "c"], PAPER, 128, 0)
    sources, windows = paper.step(19530)
    assert len(sources) == 128
    assert (np.bincount(sources, minlength=3) / 128) == pytest.approx([0.85, 0.10, 0.05], abs=1.1 / 128)
    assert windows.max() < 1_700_000


def test_the_mix_of_a_step_is_its_own() -> None:
    """Not that of the step before: with samples enough, each step's counts are its shares exactly."""
    mix = MixSchedule(start=(1.0, 0.0), end=(0.0, 1.0), anneal_start=0.0, total_steps=5)
    run = SampleOrder([100, 100], ["a", "b"], mix, samples_per_step=10, seed=0)
    assert [int(run.step(step)[0].sum()) for step in range(5)] == [0, 2, 4, 6, 8]
