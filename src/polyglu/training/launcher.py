"""The command ``deepspeed``: DeepSpeed's own launcher, which also knows ``-m`` and passes signals on to the ranks.

    terminal, cluster ──SIGINT, SIGTERM──► this command ───────the same signal───────┐
                                             │ in a session of its own               ▼
                                             └──► DeepSpeed's runner ──► launcher ──► ranks
                                                  returns their exit code

DeepSpeed's launcher, asked to stop, kills the ranks after 30 seconds and returns 1. Here it is not asked: the ranks end
their step, save, and end by themselves. A terminal's Ctrl-C reaches this command alone: the rest is in another session.
"""

import contextlib
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from polyglu.errors import PolygluError, run_command


def launch() -> None:
    """Entry point of the command ``deepspeed``: all arguments are DeepSpeed's; ``-m`` means what it means to Python."""
    run_command(lambda: sys.exit(run(sys.argv[1:])))


def run(arguments: Sequence[str]) -> int:
    """Run DeepSpeed's launcher until it ends; meanwhile pass SIGINT and SIGTERM on to this machine's ranks.

    While there is no rank yet a signal ends the launcher. However this command ends, and be it by SIGKILL, what it has
    started is then sent SIGTERM.

    Returns:
        The launcher's exit code, which is that of the first rank that failed; 128 + n if signal n ended it.

    Raises:
        PolygluError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise PolygluError("DeepSpeed is not installed: pip install 'polyglu[train]', or train with `polyglu train`.")
    alive, held = os.pipe()  # nobody writes: the reader learns from the end of file that this process has ended
    child = subprocess.Popen(
        [sys.executable, "-m", "polyglu.training.launcher", str(alive), *translate(arguments)],
        env={name: value for name, value in os.environ.items() if name != "RANK"},  # only a rank shall have it
        pass_fds=[alive],
        start_new_session=True,
    )
    os.close(alive)
    any_ranks = False

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal any_ranks
        ranks = find_ranks(child.pid)
        any_ranks = any_ranks or bool(ranks)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)
        if not any_ranks:
            end_group(child.pid)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    code = child.wait()
    os.close(held)
    end_group(child.pid)  # nobody is left, unless a part of DeepSpeed was killed
    return code if code >= 0 else 128 - code


def translate(arguments: Sequence[str]) -> list[str]:
    """DeepSpeed's arguments with its ``--module`` in place of ``-m``, unless that is an argument of the script."""
    own = list(itertools.takewhile(lambda argument: not argument.endswith(".py"), arguments))
    place = own.index("-m") if "-m" in own else None
    return ["--module" if index == place else argument for index, argument in enumerate(arguments)]


def find_ranks(pid: int) -> list[int]:
    """Process ids of the ranks among the descendants of a process that is none.

    A rank has RANK in its environment and its parent has not: what a rank itself starts (W&B's service, compilers)
    inherits it, and must live until the rank ends.
    """
    import psutil

    def has_rank(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return "RANK" in process.environ()
        return False

    try:
        family = psutil.Process(pid).children(recursive=True)
        ranked = {process.pid for process in family if has_rank(process)}
        return [process.pid for process in family if process.pid in ranked and process.ppid() not in ranked]
    except psutil.NoSuchProcess:  # between two looks
        return find_ranks(pid) if psutil.pid_exists(pid) else []


def end_group(group: int) -> None:
    """Send SIGTERM to all processes of a group, if there are any; 0 is one's own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)


def run_deepspeed(alive: int, arguments: Sequence[str]) -> None:
    """In the process that ``run`` starts: DeepSpeed's runner, and an eye on whether ``run`` still lives.

    Args:
        alive: file descriptor that reaches its end when the process that holds the other one ends.
        arguments: DeepSpeed's.
    """

    def end_with_command() -> None:
        os.read(alive, 1)
        end_group(0)

    threading.Thread(target=end_with_command, daemon=True).start()
    from deepspeed.launcher import runner

    sys.argv = ["deepspeed", *arguments]
    runner.main()


if __name__ == "__main__":
    run_deepspeed(int(sys.argv[1]), sys.argv[2:])
