"""From a budget to steps. The schedules of a run end where its budget does, so the steps are known before it starts."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from polyglu.compare.suite import Budget
from polyglu.errors import PolygluError
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import TrainConfig
from polyglu.training.devices import flops_of
from polyglu.training.estimate import tokens_per_step
from polyglu.training.ranks import Ranks
from polyglu.training.train import create_loader, open_sources

CALIBRATION_STEPS = 24
"""Steps of the short run by which the speed of a variant is measured, for a budget of wall time."""
CALIBRATION_LOGS = 4
"""Steps between its readings; the first one, in which memory is taken and code compiled, does not count."""
SAMPLED_STEPS = 8
"""Steps whose documents stand for all when the FLOPs of attention are counted."""


@dataclass(frozen=True)
class StepWork:
    """What a step of a variant takes, forward and backward."""

    tokens: int
    flops: float


def step_work(config: TrainConfig) -> StepWork:
    """Tokens and FLOPs of a step, by the count that training's MFU uses: what is recomputed does not count.

    Raises:
        PolygluError: data that are missing.
    """
    loader = create_loader(config, open_sources(config), Ranks(torch.device("cpu")), 1)
    steps = range(min(SAMPLED_STEPS, config.training.total_steps))
    pairs = statistics.fmean(sum(batch.attention_pairs for batch in loader.step(step)) for step in steps)
    with torch.device("meta"):
        flops = flops_of(PolychromaticLM(config.model))
    tokens = tokens_per_step(config, 1)
    return StepWork(tokens, flops.token * tokens + flops.pair * pairs)


def steps_within(budget: Budget, work: StepWork, tokens_per_second: float | None = None) -> int:
    """Whole steps that a budget pays for.

    Args:
        budget: of a run.
        work: of one step.
        tokens_per_second: measured; for a budget of wall time.

    Raises:
        PolygluError: it does not pay for one.
    """
    if budget.tokens is not None:
        steps = budget.tokens / work.tokens
    elif budget.flops is not None:
        steps = budget.flops / work.flops
    else:
        assert budget.seconds is not None and tokens_per_second is not None
        steps = budget.seconds * tokens_per_second / work.tokens
    if steps < 1:
        raise PolygluError(
            f"budget.{budget.kind}: a step takes {work.tokens:,} tokens and {work.flops:.3g} FLOPs, more than the "
            "budget; raise it, or make steps smaller."
        )
    return int(steps)


def measured_speed(rows: list[dict[str, Any]]) -> float:
    """Tokens a second: the median of a run's readings (rows of metrics.jsonl) but the first.

    Raises:
        ValueError: there is none.
    """
    readings = [row["train/tokens_per_sec"] for row in rows[1:]] or [row["train/tokens_per_sec"] for row in rows]
    if not readings:
        raise ValueError("no readings")
    return float(statistics.median(readings))
