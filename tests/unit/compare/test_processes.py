"""Runs as processes: one a device at a time, in order; what fails or is stopped does not keep the others back."""

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from polyglu.compare import processes
from polyglu.compare.processes import LOG, Job, Process, run_jobs, start_process, why
from polyglu.training.signals import Stop

SAVES = (
    "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "POLL", 0.01)


class Fake:
    """A process that ends at its n-th look, with a code."""

    def __init__(self, looks: int, code: int) -> None:
        self.looks, self.code = looks, code

    def poll(self) -> int | None:
        self.looks -= 1
        return self.code if self.looks <= 0 else None

    def send_signal(self, number: int) -> None:
        raise AssertionError

    def wait(self) -> int:
        return self.code


def jobs(folder: Path, *labels: str) -> list[Job]:
    for label in labels:
        (folder / label).mkdir()
    return [Job(label, folder / label) for label in labels]


def test_one_on_each_device_and_the_next_where_one_is_free(tmp_path: Path) -> None:
    started, ended = [], []
    looks = {"a": 6, "b": 2, "c": 2, "d": 1}

    def start(folder: Path, device: str | None) -> Process:
        started.append((folder.name, device))
        return Fake(looks[folder.name], 0)

    failed = run_jobs(jobs(tmp_path, *"abcd"), ["4", "5"], Stop(), start, lambda job: ended.append(job.label))
    assert failed == {} and started == [("a", "4"), ("b", "5"), ("c", "5"), ("d", "5")]
    assert ended == ["b", "c", "d", "a"]


def test_the_cpu_has_one_at_a_time(tmp_path: Path) -> None:
    running: list[str] = []

    def start(folder: Path, device: str | None) -> Process:
        assert device is None and not running
        running.append(folder.name)
        return Fake(2, 0)

    run_jobs(jobs(tmp_path, *"abc"), [None], Stop(), start, lambda job: running.remove(job.label))


def test_a_failure_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    ended = []

    def start(folder: Path, device: str | None) -> Process:
        codes = {"a": 2, "b": -9, "c": 75, "d": 0}
        if folder.name == "a":
            (folder / LOG).write_text("12:00:00 step 1\nerror: training failed at step 9: bad numbers.\n\n")
        return Fake(1, codes[folder.name])

    failed = run_jobs(jobs(tmp_path, *"abcd"), [None], Stop(), start, lambda job: ended.append(job.label))
    assert ended == ["d"] and set(failed) == {"a", "b"}  # 75: it was stopped, and saved
    assert failed["a"] == f"training failed at step 9: bad numbers. (exit code 2; {tmp_path}/a/log.txt)"
    assert failed["b"] == f"nothing was said (ended by signal 9; {tmp_path}/b/log.txt)"


def test_a_request_to_stop_reaches_what_runs_and_starts_nothing(tmp_path: Path) -> None:
    stop, made, ended = Stop(), [], []

    def start(folder: Path, device: str | None) -> Process:
        process = subprocess.Popen([sys.executable, "-c", SAVES], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.stdout.close()
        made.append(process)
        stop.requested = len(made) == 2
        return process

    begun = time.monotonic()
    failed = run_jobs(jobs(tmp_path, *"abc"), ["0", "1"], stop, start, lambda job: ended.append(job.label))
    assert failed == {} and ended == [] and [process.returncode for process in made] == [75, 75]
    assert time.monotonic() - begun < 30


def test_a_run_is_a_process_of_its_own(tmp_path: Path) -> None:
    """Pinned to its GPU, out of reach of the terminal's Ctrl-C; what it says is in its folder."""
    with patch.object(subprocess, "Popen") as popen:
        start_process(tmp_path, "3")
        assert popen.call_args.kwargs["env"]["CUDA_VISIBLE_DEVICES"] == "3"
        start_process(tmp_path, None)
        assert popen.call_args.kwargs["env"] == dict(os.environ)
    process = start_process(tmp_path, None)
    assert isinstance(process, subprocess.Popen) and os.getsid(process.pid) != os.getsid(0)
    assert process.wait() == 2
    assert "config.yaml does not exist" in why(tmp_path, 2)
