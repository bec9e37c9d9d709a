"""Cases that take turns, A B C A B C ..., so that a slow moment of the machine meets all of them.

A case is a function that does the work once and tells a stopwatch where it begins and ends. Ratios are of the same
round.

Time    on a GPU between events, on the CPU by the clock
Memory  GPU: most bytes allocated during a call, less what other cases hold; so its own weights and inputs are included.
        CPU: of cases that live alone, largest resident memory (VmHWM) during build and two calls, less what was
        resident before, with all libraries loaded
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Elsewhere, reason, say

SLEEP = 20_000_000
"""GPU cycles, about 10 ms, in which the host queues a call: then the host's own time is not in the GPU's."""
WARM_UP = {"cpu": 1, "cuda": 3}
"""Calls before the first turn. The first compiles; what another one may still compile shall not be timed either."""
LIBRARIES = ["torch", "torch._dynamo", "transformers.models.qwen3.modeling_qwen3"]
"""What takes long to import, and new processes find imported."""
NO_TIME = "no time was left for it"

Row = dict[str, Any]
"""Of a case: ``seconds`` (stretch -> of each round), ``start_s``, ``peak_mb``; or ``failed``, a sentence."""
Rows = dict[str, Row]
"""Case -> row."""
Case = Callable[["Stopwatch"], None]
Build = Callable[[], Case]
"""Makes a case with all that it needs. Of one that lives alone, it must be possible to pickle it."""
Laps = dict[str, float]
"""Stretch -> seconds, and of all."""
Turn = Callable[[], list[Laps]]
"""Of a case that lives: the calls of one turn."""


def ratios(row: Row | None, base: Row | None, stretch: str = "total") -> list[float] | None:
    """Time of a case as a multiple of another's, round by round; None where one was not measured."""
    if row is None or base is None or "failed" in row or "failed" in base:
        return None
    return [ours / theirs for ours, theirs in zip(row["seconds"][stretch], base["seconds"][stretch], strict=True)]


def start_seconds(row: Row, rows: Rows) -> str:
    """Cell: building and first calls, compilation included."""
    return f"{row['start_s']:.1f}" if "start_s" in row else ""


def peak(row: Row, rows: Rows) -> str:
    """Cell: MB."""
    return f"{row['peak_mb']:,.0f}" if "peak_mb" in row else ""


class Stopwatch:
    """Seconds of the stretches of a call; with ``ahead`` a GPU begins when the host has queued the call."""

    def __init__(self, device: torch.device, ahead: bool = False) -> None:
        self.device, self.on_gpu, self.ahead = device, device.type == "cuda", ahead
        self.marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """What came before is preparation."""
        if self.on_gpu:
            torch.cuda.synchronize()
            if self.ahead:
                torch.cuda._sleep(SLEEP)
        self.marks = []
        self.lap("start")

    def lap(self, name: str) -> None:
        """End of a stretch."""
        mark: Any = time.perf_counter()
        if self.on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.marks.append((name, mark))

    def read(self) -> Laps:
        if self.on_gpu:
            torch.cuda.synchronize()
        laps = {}
        for (_, before), (name, mark) in zip(self.marks, self.marks[1:], strict=False):
            laps[name] = before.elapsed_time(mark) / 1e3 if self.on_gpu else mark - before
        return {**laps, "total": sum(laps.values())}


class Rounds(NamedTuple):
    """Number of rounds; between the two, time decides."""

    least: int = 3
    most: int = 30


def compare(
    builds: Mapping[str, Build],
    device: torch.device,
    seconds: float,
    *,
    calls: int = 1,
    ahead: bool = False,
    rounds: Rounds = Rounds(),  # noqa: B008  # a constant
    alone: bool = False,
) -> Rows:
    """Let cases take turns.

    Args:
        builds: case -> what makes it; one that fails gets a sentence, and the others go on.
        device: whose time is taken.
        seconds: after which no further round begins.
        calls: of a turn, of which the median counts.
        ahead: see ``Stopwatch``.
        rounds: fewest and most.
        alone: on a CPU, each case lives in a process of its own, as in use, so that memory which one takes and gives
            back is not the others' gain; memory is then measured too.
    """
    rows: Rows = {}
    end = time.perf_counter() + seconds
    torch.compiler.reset()  # after code for other shapes, the compiler would make code for any shape
    torch._dynamo.config.recompile_limit = 64  # models that share a block's code are many here, in training one
    live: dict[str, Turn] = {}
    with ExitStack() as processes:
        for name, build in builds.items():
            say(f"  {name}")
            try:
                if time.perf_counter() > end:
                    raise TimeoutError(NO_TIME)
                watch = Stopwatch(device, ahead)
                started = _start_alone(build, watch, calls, processes) if alone else _start(build, watch, calls)
                live[name], rows[name] = started
            except Exception as error:
                rows[name] = {"failed": reason(error)}
            _release(device)
        _take_turns(live, rows, device, rounds, end)
        live.clear()
        _release(device)
    return rows


def _start(build: Build, watch: Stopwatch, calls: int) -> tuple[Turn, Row]:
    """Build and warm up."""
    started = time.perf_counter()
    before = torch.cuda.memory_allocated() if watch.on_gpu else 0
    case = build()
    for _ in range(WARM_UP[watch.device.type]):
        case(watch)
    watch.read()
    row: Row = {"start_s": time.perf_counter() - started}
    if watch.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        case(watch)
        watch.read()
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return partial(_turn, case, watch, calls), row


def _turn(case: Case, watch: Stopwatch, calls: int) -> list[Laps]:
    laps = []
    for _ in range(calls):
        case(watch)
        laps.append(watch.read())
    return laps


def _take_turns(live: dict[str, Turn], rows: Rows, device: torch.device, rounds: Rounds, end: float) -> None:
    """Add the seconds of each round to the rows of the cases that live; who fails drops out."""
    turn = 0
    while live and (turn < rounds.least or (turn < rounds.most and time.perf_counter() < end)):
        for name in list(live):
            try:
                laps = live[name]()
            except Exception as error:
                rows[name] = {"failed": reason(error)}
                del live[name]
                _release(device)
                continue
            for stretch in laps[0]:
                taken = rows[name].setdefault("seconds", {}).setdefault(stretch, [])
                taken.append(statistics.median(lap[stretch] for lap in laps))
        turn += 1


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _start_alone(build: Build, watch: Stopwatch, calls: int, processes: ExitStack) -> tuple[Turn, Row]:
    """``_start`` in a new process, which ends with ``processes``.

    Raises:
        Elsewhere: what failed there.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, build, watch, calls, torch.get_num_threads()), daemon=True)
    process.start()
    processes.callback(process.join)
    processes.callback(ours.close)  # first: it waits for that
    theirs.close()

    def answer() -> Any:
        try:
            found = ours.recv()
        except EOFError:
            process.join()
            raise Elsewhere(f"its process ended with code {process.exitcode}") from None
        if isinstance(found, str):
            raise Elsewhere(found)
        return found

    def turn() -> list[Laps]:
        ours.send(None)
        laps: list[Laps] = answer()
        return laps

    return turn, answer()


def _serve(pipe: Connection, build: Build, watch: Stopwatch, calls: int, threads: int) -> None:
    """What such a process does: answer with the case's row, then each message with a turn; or with what failed."""
    torch.set_num_threads(threads)
    try:
        before = _resident_before()
        turn, row = _start(build, watch, calls)
        turn()
        row["peak_mb"] = (_largest_resident() - before) / 1e6
        pipe.send(row)
        while True:
            pipe.recv()
            pipe.send(turn())
    except (EOFError, ConnectionError, KeyboardInterrupt):  # the other side has all it wants, or was interrupted
        pass
    except Exception as error:
        pipe.send(reason(error))


def _resident_before() -> int:
    """Bytes that are resident before a case, with what is loaded at the first use; from here the peak is counted."""
    matrix = torch.ones(64, 64, requires_grad=True)
    (matrix @ matrix).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    return _largest_resident()


def _largest_resident() -> int:
    """Of this process; ``ru_maxrss`` would begin with that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


class Group(NamedTuple):
    """Cases to be compared, and the share of the time that they may take, in proportion to the others'."""

    weight: float
    measure: Callable[[float], Rows]


def measure_groups(groups: Mapping[str, Group], seconds: float) -> dict[str, Rows]:
    """Group -> rows; time that one does not use is the others', and one that fails gets a sentence."""
    end, left = time.perf_counter() + seconds, sum(group.weight for group in groups.values())
    results: dict[str, Rows] = {}
    for name, group in groups.items():
        share = max(0.0, end - time.perf_counter()) * group.weight / left
        left -= group.weight
        say(f"{name}: about {share:.0f} s")
        try:
            results[name] = group.measure(share)
        except Exception as error:
            results[name] = {"all": {"failed": reason(error)}}
    return results
