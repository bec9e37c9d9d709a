"""Training processes without the cost of starting them: libraries are imported once, each rank is a fork."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from support import free_port  # noqa: E402


def start_ranks(world_size: int, work: Callable[[int], object], log: Path) -> list[int]:
    """Run ``work(rank)`` in processes of their own; return their ids.

    A world of several ranks gets what a launcher would set, and so DeepSpeed; a single process of world size 0 is
    alone, and so plain. What a process prints goes to ``log``. It exits with 0, the code it asks for, or 1.
    """
    processes, port = [], free_port()
    for rank in range(max(1, world_size)):
        sys.stdout.flush()
        child = os.fork()
        if child:
            processes.append(child)
            continue
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            if world_size:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            work(rank)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return processes


def wait_for(processes: list[int], grace: float = 0.0) -> list[int]:
    """Wait for all; once one is dead of SIGKILL, kill the rest after ``grace`` seconds, as a launcher would.

    Returns:
        Exit codes in the order of the processes; -N: dead of signal N.
    """
    codes: dict[int, int] = {}
    while len(codes) < len(processes):
        process, status = os.waitpid(-1, 0)
        codes[process] = os.waitstatus_to_exitcode(status)
        if codes[process]:
            time.sleep(grace)
            for other in set(processes) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[process] for process in processes]
