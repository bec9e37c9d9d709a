"""Runs as processes, one a device at a time: what is finished stays, what fails is told, the rest goes on."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from polyglu.errors import EXIT_INTERRUPTED
from polyglu.training.signals import Stop

logger = logging.getLogger(__name__)

LOG = "log.txt"
POLL = 0.2
"""Seconds between looks at running processes."""


class Process(Protocol):
    """What is asked of a running process (``subprocess.Popen``)."""

    def poll(self) -> int | None:
        """Exit code; None while it runs."""

    def send_signal(self, number: int) -> None:
        """Send a signal."""

    def wait(self) -> int:
        """Exit code, once it has ended."""


Start = Callable[[Path, str | None], Process]
"""Starts the run of a folder, on a GPU (its id for CUDA_VISIBLE_DEVICES) or on the CPU (None)."""


@dataclass(frozen=True)
class Job:
    """A run to be made."""

    label: str
    folder: Path


def start_process(folder: Path, device: str | None) -> Process:
    """Start a run; what it prints goes to ``log.txt`` in its folder.

    It is in a session of its own: Ctrl-C reaches it once, through the process that waits for it. It is told which that
    is, and does not outlive it: a rerun would find the folder held.
    """
    environment = dict(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with open(folder / LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "polyglu.compare.member", str(folder), str(os.getpid())],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def run_jobs(
    jobs: Iterable[Job], devices: list[str | None], stop: Stop, start: Start, done: Callable[[Job], None]
) -> dict[str, str]:
    """Make the runs in their order, on each device one at a time.

    Args:
        jobs: what to run.
        devices: ids of GPUs, or ``[None]``: the CPU.
        stop: set when they shall save and end.
        start: starts one.
        done: called when one has ended well.

    Returns:
        Label -> why, of runs that failed. Those that were stopped are not among them.
    """
    waiting = list(jobs)
    failed: dict[str, str] = {}
    started: dict[str | None, Job] = {}
    processes: dict[str | None, Process] = {}
    while (waiting and not stop.requested) or processes:
        for device in devices:
            if device not in processes and waiting and not stop.requested:
                job = waiting.pop(0)
                logger.info("%s: started%s", job.label, "" if device is None else f" on GPU {device}")
                started[device], processes[device] = job, start(job.folder, device)
        if stop.requested:
            for process in processes.values():
                process.send_signal(signal.SIGTERM)
            for process in processes.values():
                process.wait()
        for device, process in list(processes.items()):
            code = process.poll()
            if code is None:
                continue
            del processes[device]
            job = started[device]
            if code == 0:
                done(job)
            elif code != EXIT_INTERRUPTED and not stop.requested:  # a process that was only starting just ends
                failed[job.label] = why(job.folder, code)
                logger.warning("%s: failed: %s", job.label, failed[job.label])
        if processes and not stop.requested:
            time.sleep(POLL)
    return failed


def why(folder: Path, code: int) -> str:
    """The last thing that a failed run said, and where the rest is."""
    log = folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{said.removeprefix('error: ')[:400]} ({ended}; {log})"
