"""Batches on their way to the loop: in order, ahead in a thread, anew after a jump."""

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import ROWS, Rows

from polyglu.errors import PolygluError
from polyglu.training.feed import STEPS_AHEAD, Feed, host_batches

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def first_row(feed: Feed, index: int, end: int) -> int:
    batches, n_targets = feed.step(index, end)
    assert n_targets == sum(batch.n_targets for batch in batches)
    return int(batches[0].sample_ids[0]) // ROWS


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(1, 4), st.booleans()), max_size=5))
def test_whatever_is_asked_for_comes(courses: list[tuple[int, int, int, bool]]) -> None:
    """Jumps, another end, another loader, in any order: each step gets its own batch."""
    feed = Feed(Rows(4), CPU)
    for start, length, spare, anew in courses:
        if anew:
            feed.use(Rows(2))
        for index in range(start, start + length):
            assert first_row(feed, index, start + length + spare) == index
    feed.close()


def test_an_end_that_moves_while_batches_are_on_their_way() -> None:
    """After a return the run ends later in the data, though the next batch is the one after the last."""
    feed = Feed(Rows(), CPU)
    assert [first_row(feed, index, 3) for index in range(3)] == [0, 1, 2]
    assert [first_row(feed, index, 6) for index in range(3, 6)] == [3, 4, 5]
    feed.close()


def test_no_more_is_made_than_the_run_needs_and_little_ahead() -> None:
    loader = Rows()
    feed = Feed(loader, CPU)
    for index in range(5):
        feed.step(index, 5)
        assert max(loader.asked) <= min(4, index + STEPS_AHEAD + 1)
    feed.close()
    assert loader.asked == [0, 1, 2, 3, 4] and loader.threads == {"prefetch"}


def test_an_error_comes_in_its_step() -> None:
    feed = Feed(Rows(bad_step=2), CPU)
    assert [first_row(feed, index, 9) for index in range(2)] == [0, 1]
    with pytest.raises(PolygluError, match="step 2 has a bad token"):
        feed.step(2, 9)


def test_host_batches_count_the_targets_of_each_step() -> None:
    made = list(host_batches(Rows(), range(2), CPU))
    assert [n_targets for _, n_targets in made] == [7 * ROWS] * 2
    assert [batch.sample_ids.tolist() for batches, _ in made for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_host_batches_are_page_locked_for_a_gpu() -> None:
    (batches, _), *_ = host_batches(Rows(), range(1), torch.device("cuda", 0))
    for batch, plain in zip(batches, Rows().step(0), strict=True):
        assert batch.input_ids.is_pinned() and batch.targets.is_pinned() and batch.sample_ids.is_pinned()
        moved = batch.to(torch.device("cuda", 0))
        assert torch.equal(moved.input_ids.cpu(), plain.input_ids) and torch.equal(moved.targets.cpu(), plain.targets)
