"""A run of a few milliseconds a step for tests of the loop: made-up rows, faults where a test wants them."""

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from polyglu.data.dataloader import IGNORED, MicroBatch
from polyglu.errors import PolygluError
from polyglu.model.config import LoopSection, ModelConfig, TrainingSection, WandbSection
from polyglu.model.model import create_model
from polyglu.training.checkpoint import find_resume_point, resume
from polyglu.training.engine import PlainEngine
from polyglu.training.fit import Plan, fit
from polyglu.training.guard import RunState
from polyglu.training.journal import Journal
from polyglu.training.loss import LanguageModelLoss, LossParts
from polyglu.training.metrics import MetricsLog
from polyglu.training.ranks import Ranks
from polyglu.training.saver import Checkpoints
from polyglu.training.signals import Stop

SMALL = ModelConfig(
    vocab_size=37, d_model=8, d_ff=12, n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim=4, seq_length=8,
    routing_scope="causal",
)  # fmt: skip
ROWS = 4
"""Of a step."""


def batch_of(rows: Sequence[tuple[int, int]]) -> MicroBatch:
    """A micro batch of rows of (sample, trained targets); what a row says follows from its sample."""
    ids = torch.stack([torch.randint(0, 37, (8,), generator=torch.Generator().manual_seed(row)) for row, _ in rows])
    targets = ids.roll(-1, dims=1)
    for index, (_, trained) in enumerate(rows):
        targets[index, trained:] = IGNORED
    bounds = torch.arange(0, 8 * len(rows) + 1, 8, dtype=torch.int32)
    return MicroBatch(ids, targets, bounds, torch.tensor([row for row, _ in rows]))


class Rows:
    """Rows ``ROWS * step`` to ``ROWS * step + ROWS - 1`` of any step, dealt to ranks; notes what was asked for."""

    def __init__(self, size: int = 2, rank: int = 0, world_size: int = 1, bad_step: int = -1) -> None:
        self.size, self.rank, self.world_size, self.bad_step = size, rank, world_size, bad_step
        self.asked: list[int] = []
        self.threads: set[str] = set()

    def step(self, index: int) -> list[MicroBatch]:
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        if index == self.bad_step:
            raise PolygluError(f"step {index} has a bad token.")
        own = range(ROWS * index + self.rank, ROWS * (index + 1), self.world_size)
        return [batch_of([(row, 7) for row in own[at : at + self.size]]) for at in range(0, len(own), self.size)]

    def recut(self) -> "Rows | None":
        return Rows(self.size // 2, self.rank, self.world_size) if self.size > 1 else None


@dataclass(frozen=True)
class Watched:
    """A step as an engine saw it."""

    samples: list[int]
    """Rows that were fed forward."""
    unchanged: bool
    """Whether weights, moments and their count had the same bits before and after it."""
    norm: float


class Watching:
    """Mixed into an engine: spoils rows, and notes what each step did.

    ``faults``: sample -> (kind, value), spoilt however often it comes.
    """

    faults: Mapping[int, tuple[str, float]]
    samples: list[int]
    watched: list[Watched]
    hooks: list[Any]

    def watch(self, faults: Mapping[int, tuple[str, float]]) -> None:
        self.faults, self.samples, self.watched, self.hooks = faults, [], [], []

    def forward(self, batch: MicroBatch, tau: float, gumbel: Tensor | None) -> LossParts:
        parts: LossParts = super().forward(batch, tau, gumbel)  # type: ignore[misc]
        self.samples += batch.sample_ids.tolist()
        for sample in batch.sample_ids.tolist():
            if sample in self.faults:
                parts = self.spoil(parts, *self.faults[sample])
        return parts

    def spoil(self, parts: LossParts, kind: str, value: float) -> LossParts:
        if kind == "loss":  # the gradient of a sum with infinity is finite
            return parts._replace(loss=parts.loss + value)
        if kind == "times":
            return parts._replace(loss=parts.loss * value)
        if kind == "penalty":
            return parts._replace(penalty=parts.loss * value)
        assert kind == "gradient"  # of one weight, in the smaller group of AdamW
        norm = self.loss.model.layers[0].mlp.alpha  # type: ignore[attr-defined]
        self.hooks.append(norm.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), value)))
        return parts

    def bits(self) -> list[Tensor]:
        """Weights and moments that this rank holds, the model's weights, and the count of updates; copies."""
        held = [tensor for piece in self.pieces() for tensor in piece.tensors.values()]  # type: ignore[attr-defined]
        weights = [parameter.detach() for parameter in self.loss.model.parameters()]  # type: ignore[attr-defined]
        return [tensor.clone() for tensor in (*held, *weights, torch.tensor(self.updates))]  # type: ignore[attr-defined]

    def step(self, learning_rate: float) -> float:
        before = self.bits()
        norm: float = super().step(learning_rate)  # type: ignore[misc]
        unchanged = all(torch.equal(*pair) for pair in zip(before, self.bits(), strict=True))
        self.watched.append(Watched(self.samples, unchanged, norm))
        for hook in self.hooks:
            hook.remove()
        self.samples, self.hooks = [], []
        return norm


class WatchedEngine(Watching, PlainEngine):
    """The plain engine, watched."""


def plain_engine(
    faults: Mapping[int, tuple[str, float]] | None = None, settings: LoopSection | None = None
) -> WatchedEngine:
    torch.manual_seed(0)
    loss = LanguageModelLoss(create_model(SMALL), torch.float32, False)
    engine = WatchedEngine(loss, settings or TrainingSection(grad_clip=1.0), Ranks(torch.device("cpu")))
    engine.watch(faults or {})
    return engine


class StopAt(Stop):
    """Asks to stop at the beginning of the n-th step of a process, from 0."""

    def __init__(self, at: float = math.inf) -> None:
        self.left = at

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self.left -= 1
        return self.left < 0


def plan_of(steps: int, **settings: Any) -> Plan:
    return Plan(
        **{
            "total_steps": steps,
            "learning_rate": lambda done: 1e-3 * (1 + done / steps),
            "tau": lambda done: 1 - 0.5 * done / steps,
            "seed": 0,
            "checkpoint_every": 4,
            **settings,
        }
    )


@dataclass
class Run:
    """A run in a folder, started as often as a test likes."""

    folder: Path
    plan: Plan
    faults: Mapping[int, tuple[str, float]] = field(default_factory=dict)
    engine_of: Callable[..., Any] = plain_engine
    log_every: int = 1

    def go(self, stop: Stop | None = None, loader: Rows | None = None) -> RunState:
        """Train to the end, or until asked to stop, from the newest checkpoint."""
        self.engine = self.engine_of(self.faults)
        order = {"data": "made up"}
        ranks = self.engine.ranks
        found = ranks.agree(lambda: find_resume_point("auto", self.folder))
        state = resume(self.engine, found, order, self.folder)
        steps, metrics = self.plan.total_steps, None
        if ranks.rank == 0:
            metrics = MetricsLog(self.folder / "run", WandbSection(mode="disabled"), {}, state.step, steps)
        with patch("polyglu.training.journal.peak_flops", lambda *_: 1e12):  # it is measured: that takes time
            journal = Journal(self.engine, metrics, self.log_every, steps)
        checkpoints = Checkpoints(self.engine, self.folder, order, 2, journal.tell)
        loader = loader or Rows(2 // ranks.world_size, ranks.rank, ranks.world_size)
        try:
            self.state = fit(self.engine, loader, self.plan, state, checkpoints, journal, stop or StopAt())
        finally:
            if metrics is not None:
                metrics.close()
        return self.state

    @property
    def trained(self) -> list[int]:
        """Batches whose update was made by the last process, in order."""
        return [step.samples[0] // ROWS for step in self.engine.watched if not step.unchanged]

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "run/metrics.jsonl").read_text().splitlines()]

    def events(self) -> list[tuple[int, str]]:
        path = self.folder / "run/events.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(event["step"], event["kind"]) for event in lines]


def steps_bad(*steps: int, kind: str = "loss", value: float = math.nan, place: int = 0) -> dict[int, tuple[str, float]]:
    """Faults in one row of each of some batches."""
    return {ROWS * step + place: (kind, value) for step in steps}
