import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.data.order import MixSchedule, SampleOrder, cumulative_quotas, permute

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


def test_every_window_once_an_epoch() -> None:
    drawn = [pair for step in range(50) for pair in zip(*(array.tolist() for array in order().step(step)), strict=True)]
    for source, size in ((0, 37), (1, 11)):
        windows = [window for one, window in drawn if one == source]
        assert len(windows) > 2 * size
        for start in range(0, len(windows), size):
            epoch = windows[start : start + size]
            # Within a step the order is shuffled, so an epoch's border may fall inside a step.
            if start + size <= len(windows):
                assert len(set(epoch)) >= size - 8
        first = [window for window in windows]
        counts = [first.count(window) for window in range(size)]
        assert max(counts) - min(counts) <= 1


def test_order_is_a_pure_function_of_the_step() -> None:
    forward = [order().sample(index) for index in range(400)]
    backward = [order().sample(index) for index in reversed(range(400))]
    assert forward == backward[::-1]


def test_order_follows_seed_and_data() -> None:
    same, other = order(), order(seed=1)
    assert any(same.sample(index) != other.sample(index) for index in range(20))


def test_large_run_starts_at_once() -> None:
    """The paper's run: no list of samples is ever made."""
    paper = SampleOrder([1_700_000, 600_000, 120_000], ["a", "b", "c"], PAPER, 128, 0)
    sources, windows = paper.step(19530)
    assert len(sources) == 128
    assert (np.bincount(sources, minlength=3) / 128) == pytest.approx([0.85, 0.10, 0.05], abs=1.1 / 128)
    assert windows.max() < 1_700_000
