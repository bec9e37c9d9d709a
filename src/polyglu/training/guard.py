"""What a run remembers of itself, and what it does about numbers that go wrong. Pure: a state in, the next one out.

    loss of the step, before its update ──► fault_of() ──► none | "not finite" | "spike"
    gradient's norm                     ──► after_step() ──► the next state; three bad steps in a row ask for a rollback

A step is bad if its update was not made: its loss or gradient was not finite, or it was a spike and
``on_loss_spike: skip`` is set. Nothing here depends on rank, time or engine, so every rank decides the same.
"""

import math
import statistics
from dataclasses import dataclass, replace
from typing import Literal

Fault = Literal["not finite", "spike"]

BAD_IN_A_ROW = 3
"""Bad steps after which the run returns to its last good checkpoint."""
SPIKE_DEVIATIONS = 6.0
"""Standard deviations above the window's mean from which on a loss is a spike."""
SPIKE_WINDOW = 100
"""Latest losses that a loss is compared with."""
SPIKE_MINIMUM = 20
"""Losses without which nothing is called a spike."""
SMALLEST_DEVIATION = 0.005
"""Share of the mean below which a deviation is taken for chance: a window can be flatter than the noise to come."""


@dataclass(frozen=True)
class RunState:
    """Where a run is; it travels in each resume checkpoint."""

    step: int = 0
    """Steps done, those without an update included."""
    passed: int = 0
    """Batches that rollbacks passed over: step ``s`` is trained on batch ``s + passed``."""
    due: int = 0
    """Step of the latest checkpoint that was due: rollbacks return to it, whatever an interruption saved since."""
    skipped: int = 0
    """Steps without an update in the whole run, those before a rollback included."""
    bad_in_a_row: int = 0
    """Bad steps since the last good one."""
    rollbacks: int = 0
    """Times that the run returned to an earlier checkpoint."""
    losses: tuple[float, ...] = ()
    """Losses of the latest good steps, at most ``SPIKE_WINDOW``."""
    wandb_id: str | None = None
    """The run's id at Weights & Biases."""

    def fault_of(self, loss: float) -> Fault | None:
        """What is wrong with the loss of the step in hand, in nats per token."""
        if not math.isfinite(loss):
            return "not finite"
        return "spike" if loss > self.spike else None

    @property
    def spike(self) -> float:
        """A loss above it is a spike, in nats per token; infinite while too few losses are known."""
        if len(self.losses) < SPIKE_MINIMUM:
            return math.inf
        mean = statistics.fmean(self.losses)
        deviation = max(statistics.pstdev(self.losses, mean), SMALLEST_DEVIATION * abs(mean))
        return mean + SPIKE_DEVIATIONS * deviation

    def largest_loss(self, skip_spikes: bool) -> float:
        """The largest finite loss of a step that may update the weights."""
        return self.spike if skip_spikes else math.inf

    def bars(self, loss: float, skip_spikes: bool) -> bool:
        """Whether a step of this loss must not update the weights."""
        return not (math.isfinite(loss) and loss <= self.largest_loss(skip_spikes))

    def after_step(self, loss: float, updated: bool) -> "RunState":
        """The state when the step is done.

        Args:
            loss: nats per token.
            updated: whether the weights were updated.
        """
        if not updated:
            return replace(self, step=self.step + 1, skipped=self.skipped + 1, bad_in_a_row=self.bad_in_a_row + 1)
        window = (*self.losses, loss)[-SPIKE_WINDOW:]
        return replace(self, step=self.step + 1, bad_in_a_row=0, losses=window)

    def rolled_back_to(self, good: "RunState") -> "RunState":
        """The state after a return to ``good``: the batches since then are passed over, what was counted stays."""
        passed = self.step + self.passed - good.step
        return replace(good, passed=passed, skipped=self.skipped, rollbacks=self.rollbacks + 1)
