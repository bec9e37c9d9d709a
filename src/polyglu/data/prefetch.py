"""Run an iterator ahead of its consumer, in a thread: reading, encoding and pinning happen while others work.

items ──► thread, at most ``depth`` items ahead ──► queue ──► consumer, in the same order
"""

import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """The last message of the thread."""

    error: BaseException | None


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yield ``items`` in order, made in one background thread that starts with the first ``next``.

    An exception among the items is raised in its place. However the generator ends (its items do, an exception,
    ``close``, garbage collection), the thread closes ``items`` if it is a generator, and has ended when this one has;
    that takes as long as the item that is being made just then.

    Args:
        items: what to run; nobody else may touch it from the first ``next`` on.
        depth: items that are made, at most, before the consumer asks for them.

    Raises:
        ValueError: ``depth`` is less than 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    # SimpleQueue alone is safe where this generator may be closed: in a garbage collection, whatever it interrupts.
    permits: SimpleQueue[None] = SimpleQueue()
    made: SimpleQueue[T | _End] = SimpleQueue()
    stopped = False

    def work() -> None:
        error = None
        try:
            iterator = iter(items)
            try:
                while True:
                    permits.get()
                    if stopped:
                        break
                    made.put(next(iterator))
            except StopIteration:
                pass
            finally:
                if isinstance(iterator, Generator):
                    iterator.close()
        except BaseException as raised:
            error = raised
        made.put(_End(error))

    for _ in range(depth):
        permits.put(None)
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(message := made.get(), _End):
            permits.put(None)
            yield message
        if message.error is not None:
            raise message.error
    finally:
        stopped = True
        permits.put(None)
        if thread is not threading.current_thread():  # where a collection may run too
            thread.join()
