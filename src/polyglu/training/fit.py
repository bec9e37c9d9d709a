"""The training loop of pre-training and fine-tuning. It does not know the engine, nor where batches come from."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from polyglu.data.dataloader import MicroBatch
from polyglu.data.prefetch import prefetch
from polyglu.model.architecture import PolychromaticLM, PolyGLU
from polyglu.model.routing import dynamic_entropy, gumbel_noise, static_entropy
from polyglu.training.devices import peak_flops, peak_memory
from polyglu.training.engine import Engine
from polyglu.training.metrics import MetricsLog

STEPS_AHEAD = 2
"""Steps whose batches are made while an earlier one trains."""


@dataclass(frozen=True)
class Plan:
    """What happens at which step. A step is counted when it is done; schedules take the number of steps done."""

    total_steps: int
    learning_rate: Callable[[int], float]
    tau: Callable[[int], float]
    seed: int
    log_every: int


def fit(
    engine: Engine,
    batches: Callable[[int], Sequence[MicroBatch]],
    plan: Plan,
    start_step: int,
    metrics: MetricsLog | None,
    save: Callable[[int], bool],
) -> None:
    """Train from ``start_step`` to the end of the plan.

    The loss of a step is the sum over all targets of the global batch divided by their number, over all micro
    batches and ranks, so that how a batch is cut never changes what is learnt.

    Args:
        engine: runs forward, backward and the update.
        batches: this rank's micro batches of a step; called in a thread of its own, up to ``STEPS_AHEAD`` steps ahead.
        plan: schedules and cadence.
        start_step: steps done.
        metrics: where rank 0 logs; None on other ranks.
        save: called after each step with the steps done; writes what is due and tells whether that was anything.
    """
    meter = _Meter(engine)
    steps = range(start_step, plan.total_steps)
    with closing(prefetch(host_batches(batches, steps, engine.device), STEPS_AHEAD)) as ready:
        for step, (micro_batches, own_targets) in zip(steps, ready, strict=True):
            tau, rate, n_targets = plan.tau(step), plan.learning_rate(step), engine.sum(own_targets)
            losses: list[Tensor] = []
            routing: list[Tensor] = []
            for host_batch in micro_batches:
                batch = host_batch.to(engine.device)
                loss, routing = engine.forward(batch, tau, _noise(engine.loss.model, batch, plan.seed))
                engine.backward(loss / n_targets)
                losses.append(loss.detach())
            grad_norm = engine.step(rate)
            done = step + 1
            meter.count(sum(batch.input_ids.numel() for batch in micro_batches))
            if done % plan.log_every == 0 or done in (1, plan.total_steps):
                values = {"train/loss": engine.sum(float(torch.stack(losses).sum())) / n_targets}
                values |= {"train/lr": rate, "train/tau": tau, "train/grad_norm": grad_norm}
                values |= meter.read() | routing_metrics(engine.loss.model, routing)
                if metrics is not None:
                    metrics.log(done, values)
            if save(done):
                meter.restart()


def host_batches(
    batches: Callable[[int], Sequence[MicroBatch]], steps: Iterable[int], device: torch.device
) -> Iterator[tuple[Sequence[MicroBatch], int]]:
    """Micro batches of each step, ready to be copied to the device, and the number of their targets."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has a current device of its own
    for step in steps:
        made = batches(step)
        n_targets = sum(batch.n_targets for batch in made)
        yield [batch.pin_memory() for batch in made] if device.type == "cuda" else made, n_targets


def _noise(model: PolychromaticLM, batch: MicroBatch, seed: int) -> Tensor | None:
    config = model.config
    if config.ffn != "polyglu":
        return None
    return gumbel_noise(seed, batch.sample_ids, config.n_layers, config.d_ff, config.n_activations)


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
        static = [float(static_entropy(layer.alpha).mean()) for layer in layers]
        dynamic = [float(dynamic_entropy(layer.alpha, logits)) for layer, logits in zip(layers, routing, strict=True)]
        for kind, entropies in (("routing_entropy", static), ("dynamic_routing_entropy", dynamic)):
            values |= {f"{kind}/layer_{index}": entropy for index, entropy in enumerate(entropies)}
            values[f"{kind}/mean"] = sum(entropies) / len(entropies)
    return values


class _Meter:
    """Tokens per second of all ranks since the last reading, and the share of the devices' peak (MFU by 6 N)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.parameters = sum(parameter.numel() for parameter in engine.loss.model.parameters())
        self.peak = peak_flops(engine.device, engine.loss.compute_dtype)
        self.restart()

    def restart(self) -> None:
        """Forget the time until now, as after a save."""
        self.tokens, self.since = 0, time.perf_counter()

    def count(self, tokens: int) -> None:
        """Add this rank's tokens of a step."""
        self.tokens += tokens

    def read(self) -> dict[str, float]:
        """Speed since the last reading, and memory."""
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        elapsed = time.perf_counter() - self.since
        rate = self.tokens / elapsed if self.tokens else 0.0
        self.restart()
        return {
            "train/tokens_per_sec": rate * self.engine.world_size,
            "train/mfu": 6 * self.parameters * rate / self.peak,
            "train/peak_memory_gb": peak_memory(self.engine.device) / 1e9,
        }
