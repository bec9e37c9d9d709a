import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.data.prefetch import prefetch


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Numbers:
    """0, 1, 2, ... as a generator that tells what was made of it."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.made, self.closed_in, self.progress = 0, "", threading.Semaphore(0)
        self.fail_at = fail_at

    def __iter__(self) -> Iterator[int]:
        try:
            while self.made != self.fail_at:
                self.made += 1
                self.progress.release()
                yield self.made - 1
            raise OSError("disk gone")
        finally:
            self.closed_in = threading.current_thread().name

    def wait_for(self, items: int) -> None:
        for _ in range(items):
            assert self.progress.acquire(timeout=60)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers()), st.integers(1, 5))
def test_items_come_in_order(items: list[int], depth: int) -> None:
    assert list(prefetch(items, depth)) == items
    assert list(prefetch(prefetch(iter(items), depth), 1)) == items


@pytest.mark.parametrize("depth", [1, 3])
def test_runs_ahead_as_far_as_asked_and_no_further(depth: int) -> None:
    numbers = Numbers()
    with closing(prefetch(numbers, depth)) as items:
        for consumed in range(1, 6):
            next(items)
            numbers.wait_for(depth + 1 if consumed == 1 else 1)  # what is ahead is made without being asked for
            assert not numbers.progress.acquire(timeout=0.02)
            assert numbers.made == consumed + depth


def test_an_error_is_raised_in_its_place() -> None:
    numbers, seen = Numbers(fail_at=3), []
    with pytest.raises(OSError, match="disk gone") as raised:
        for number in prefetch(numbers, 10):
            seen.append(number)
    assert seen == [0, 1, 2] and numbers.closed_in == "prefetch"
    assert raised.traceback[-1].name == "__iter__"  # where it happened, not where it was passed on


def test_no_iterator_is_an_error_too() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        list(prefetch(5, 1))  # type: ignore[arg-type]


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        list(prefetch([1], 0))


@pytest.mark.parametrize("consumed", [1, 4])
def test_close_stops_the_thread_and_closes_the_items(consumed: int) -> None:
    numbers = Numbers()
    held = iter(numbers)
    items = prefetch(held, 2)
    for _ in range(consumed):
        next(items)
    items.close()
    assert numbers.closed_in == "prefetch" and numbers.made <= consumed + 2
    assert list(items) == []


def test_close_before_the_first_item_starts_nothing() -> None:
    numbers = Numbers()
    prefetch(numbers, 2).close()
    assert numbers.made == 0


def test_close_reaches_through_a_pipeline() -> None:
    """The outer thread waits for a permit, the inner one too: both end."""
    numbers = Numbers()
    items = prefetch((number * 2 for number in prefetch(numbers, 2)), 2)
    assert [next(items), next(items)] == [0, 2]
    numbers.wait_for(6)  # two consumed, two ahead in each thread: all are waiting
    items.close()
    assert numbers.closed_in == "prefetch"


def test_close_waits_for_the_item_in_the_making() -> None:
    entered, leave, ended = threading.Event(), threading.Event(), []

    def slow() -> Iterator[int]:
        try:
            yield 0
            entered.set()
            assert leave.wait(60)
            yield 1
        finally:
            ended.append(True)

    items = prefetch(slow(), 1)
    next(items)
    assert entered.wait(60)
    threading.Timer(0.05, leave.set).start()
    items.close()
    assert ended == [True]


def test_an_error_of_the_consumer_frees_the_thread() -> None:
    numbers = Numbers()

    def consume() -> None:
        for number in prefetch(numbers, 2):
            raise KeyError(number)

    with pytest.raises(KeyError):
        consume()
    # The error keeps the loop's frame and with it the generator; pytest.raises let go of it.
    gc.collect()
    assert numbers.closed_in == "prefetch"


def test_garbage_collection_of_a_cycle_frees_the_thread() -> None:
    numbers = Numbers()
    cycle: list[object] = [prefetch(numbers, 2)]
    next(cycle[0])  # type: ignore[call-overload]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert numbers.closed_in == "prefetch"


def test_garbage_collection_within_the_thread_itself() -> None:
    """The collector runs in whatever thread is at work: also in the one that it is to stop."""
    dropped, collected = threading.Event(), threading.Event()

    def collecting() -> Iterator[int]:
        yield 0
        assert dropped.wait(60)
        gc.collect()
        collected.set()
        yield 1

    gc.disable()
    try:
        cycle: list[object] = [prefetch(collecting(), 1)]
        next(cycle[0])  # type: ignore[call-overload]
        cycle.append(cycle)
        thread = next(one for one in threading.enumerate() if one.name == "prefetch")
        del cycle
        dropped.set()
        assert collected.wait(60)
    finally:
        gc.enable()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("seconds", [0, 3600])
def test_the_end_of_the_program_is_not_held_up(seconds: int) -> None:
    """The generator is still open when the interpreter ends; its thread waits for a permit, or is at work."""
    code = f"""
import itertools, time
from polyglu.data.prefetch import prefetch
items = prefetch((time.sleep({seconds} * (number == 2)) or number for number in itertools.count()), 5)
print(next(items), next(items))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n", "")
