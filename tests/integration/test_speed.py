"""Every part of ``benchmarks/speed.py`` on toy shapes: what it tells is complete. No speed is tested."""

import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last: it has a file tokenize.py

import measure  # noqa: E402
import speed  # noqa: E402
import speed_ffn  # noqa: E402
import speed_loss  # noqa: E402
import speed_scaling  # noqa: E402
import speed_step  # noqa: E402
import steps  # noqa: E402
import turns  # noqa: E402
from published import published_cpu_loss, published_gpu_loss  # noqa: E402
from speed_ranks import DEEPSPEED, PLAIN, launch  # noqa: E402
from steps import Setting, qwen3_step, training_step  # noqa: E402

from polyglu.data.dataloader import MicroBatch  # noqa: E402
from polyglu.model.config import ModelConfig  # noqa: E402
from polyglu.model.model import load_checkpoint, published_name  # noqa: E402

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=64, d_model=32, d_ff=64, n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=16, seq_length=32,
)  # fmt: skip
SETTING = Setting(MODEL, CPU, rows=2, document=10, precision="fp32")
FEW = turns.Rounds(2, 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of each, nothing compiled, no new processes: those have tests of their own."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for module in (speed_ffn, speed_loss, steps):
        monkeypatch.setattr(module, "compare", compare_here)


def compare_here(*arguments: Any, alone: bool, **options: Any) -> turns.Rows:
    assert alone
    rows = turns.compare(*arguments, **options, rounds=FEW)
    return {name: row | {"peak_mb": 1.0} for name, row in rows.items()}


def row_of_two_rounds(*arguments: Any, **options: Any) -> dict[str, Any]:
    return {name: {"seconds": {"total": [0.1, 0.2]}, "start_s": 1.0} for name in (PLAIN, DEEPSPEED)}


SHAPES: dict[str, Callable[[], Any]] = {
    "ffn": lambda: [speed_ffn.Shape(16, 32, 2, 8, precision, CPU) for precision in ("fp32", "bf16")],
    "loss": lambda: [speed_loss.Shape(16, 40, 24, "fp32", CPU)],
    "step": lambda: speed_step.Shape(SETTING, ["fp32", "bf16"], (1,)),
    "scaling": lambda: speed_scaling.Shape(
        SETTING.with_model(routing_scope="causal"), lengths=(32, 64), layers=(1,), activations=(1, 6), ranks=(2,)
    ),
}


def test_the_command_tells_all_parts_and_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shape in SHAPES.items():
        monkeypatch.setattr(speed.PARTS[name], "cpu_shape", shape)
    for module in (speed_step, speed_scaling):
        monkeypatch.setattr(module, "launch", row_of_two_rounds)
    speed.main(speed.Kind.cpu, tmp_path / "speed.json", ",".join(speed.PARTS))
    told = json.loads((tmp_path / "speed.json").read_text())
    assert set(told["results"]) == set(speed.PARTS)
    for groups in told["results"].values():
        for rows in groups.values():
            for case, row in rows.items():
                assert "failed" not in row, (case, row)
                assert len(row["seconds"]["total"]) == 2
    assert [goal["verdict"] for goal in told["goals"]].count("not measured") == 0
    assert "Scaling of ZeRO-2" in capsys.readouterr().out


def test_the_gpus_goals_are_found_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"seconds": {name: [1.0, 1.0] for name in ("forward", "backward", "total")}, "tokens": 1, "flops": 1}
    names = {
        "ffn": ("elementwise, x", ["kernel, causal", speed_ffn.COPY, speed_ffn.LIGER]),
        "step": (
            "sides, x",
            ["fused, causal", "fused, sequence", "reference, sequence", speed_step.TWIN, speed_step.PUBLISHED],
        ),
        "loss": ("x", [speed_loss.OURS]),
    }
    results = {
        part: {group: {case: {**row, "peak_mb": 1.0} for case in cases}} for part, (group, cases) in names.items()
    }
    results["step"]["DeepSpeed, x"] = {PLAIN: row, DEEPSPEED: row}
    goals = speed.gpu_goals(results)
    assert not [goal.text for goal in goals if goal.verdict == "not measured"]
    assert all(goal.verdict == "not measured" for goal in speed.gpu_goals({}))


def test_a_case_that_fails_is_told_in_a_sentence_and_the_others_go_on() -> None:
    calls = []

    def breaks_later() -> turns.Case:
        def case(watch: turns.Stopwatch) -> None:
            calls.append(1)
            if len(calls) > 2:
                raise torch.OutOfMemoryError("a long story")
            good(watch)

        return case

    def good(watch: turns.Stopwatch) -> None:
        watch.start()
        watch.lap("all")

    def absent() -> turns.Case:
        raise ModuleNotFoundError(name="liger_kernel")

    rows = turns.compare({"absent": absent, "breaks": breaks_later, "good": lambda: good}, CPU, 60, rounds=FEW)
    assert rows["absent"]["failed"] == "the package liger_kernel is not installed"
    assert rows["breaks"]["failed"] == "out of memory" and len(rows["good"]["seconds"]["total"]) == 2
    console = Console(record=True, width=120)
    console.print(measure.as_table("t", {"g": rows}, {"ratio": lambda row, rows: "1"}))
    assert "absent: the package liger_kernel is not installed" in console.export_text()
    assert turns.compare({"good": lambda: good}, CPU, -1.0)["good"]["failed"] == turns.NO_TIME


def takes(seconds: float, share: int) -> turns.Case:
    """Keeps as many MB as ``share``."""
    kept = b"x" * (share * 2**20)

    def case(watch: turns.Stopwatch) -> None:
        watch.start()
        time.sleep(seconds)
        watch.lap("sleep" if kept else "")

    return case


def breaks_at_once() -> turns.Case:
    raise ModuleNotFoundError(name="liger_kernel")


def is_killed() -> turns.Case:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def breaks_after_the_start() -> turns.Case:
    calls: list[int] = []

    def case(watch: turns.Stopwatch) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise ValueError("a long story\nin two lines")
        watch.start()
        watch.lap("all")

    return case


def test_cases_that_live_alone_take_turns_and_fail_alone() -> None:
    builds = {
        "quick": partial(takes, 0.0, 1),
        "absent": breaks_at_once,
        "killed": is_killed,
        "breaks": breaks_after_the_start,
        "slow": partial(takes, 0.05, 40),
    }
    rows = turns.compare(builds, CPU, 60, rounds=turns.Rounds(3, 3), calls=2, alone=True)
    assert rows["absent"]["failed"] == "the package liger_kernel is not installed"
    assert rows["killed"]["failed"] == "its process ended with code -9"
    assert rows["breaks"]["failed"] == "ValueError: a long story"
    assert [len(rows[name]["seconds"]["sleep"]) for name in ("quick", "slow")] == [3, 3]
    assert min(rows["slow"]["seconds"]["total"]) >= 0.05 > statistics.median(rows["quick"]["seconds"]["total"])
    assert 30 < rows["slow"]["peak_mb"] - rows["quick"]["peak_mb"] < 60
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("build", [training_step, qwen3_step])
def test_memory_of_a_case_that_lives_alone_grows_with_the_model(build: Callable[[Setting], turns.Case]) -> None:
    """16 MB of weights, gradients and moments besides what the small one has."""
    builds = {"small": partial(build, SETTING), "large": partial(build, SETTING.with_model(vocab_size=2**15))}
    rows = turns.compare(builds, CPU, 60, rounds=FEW, alone=True)
    assert 14 < rows["large"]["peak_mb"] - rows["small"]["peak_mb"] < 80


@pytest.mark.timeout(120)
def test_ranks_of_deepspeed_take_turns_with_the_plain_engine() -> None:
    rows = launch(SETTING, ranks=2, threads=1, seconds=100, rounds=2)
    assert [len(row["seconds"]["total"]) for row in rows.values()] == [2, 2] and set(rows) == {PLAIN, DEEPSPEED}


@pytest.mark.parametrize("loss_of", [published_cpu_loss, published_gpu_loss])
def test_published_operations_give_the_published_numbers(loss_of: Callable[..., torch.Tensor]) -> None:
    """In fp64: in fp32 a gate of -1e-7 is rounded to the other side of ReLU's kink on some processors."""
    fixture = Path(__file__).parents[1] / "fixtures/reference_model"
    expected = load_file(fixture / "expected.safetensors")
    tau = json.loads((fixture / "expected.json").read_text())["tau"]
    model = load_checkpoint(fixture / "portable.pt")[0].double()
    rows, columns = expected["input_ids"].shape
    bounds = torch.arange(0, rows * columns + 1, columns, dtype=torch.int32)
    batch = MicroBatch(expected["input_ids"], expected["targets"], bounds, torch.arange(rows))
    loss = loss_of(model, batch, tau, expected["gumbel_noise"].double())
    loss.backward()
    torch.testing.assert_close(loss.detach().float().view(1), expected["with_noise.loss"].view(1))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for key, gradient in expected.items():
        if key.startswith("with_noise.grad."):
            ours = gradients[published_name(key.removeprefix("with_noise.grad."))]
            torch.testing.assert_close(ours, gradient.double(), rtol=1e-4, atol=1e-6)
