"""DeepSpeed's ZeRO-2 beside the plain engine, in ranks that the launcher starts: ``launch`` starts this file.

The two take turns. In a turn of the plain engine, rank 0 alone does the whole step, while the others wait.
"""

import sys

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

import importlib.util
import json
import os
import pickle
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from measure import say
from steps import Setting, engine_step
from turns import Case, Rounds, Rows, Stopwatch, compare

from polyglu.training.ranks import Ranks, connect

PLAIN, DEEPSPEED = "plain", "DeepSpeed ZeRO-2"
ROOT = Path(__file__).parents[1]
START = "from polyglu.training.launcher import launch; launch()"
"""The command ``deepspeed``, wherever it is installed."""
LEAST_SECONDS = 60
"""What starting ranks, and a few steps, may always take."""


@dataclass(frozen=True)
class Job:
    setting: Setting
    threads: int
    rounds: int


def launch(setting: Setting, ranks: int, threads: int, seconds: float, rounds: int) -> Rows:
    """Rows of both engines.

    Args:
        setting: of the whole step; each rank gets as many of its rows.
        ranks: processes.
        threads: of each.
        seconds: that all may take, but never less than some.
        rounds: turns of each engine: ranks must agree about them, so it is not time that decides.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
        TimeoutError: it took too long.
        RuntimeError: a rank failed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError(name="deepspeed")
    say(f"  {ranks} rank(s)")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    if setting.device.type == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.pickle").write_bytes(pickle.dumps(Job(setting, threads, rounds)))
        options = [f"--num_gpus={ranks}", f"--master_port={free_port()}", "--no_local_rank"]
        command = [sys.executable, "-c", START, *options, __file__, name]
        limit = max(LEAST_SECONDS, seconds)
        with (folder / "log").open("wb") as log:
            try:
                done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"it took more than {limit:.0f} s") from None
        if done.returncode or not (folder / "rows.json").exists():
            lines = (folder / "log").read_text(errors="replace").splitlines()
            errors = [line for line in lines if "Error" in line] or ["no error was printed"]
            raise RuntimeError(f"the ranks ended with code {done.returncode}: {errors[-1].strip()}")
        rows: Rows = json.loads((folder / "rows.json").read_text())
        return rows


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def work(folder: Path) -> None:
    """What a rank does."""
    job: Job = pickle.loads((folder / "job.pickle").read_bytes())
    torch.set_num_threads(job.threads)
    ranks, setting = connect(), job.setting
    builds: dict[str, Callable[[], Case]] = {
        PLAIN: lambda: plain(setting, ranks),
        DEEPSPEED: lambda: zero(setting, ranks),
    }
    rows = compare(builds, ranks.device, float("inf"), rounds=Rounds(job.rounds, job.rounds))
    if ranks.rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    ranks.close()


def plain(setting: Setting, ranks: Ranks) -> Case:
    with patch.dict(os.environ):
        del os.environ["RANK"]  # by which an engine for several ranks is chosen
        engine = setting.engine(Ranks(ranks.device)) if ranks.rank == 0 else None
    step = engine_step(engine, setting.batch(), setting.tokens) if engine else _nothing
    return in_step(step)


def zero(setting: Setting, ranks: Ranks) -> Case:
    share = replace(setting, rows=setting.rows // ranks.world_size)
    return in_step(engine_step(setting.engine(ranks), share.batch(), setting.tokens))


def in_step(step: Case) -> Case:
    """All ranks begin and end together."""

    def case(watch: Stopwatch) -> None:
        torch.distributed.barrier()
        step(watch)
        torch.distributed.barrier()

    return case


def _nothing(watch: Stopwatch) -> None:
    watch.start()
    watch.lap("step")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
