"""Being asked to stop: SIGTERM and SIGINT end a run after its step; a second SIGINT ends the process at once."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

logger = logging.getLogger(__name__)


class Stop:
    """Whether somebody asked this process to stop."""

    requested = False


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn SIGTERM and SIGINT into a request while the context lasts; outside the main thread nothing is caught."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # even a process that waits inside a collective dies of the next
        if not stop.requested:
            stop.requested = True
            again = "; Ctrl-C again quits at once" if number == signal.SIGINT else ""
            with suppress(RuntimeError):  # the console may be in the middle of a message
                logger.warning("%s: finishing the step, then saving%s", signal.Signals(number).name, again)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
