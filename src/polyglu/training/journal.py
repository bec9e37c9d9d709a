"""What the loop tells of a run: events as they come, metrics at the steps that are logged. Only rank 0 speaks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.routing import dynamic_entropy, static_entropy
from polyglu.training.collapse import collapse_notices
from polyglu.training.devices import flops_of, peak_flops, peak_memory
from polyglu.training.engine import Engine
from polyglu.training.guard import Fault, RunState
from polyglu.training.metrics import Level, MetricsLog


@dataclass(frozen=True)
class StepNumbers:
    """A step in numbers."""

    loss: float
    """Nats per token."""
    grad_norm: float
    """Before clipping; not finite: the step made no update."""
    fault: Fault | None
    """What is wrong with the loss."""
    barred: bool
    """Whether that left out the update."""
    learning_rate: float
    tau: float
    tokens: int
    """Of this rank."""
    pairs: int
    """Of this rank: positions and those they attend to (``MicroBatch.attention_pairs``)."""


class Journal:
    """Tells of a run.

    Args:
        engine: what trains.
        metrics: where rank 0 logs; None on other ranks, where nothing is told.
        log_every: steps between rows of metrics.
        total_steps: steps of the run; the last is logged, and the first.
    """

    def __init__(self, engine: Engine, metrics: MetricsLog | None, log_every: int, total_steps: int) -> None:
        self.engine, self.metrics, self.log_every, self.total_steps = engine, metrics, log_every, total_steps
        self.flops = flops_of(engine.loss.model)
        self.peak = peak_flops(engine.ranks.device, engine.loss.compute_dtype) if metrics is not None else 0.0
        self.announced: dict[str, int] = {}
        self._begin()

    def _begin(self) -> None:
        """Begin to count what is done, and the time that it takes."""
        self.tokens, self.pairs, self.since, self.saving = 0, 0, time.perf_counter(), 0.0

    def tell(self, step: int, kind: str, message: str, level: Level) -> None:
        """Tell of an event."""
        if self.metrics is not None:
            self.metrics.event(step, kind, message, level)

    def sync(self) -> None:
        """Flush what is told to disk, as before a checkpoint that will not have it told again."""
        if self.metrics is not None:
            self.metrics.sync()

    def waited(self, seconds: float) -> None:
        """Note time that the loop spent on saving, which is no training."""
        self.saving += seconds

    def went_back(self, state: RunState) -> None:
        """Take back the metrics of the steps after the one that the run has returned to."""
        if self.metrics is not None:
            self.metrics.rewind(state.step, state.rollbacks)
        self._begin()

    def step(self, state: RunState, numbers: StepNumbers, routing: Sequence[Tensor]) -> None:
        """Tell of a step.

        Args:
            state: after it.
            numbers: of it.
            routing: token logits ``[B, S, K]`` of each routed layer, on the last micro batch.
        """
        self.tokens += numbers.tokens
        self.pairs += numbers.pairs
        if self.metrics is None:
            return
        wrong = f"the {'loss' if numbers.barred else 'gradient'} is not finite"
        if numbers.fault == "spike" and (numbers.barred or not state.bad_in_a_row):
            wrong = f"the loss is {numbers.loss:.4f}, far above the latest ones"
        if state.bad_in_a_row:
            self.tell(state.step, "step skipped", f"{wrong}: no update, {state.skipped} so far", "warning")
        elif numbers.fault == "spike":
            self.tell(state.step, "loss spike", wrong, "warning")
        if state.step % self.log_every == 0 or state.step in (1, self.total_steps):
            values = {"train/loss": numbers.loss, "train/lr": numbers.learning_rate, "train/tau": numbers.tau}
            values |= {"train/grad_norm": numbers.grad_norm, "train/skipped_steps": state.skipped}
            values |= self._speed() | routing_metrics(self.engine.loss.model, routing)
            self.metrics.log(state.step, values, attempt=state.rollbacks)
            self._watch_routing(state.step, values)

    def _watch_routing(self, step: int, values: dict[str, float]) -> None:
        n_activations = self.engine.loss.model.config.n_activations
        notices, self.announced = collapse_notices(values, self.announced, n_activations)
        for notice in notices:
            self.tell(step, notice.kind, notice.message, notice.level)

    def _speed(self) -> dict[str, float]:
        """Since the last reading: tokens a second of all ranks, share of the devices' peak, time of saving."""
        device = self.engine.ranks.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = max(time.perf_counter() - self.since - self.saving, 1e-9)
        by_weights, by_attention = self.flops.token * self.tokens, self.flops.pair * self.pairs
        speed = {
            "train/tokens_per_sec": self.tokens / seconds * self.engine.ranks.world_size,
            "train/mfu": by_weights / seconds / self.peak,
            "train/mfu_attention": (by_weights + by_attention) / seconds / self.peak,
            "train/save_seconds": self.saving,
            "train/peak_memory_gb": peak_memory(device) / 1e9,
        }
        self._begin()
        return speed


@torch.no_grad()
def routing_metrics(model: PolychromaticLM, routing: Sequence[Tensor]) -> dict[str, float]:
    """Static and dynamic routing entropy in nats, per layer and mean; nothing for a model without routing.

    Args:
        model: the model.
        routing: token logits ``[B, S, K]`` of each layer, on the batch in hand.
    """
    values: dict[str, float] = {}
    layers = [layer.mlp for layer in model.layers if isinstance(layer.mlp, PolyGLU)]
    if layers:
        static = torch.stack([static_entropy(layer.alpha).mean() for layer in layers])
        each = zip(layers, routing, strict=True)
        dynamic = torch.stack([dynamic_entropy(layer.alpha, logits) for layer, logits in each])
        for kind, entropies in (("routing_entropy", static.tolist()), ("dynamic_routing_entropy", dynamic.tolist())):
            values |= {f"{kind}/layer_{index}": entropy for index, entropy in enumerate(entropies)}
            values[f"{kind}/mean"] = sum(entropies) / len(entropies)
    return values
