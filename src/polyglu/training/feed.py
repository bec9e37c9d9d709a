"""A rank's batches on their way to the loop: made ahead in a thread, pinned for the copy to a GPU."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from polyglu.data.dataloader import MicroBatch
from polyglu.data.prefetch import prefetch

STEPS_AHEAD = 2
"""Steps whose batches are made while an earlier one trains."""

Step = tuple[Sequence[MicroBatch], int]
"""Micro batches of a step, and the number of their targets."""


class Loader(Protocol):
    """Makes this rank's micro batches of any step of a run."""

    def step(self, index: int) -> Sequence[MicroBatch]:
        """Micro batches of the step's batch; called in a thread, up to ``STEPS_AHEAD`` steps ahead."""

    def recut(self) -> "Loader | None":
        """A loader of the same rows in smaller micro batches; None if they cannot be smaller."""


class Feed:
    """Gives the batches of a loader in order, made ahead; a jump, another end, or another loader, begins anew."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self._next = (-1, -1)
        self._ready: Generator[Step, None, None] | None = None

    def step(self, index: int, end: int) -> Step:
        """The batch at ``index``; those up to ``end`` may be made ahead."""
        if self._ready is None or (index, end) != self._next:
            self.close()
            batches = host_batches(self.loader, range(index, end), self.device)
            self._ready = prefetch(batches, STEPS_AHEAD)
        self._next = (index + 1, end)
        return next(self._ready)

    def use(self, loader: Loader) -> None:
        """Go on with another loader."""
        self.close()
        self.loader = loader

    def close(self) -> None:
        """End the thread."""
        if self._ready is not None:
            self._ready.close()
            self._ready = None


def host_batches(loader: Loader, steps: Iterable[int], device: torch.device) -> Iterator[Step]:
    """Micro batches of each step, ready to be copied to the device, and the number of their targets."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has a current device of its own
    for step in steps:
        made = loader.step(step)
        n_targets = sum(batch.n_targets for batch in made)
        yield [batch.pin_memory() for batch in made] if device.type == "cuda" else made, n_targets
