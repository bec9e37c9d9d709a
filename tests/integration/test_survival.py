"""A run ends with the same bits however often it was killed, and on whatever ranks it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LOSS_TOLERANCE = 1e-5
"""Nats by which engines and numbers of ranks may differ in a step: sums in another order."""


def run_script(name: str, *arguments: str) -> Any:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "kills"), [(0, 14), (2, 6)], ids=["plain", "ZeRO-2, 2 ranks"])
def test_killed_and_resumed_training_has_the_bits_of_an_uninterrupted_run(
    tmp_path: Path, ranks: int, kills: int
) -> None:
    report = run_script("torture.py", str(tmp_path), "--kills", str(kills), "--ranks", str(ranks))
    assert report["kills"] >= kills


@pytest.mark.timeout(900)
def test_a_run_goes_on_with_another_engine_and_number_of_ranks(tmp_path: Path) -> None:
    report = run_script("cross_engines.py", str(tmp_path))
    plain = report.pop("0")
    assert plain["steps"] == list(range(1, len(plain["loss"]) + 1)) and len(plain["samples"]) == len(plain["steps"])
    assert set(report) == {"1", "2", "changing"}
    for other in report.values():
        assert (other["samples"], other["steps"]) == (plain["samples"], plain["steps"])
        assert other["loss"] == pytest.approx(plain["loss"], abs=LOSS_TOLERANCE)
        assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
