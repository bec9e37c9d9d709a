"""Numbers that go wrong on one of two ranks of DeepSpeed ZeRO-2 are passed over by both."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_numbers import FAULTS, SINGLE_STEPS, STEPS, STREAK, single_faults, streak
from tiny_run import Run, plan_of

from polyglu.training.checkpoint import newest_whole

LOSS_TOLERANCE = 1e-4
"""Nats by which the engines' losses may differ: sums in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks left what they saw."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    script = Path(__file__).with_name("bad_numbers.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def plain(folder: Path, steps: int, faults: Any) -> Run:
    run = Run(folder, plan_of(steps), faults)
    run.go()
    return run


def assert_same_course(zero: Path, plain: Run) -> None:
    rows = [json.loads(line) for line in (zero / "run/metrics.jsonl").read_text().splitlines()]
    keys = ("step", "train/skipped_steps", "repeated", "train/tau")
    assert [[row.get(key) for key in keys] for row in rows] == [[row.get(key) for key in keys] for row in plain.rows()]
    for row, expected in zip(rows, plain.rows(), strict=True):
        loss = expected["train/loss"]
        assert row["train/loss"] == (loss if loss is None else pytest.approx(loss, abs=LOSS_TOLERANCE, nan_ok=True))


@pytest.mark.timeout(600)  # the first start compiles DeepSpeed's communication
def test_ranks_meet(seen: list[dict[str, Any]]) -> None:
    expected = {"sum": [1.0, 2.0**41 + 1], "add_up": [3.0, 3.0], "gather": ["rank 0", "rank 1"], "agree": 5}
    assert [rank["meet"] for rank in seen] == [expected] * 2


@pytest.mark.timeout(600)
def test_what_is_bad_on_one_rank_is_skipped_on_both(folder: Path, seen: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = plain(tmp_path, SINGLE_STEPS, single_faults())
    for rank in seen:
        assert rank["single"]["end"] == "done"
        assert rank["single"]["unchanged"] == [step % 2 == 1 for step in range(SINGLE_STEPS)]
        assert rank["single"]["updates"] == SINGLE_STEPS - len(FAULTS)
    assert seen[0]["single"]["weights"] == seen[1]["single"]["weights"]
    assert_same_course(folder / "single", alone)


@pytest.mark.timeout(600)
def test_both_go_back_and_pass_over_the_same_data(folder: Path, seen: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = plain(tmp_path, STEPS, streak())
    for rank in seen:
        assert rank["streak"]["end"] == "done" and rank["streak"]["trained"] == alone.trained
        assert not set(STREAK) & set(rank["streak"]["trained"])
    assert seen[0]["streak"]["weights"] == seen[1]["streak"]["weights"]
    assert_same_course(folder / "streak", alone)


@pytest.mark.timeout(600)
def test_a_signal_to_one_rank_after_the_return_stops_both_and_changes_no_bit(
    folder: Path, seen: list[dict[str, Any]]
) -> None:
    assert seen[0]["signal"]["end"].startswith("Interrupted: stopped after step 5, saved in ")  # rank 0 says it
    for rank in seen:
        assert rank["signal"]["end"].startswith("Interrupted: stopped after step 5, ")
        assert rank["signal"]["trained"][-1] == 8 and rank["resumed"]["trained"][0] == 9
        for key in ("end", "updates", "weights", "moments"):
            assert rank["resumed"][key] == rank["streak"][key]
    points = [newest_whole(folder / name / "ds_checkpoint") for name in ("streak", "signal")]
    assert points[0] is not None and points[1] is not None and points[0].state == points[1].state
    assert [shard.sha256 for shard in points[0].shards] == [shard.sha256 for shard in points[1].shards]


@pytest.mark.timeout(600)
def test_giving_up_is_said_by_one_rank_and_keeps_the_last_good_checkpoint(
    folder: Path, seen: list[dict[str, Any]]
) -> None:
    assert seen[0]["hopeless"]["end"].startswith("PolygluError: training failed at step 8: 3 steps in a row without")
    assert seen[1]["hopeless"]["end"] == "SystemExit: 2"
    point = newest_whole(folder / "hopeless/ds_checkpoint")
    assert point is not None and (point.state.step, point.state.bad_in_a_row) == (4, 0)


@pytest.mark.timeout(600)
def test_bad_data_on_one_rank_ends_both_and_loses_no_save(folder: Path, seen: list[dict[str, Any]]) -> None:
    assert seen[1]["bad data"]["end"] == "PolygluError: step 6 has a bad token."
    assert seen[0]["bad data"]["end"] == "SystemExit: 2"
    point = newest_whole(folder / "data/ds_checkpoint")
    assert point is not None and point.state.step == 4
