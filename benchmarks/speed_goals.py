"""What the speed benchmarks should show: each goal beside what was measured. Ratios are of the same round."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import speed_ffn
import speed_loss
import speed_ranks
import speed_step
from rich.table import Table
from steps import tokens_per_second
from turns import Row, Rows, ratios

Results = Mapping[str, Mapping[str, Rows]]
"""Part -> group -> case -> row."""
CAUSAL, SEQUENCE = "fused, causal", "fused, sequence"


@dataclass(frozen=True)
class Goal:
    text: str
    limit: float
    at_most: bool
    values: Mapping[str, float]
    """Group -> measured."""

    @property
    def verdict(self) -> str:
        if not self.values:
            return "not measured"
        met = all(value <= self.limit if self.at_most else value >= self.limit for value in self.values.values())
        return "met" if met else "not met"

    def as_json(self) -> dict[str, Any]:
        return {"goal": self.text, "measured": dict(self.values), "verdict": self.verdict}


def cpu_goals(results: Results) -> list[Goal]:
    def step(case: str, base: str) -> dict[str, float]:
        return of_groups(results, "step", "sides", ratio_of(case, base))

    ffn = of_groups(results, "ffn", "whole", ratio_of(CAUSAL, speed_ffn.SWIGLU))
    memory = of_groups(results, "step", "sides", peak_ratio)
    return [
        Goal("fused layer <= 1.25 x eager SwiGLU", 1.25, True, ffn),
        Goal("fused step <= 1.15 x SwiGLU twin", 1.15, True, step(CAUSAL, speed_step.TWIN)),
        Goal("fused step <= 1.0 x transformers Qwen3", 1.0, True, step(CAUSAL, speed_step.QWEN3)),
        Goal("published operations' step >= 1.9 x fused, causal", 1.9, False, step(speed_step.PUBLISHED, CAUSAL)),
        Goal("our reference's step >= 1.9 x fused, causal", 1.9, False, step("reference, causal", CAUSAL)),
        Goal("peak memory of a step <= 1.05 x SwiGLU twin's", 1.05, True, memory),
    ]


def gpu_goals(results: Results) -> list[Goal]:
    def step(case: str, base: str) -> dict[str, float]:
        return of_groups(results, "step", "sides", ratio_of(case, base))

    def kernel(case: str, base: str, stretch: str) -> dict[str, float]:
        return of_groups(results, "ffn", "elementwise", ratio_of(case, base, stretch))

    ours, copy = "kernel, causal", speed_ffn.COPY
    speeds = of_groups(results, "step", "", lambda rows: median_of(rows.get(CAUSAL), tokens_per_second))
    fastest = dict(sorted(speeds.items(), key=lambda item: item[1])[-1:])
    deepspeed = ratio_of(speed_ranks.DEEPSPEED, speed_ranks.PLAIN)
    loss = of_groups(results, "loss", "", lambda rows: median_of(rows.get(speed_loss.OURS), teraflops))
    memory = of_groups(results, "loss", "", lambda rows: peak_gb(rows.get(speed_loss.OURS)))
    return [
        Goal("fastest step >= 110,000 tokens/s", 110_000, False, fastest),
        Goal("step <= 1.03 x compiled SwiGLU twin", 1.03, True, step(CAUSAL, speed_step.TWIN)),
        Goal("kernel, forward <= 1.10 x Liger's SwiGLU", 1.10, True, kernel(ours, speed_ffn.LIGER, "forward")),
        Goal("kernel, backward <= 1.15 x Liger's SwiGLU", 1.15, True, kernel(ours, speed_ffn.LIGER, "backward")),
        Goal("kernel, forward >= 0.80 of copy bandwidth", 0.8, False, kernel(copy, ours, "forward")),
        Goal("kernel, backward >= 0.80 of copy bandwidth", 0.8, False, kernel(copy, ours, "backward")),
        Goal("causal step <= 1.05 x sequence", 1.05, True, step(CAUSAL, SEQUENCE)),
        Goal("loss and head >= 600 TFLOP/s", 600, False, loss),
        Goal("loss and head, peak memory <= 4 GB", 4, True, memory),
        Goal("DeepSpeed step <= 1.02 x plain", 1.02, True, of_groups(results, "step", "DeepSpeed", deepspeed)),
        Goal("published operations' step >= 4 x fused, causal", 4, False, step(speed_step.PUBLISHED, CAUSAL)),
        Goal("our reference's step >= 4 x fused, sequence", 4, False, step("reference, sequence", SEQUENCE)),
    ]


def of_groups(results: Results, part: str, kind: str, value: Callable[[Rows], float | None]) -> dict[str, float]:
    """Value of each group of a kind that has one."""
    values = {group: value(rows) for group, rows in results.get(part, {}).items() if group.startswith(kind)}
    return {group: value for group, value in values.items() if value is not None}


def ratio_of(case: str, base: str, stretch: str = "total") -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        found = ratios(rows.get(case), rows.get(base), stretch)
        return statistics.median(found) if found else None

    return value


def median_of(row: Row | None, values: Callable[[Row], list[float]]) -> float | None:
    return None if row is None or "failed" in row else statistics.median(values(row))


def teraflops(row: Row) -> list[float]:
    return [row["flops"] / 1e12 / value for value in row["seconds"]["total"]]


def peak_gb(row: Row | None) -> float | None:
    return None if row is None or "peak_mb" not in row else row["peak_mb"] / 1e3


def peak_ratio(rows: Rows) -> float | None:
    ours, twin = peak_gb(rows.get(CAUSAL)), peak_gb(rows.get(speed_step.TWIN))
    return None if ours is None or twin is None else ours / twin


def goals_table(goals: list[Goal]) -> Table:
    table = Table("goal", "measured", "verdict", title="Goals", title_justify="left")
    for goal in goals:
        measured = "\n".join(f"{value:,.2f}  {group}" for group, value in goal.values.items())
        table.add_row(goal.text, measured, goal.verdict)
    return table
