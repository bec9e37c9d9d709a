"""Progress of long work with the time left, on stderr: a bar on a terminal, else a line of the log now and then."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from polyglu import logs

LINE_SECONDS = 30.0
"""Between two lines of the log."""

logger = logging.getLogger(__name__)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """While the context lasts, show how much is done and how long the rest will take.

    Args:
        description: of the work.
        total: how much there is; nothing is shown if that is 0.

    Returns:
        A function that is told how much more is done.
    """
    if not total:
        yield lambda _more: None
    elif logs.console(stderr=True).is_terminal:
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with logs.progress(BarColumn(), MofNCompleteColumn(), *times) as bar:
            task = bar.add_task(description, total=total)
            yield lambda more: bar.advance(task, more)
    else:
        yield _Lines(description, total).advance


class _Lines:
    """Progress as lines of the log."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done = description, total, 0
        self.started = self.told = time.monotonic()

    def advance(self, more: int) -> None:
        self.done += more
        now = time.monotonic()
        if now - self.told < LINE_SECONDS or self.done == 0:
            return
        self.told = now
        left = timedelta(seconds=round((now - self.started) / self.done * (self.total - self.done)))
        logger.info("%s: %d of %d, about %s left", self.description, self.done, self.total, left)
