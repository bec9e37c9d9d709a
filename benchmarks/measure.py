"""What all benchmarks share: the machine and the versions, and how a row of measurements is told."""

import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


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
        **{package: version(package) for package in packages},
    }


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
