"""What all benchmarks share: the machine and the versions, progress, and how measurements are told."""

import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table


def describe_machine(packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """Where and with which versions this is measured, and what else the machine was doing."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version_of(package) for package in packages},
    }


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def told(values: list[float] | None, digits: int = 2) -> str:
    """Median (least to most)."""
    if not values:
        return ""
    median, least, most = spread("", values).values()
    return f"{median:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"


def say(message: str) -> None:
    """A line of progress, with the seconds since the first one."""
    print(f"[{time.perf_counter() - _STARTED:6.1f} s] {message}", file=sys.stderr, flush=True)


_STARTED = time.perf_counter()


class Elsewhere(Exception):
    """What failed in another process; its message is the ``reason``."""


def reason(error: BaseException) -> str:
    """An error in one sentence."""
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, (TimeoutError, Elsewhere)) else f"{type(error).__name__}: {lines[0]}"[:300]


Column = Callable[[dict[str, Any], dict[str, dict[str, Any]]], str]
"""(row of a case, all rows of its group) -> cell."""


def as_table(title: str, results: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column]) -> Table:
    """Group -> case -> row as a table; a case that failed shows why, a case without a name stands for its group."""
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    for heading in columns:
        table.add_column(heading, justify="right")
    for group, rows in results.items():
        table.add_row(f"[bold]{escape(group)}")
        for case, row in rows.items():
            if "failed" in row:
                table.add_row(escape(f"  {case}: {row['failed']}"))
            else:
                table.add_row(f"  {escape(case)}", *(column(row, rows) for column in columns.values()))
        table.add_section()
    return table
