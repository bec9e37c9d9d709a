"""Exactly once: killed at a hundred seeded moments, tokenising ends with the bytes of an uninterrupted run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("kill_tokenising.py")


@pytest.mark.timeout(600)
def test_killed_at_a_hundred_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(HARNESS), str(tmp_path), "0", "80"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["equal"] >= 80 and report["kills"] >= 100 and report["chunks"] > 20, report
