"""What is told of a run, and by whom."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_run import Run, plain_engine, plan_of, steps_bad

from polyglu.training import journal as journal_module
from polyglu.training.guard import RunState
from polyglu.training.journal import Journal, StepNumbers


class Told:
    """Stands for the log: notes what it is given."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.rows: list[tuple[int, dict[str, float], int]] = []
        self.rewound: list[tuple[int, int]] = []

    def event(self, *event: Any) -> None:
        self.events.append(event)

    def log(self, step: int, values: dict[str, float], attempt: int) -> None:
        self.rows.append((step, values, attempt))

    def rewind(self, step: int, attempt: int) -> None:
        self.rewound.append((step, attempt))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(journal_module.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def make(clock: list[float]) -> Callable[..., Journal]:
    def journal(metrics: Any, log_every: int = 1, total_steps: int = 100) -> Journal:
        with patch.object(journal_module, "peak_flops", lambda *_: 1e9):
            return Journal(plain_engine(), metrics, log_every, total_steps)

    return journal


def numbers(loss: float = 2.0, norm: float = 1.0, fault: Any = None, barred: bool = False) -> StepNumbers:
    return StepNumbers(loss, norm, fault, barred, learning_rate=1e-3, tau=0.5, tokens=50, pairs=200)


def routing() -> list[torch.Tensor]:
    return [torch.zeros(2, 8, 4)]


@pytest.mark.parametrize(
    ("bad", "given", "kind", "message"),
    [
        (0, {}, None, ""),
        (1, {"loss": math.nan, "norm": math.nan, "fault": "not finite", "barred": True}, "step skipped",
         "the loss is not finite: no update, 4 so far"),
        (1, {"norm": math.inf}, "step skipped", "the gradient is not finite: no update, 4 so far"),
        (2, {"loss": 9.0, "norm": math.nan, "fault": "spike", "barred": True}, "step skipped",
         "the loss is 9.0000, far above the latest ones: no update, 4 so far"),
        (1, {"loss": 9.0, "norm": math.nan, "fault": "spike"}, "step skipped",
         "the gradient is not finite: no update, 4 so far"),
        (0, {"loss": 9.0, "fault": "spike"}, "loss spike", "the loss is 9.0000, far above the latest ones"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_step_is_told_whether_it_is_logged_or_not(
    make: Callable[..., Journal], bad: int, given: dict[str, Any], kind: str | None, message: str
) -> None:
    told = Told()
    make(told, log_every=100).step(RunState(step=7, bad_in_a_row=bad, skipped=4), numbers(**given), routing())
    assert told.events == ([] if kind is None else [(7, kind, message, "warning")]) and told.rows == []


def test_first_last_and_every_nth_step_are_logged(make: Callable[..., Journal], clock: list[float]) -> None:
    told = Told()
    journal = make(told, log_every=4, total_steps=10)
    for step in range(1, 11):
        clock[0] += 1
        journal.step(RunState(step=step, rollbacks=2, skipped=1), numbers(loss=float(step)), routing())
    assert [(step, values["train/loss"], attempt) for step, values, attempt in told.rows] == [
        (1, 1.0, 2), (4, 4.0, 2), (8, 8.0, 2), (10, 10.0, 2)
    ]  # fmt: skip
    expected = {"train/lr": 1e-3, "train/tau": 0.5, "train/grad_norm": 1.0, "train/skipped_steps": 1}
    assert expected.items() <= told.rows[0][1].items()
    assert told.rows[0][1]["routing_entropy/mean"] == pytest.approx(math.log(4))
    assert {"routing_entropy/layer_0", "dynamic_routing_entropy/layer_0"} <= told.rows[0][1].keys()


def test_speed_leaves_out_the_time_of_saving(make: Callable[..., Journal], clock: list[float]) -> None:
    told = Told()
    journal = make(told, log_every=2)
    journal.step(RunState(step=3), numbers(), routing())
    clock[0] += 5
    journal.waited(1.0)
    journal.step(RunState(step=4), numbers(), routing())
    (_, values, _), flops = told.rows[0], journal.flops
    assert (values["train/tokens_per_sec"], values["train/save_seconds"]) == (25.0, 1.0)
    parameters = sum(parameter.numel() for parameter in journal.engine.loss.model.parameters())
    config = journal.engine.loss.model.config
    assert flops == (6 * parameters, 12 * config.n_layers * config.n_q_heads * config.head_dim)
    assert values["train/mfu"] == pytest.approx(flops.token * 25 / 1e9)
    assert values["train/mfu_attention"] == pytest.approx((flops.token * 25 + flops.pair * 100) / 1e9)
    clock[0] += 5
    journal.step(RunState(step=6), numbers(), routing())
    assert told.rows[1][1]["train/tokens_per_sec"] == 10.0


def test_a_return_takes_rows_back_and_counts_anew(make: Callable[..., Journal], clock: list[float]) -> None:
    """What was spent on saving before it belongs to steps that are gone."""
    told = Told()
    journal = make(told, log_every=2)
    journal.step(RunState(step=3), numbers(), routing())
    journal.waited(40.0)
    clock[0] += 50
    journal.went_back(RunState(step=1, rollbacks=2))
    clock[0] += 2
    journal.step(RunState(step=2, rollbacks=2), numbers(), routing())
    assert told.rewound == [(1, 2)]
    assert told.rows[0][1]["train/tokens_per_sec"] == 25.0 and told.rows[0][1]["train/save_seconds"] == 0.0


def test_other_ranks_tell_nothing(make: Callable[..., Journal]) -> None:
    journal = make(None)
    journal.step(RunState(step=1, bad_in_a_row=1), numbers(loss=math.nan), routing())
    journal.tell(1, "kind", "message", "error")
    journal.went_back(RunState())
    journal.waited(1.0)
    journal.sync()


def test_collapse_of_the_routing_is_told(make: Callable[..., Journal], clock: list[float]) -> None:
    told = Told()
    journal = make(told)
    sharp = [tensor + 100 * (tensor.new_tensor([1, 0, 0, 0])) for tensor in routing()]
    for step in (1, 2):
        clock[0] += 1
        journal.step(RunState(step=step), numbers(), sharp)
    assert told.events and {event[0] for event in told.events} == {1}  # once


def test_files_of_a_run_with_bad_numbers_are_json_for_any_reader(tmp_path: Path) -> None:
    """JSON has no NaN and no Infinity: other languages' readers refuse the line."""
    faults = steps_bad(1) | steps_bad(2, value=math.inf)
    Run(tmp_path, plan_of(9), faults | steps_bad(5, 6, 7, kind="gradient")).go()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in a file of the run")

    for name in ("metrics", "metrics_replaced", "events"):
        lines = (tmp_path / f"run/{name}.jsonl").read_text().splitlines()
        assert lines and all(json.loads(line, parse_constant=refuse) for line in lines)
