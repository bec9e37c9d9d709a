"""The command ``deepspeed`` and its signals, with a small program in place of the trainer.

The runs that need nothing of DeepSpeed but its family of processes have a stand-in for it, which starts at once.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polyglu.training.launcher import translate

COMMAND = str(Path(sys.executable).with_name("deepspeed"))
TRAINER = """
import os, signal, subprocess, sys, time
from pathlib import Path

rank, folder = os.environ["RANK"], Path(sys.argv[-1])
heard = []

def note(number, frame):
    heard.append(number)
    with open(folder / f"rank{rank}.heard", "a") as file:
        file.write(f"{signal.Signals(number).name} ")
    if heard == [signal.SIGINT, signal.SIGINT]:
        os._exit(130)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
if folder.name != "helper":  # what a rank starts has its environment
    helper = subprocess.Popen([sys.executable, __file__, str(folder / "helper")])
(folder / f"rank{rank}.pid").write_text(str(os.getpid()))
while not heard:
    time.sleep(0.01)
time.sleep({"0": 0.5, "1": 0.0}[rank])  # what is left of the step, and saving
while (folder / "stay").exists():
    time.sleep(0.01)
sys.exit(75)
"""
RUNNER = """
import os, subprocess, sys, time
from pathlib import Path

def main():
    code = subprocess.run([sys.executable, __file__, *sys.argv[1:]]).returncode
    sys.exit(max(code, 0))

if __name__ == "__main__":
    script, folder = sys.argv[-2:]
    (Path(folder) / "launcher.pid").write_text(str(os.getpid()))
    while (Path(folder) / "no ranks yet").exists():
        time.sleep(0.01)
    ranks = [subprocess.Popen([sys.executable, script, folder], env=os.environ | {"RANK": str(i)}) for i in range(2)]
    sys.exit(max(rank.wait() for rank in ranks))
"""


class Launched:
    """A running command, its folder of notes, and its end."""

    def __init__(self, folder: Path, stand_in: bool) -> None:
        (folder / "helper").mkdir()
        (folder / "trainer.py").write_text(TRAINER)
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": "of nobody"}
        if stand_in:
            (folder / "deepspeed/launcher").mkdir(parents=True)
            for package in ("deepspeed", "deepspeed/launcher"):
                (folder / package / "__init__.py").touch()
            (folder / "deepspeed/launcher/runner.py").write_text(RUNNER)
            environment["PYTHONPATH"] = f"{folder}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        self.folder = folder
        self.process = subprocess.Popen(
            [COMMAND, "--num_gpus=2", str(folder / "trainer.py"), str(folder)], cwd=folder, env=environment
        )

    def pid(self, name: str) -> int:
        file = self.folder / f"{name}.pid"
        wait_for(lambda: file.exists() and file.read_text() != "")
        return int(file.read_text())

    def pids(self) -> list[int]:
        """Process ids of the ranks and of what each has started, once all listen for signals."""
        return [self.pid(f"{folder}rank{rank}") for folder in ("", "helper/") for rank in (0, 1)]

    def heard(self, name: str) -> list[str]:
        file = self.folder / f"{name}.heard"
        return file.read_text().split() if file.exists() else []


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def launch(stand_in: bool = True) -> Launched:
        started.append(Launched(tmp_path, stand_in))
        return started[-1]

    yield launch
    for one in started:
        one.process.kill()
        one.process.wait()
        for pid in [int(file.read_text() or 0) for file in tmp_path.rglob("*.pid")]:
            if pid and not is_gone(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("--num_gpus=1 -m src.training.train --config c", "--num_gpus=1 --module src.training.train --config c"),
        ("-m src.training.train -m x", "--module src.training.train -m x"),
        ("--num_gpus=2 train.py -m x", "--num_gpus=2 train.py -m x"),
        ("--help", "--help"),
    ],
)
def test_m_is_spelt_as_deepspeed_spells_it(given: str, wanted: str) -> None:
    assert translate(given.split()) == wanted.split()


def test_a_signal_reaches_the_ranks_of_deepspeed_alone_and_their_code_comes_back(
    start: Callable[..., Launched],
) -> None:
    """Rank 1 ends before rank 0 has saved; DeepSpeed then asks rank 0 to end, which it is about to do."""
    run = start(stand_in=False)
    pids = run.pids()
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(60) == 75
    assert run.heard("rank1") == ["SIGTERM"] and set(run.heard("rank0")) == {"SIGTERM"}
    wait_for(lambda: all(map(is_gone, pids)))


def test_a_second_interrupt_reaches_the_ranks_too(start: Callable[..., Launched]) -> None:
    run = start()
    (run.folder / "stay").touch()
    pids = run.pids()
    for times in (1, 2):
        run.process.send_signal(signal.SIGINT)
        for rank in ("rank0", "rank1"):
            wait_for(lambda rank=rank, times=times: len(run.heard(rank)) == times)
        assert "SIGINT" not in run.heard("helper/rank0") + run.heard("helper/rank1")
    assert run.process.wait(60) == 130
    assert run.heard("rank0") == run.heard("rank1") == ["SIGINT", "SIGINT"]
    wait_for(lambda: all(map(is_gone, pids)))


def test_without_ranks_a_signal_ends_all(start: Callable[..., Launched], tmp_path: Path) -> None:
    (tmp_path / "no ranks yet").touch()
    run = start()
    launcher = run.pid("launcher")
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == 128 + signal.SIGTERM
    wait_for(lambda: is_gone(launcher))


def test_ranks_do_not_outlive_a_killed_command(start: Callable[..., Launched]) -> None:
    run = start()
    pids = run.pids()
    run.process.kill()
    wait_for(lambda: all(map(is_gone, pids)))
    assert run.heard("rank0") == run.heard("rank1") == ["SIGTERM"]


def test_the_terminal_speaks_to_the_command_alone(start: Callable[..., Launched]) -> None:
    run = start()
    sessions = {os.getsid(pid) for pid in run.pids()}
    assert len(sessions) == 1 and os.getsid(run.process.pid) not in sessions


def test_without_deepspeed_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from polyglu.training import launcher

    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        launcher.launch()
    assert end.value.code == 2 and "DeepSpeed is not installed" in capsys.readouterr().err
