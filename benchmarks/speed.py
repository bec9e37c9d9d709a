"""How fast and how large: python benchmarks/speed.py cpu | gpu [--json FILE] [--only ffn,step,loss,scaling]

ffn      a feed-forward layer alone, whole and elementwise (speed_ffn.py)
step     a training step beside SwiGLU and transformers' Qwen3, recomputation, DeepSpeed (speed_step.py)
loss     head and cross-entropy (speed_loss.py)
scaling  length of rows, layers, activations, ranks (speed_scaling.py)

Ends with the goals and what was measured of them. How time and memory are taken: turns.py. Each part has a budget of
time: what it does not suffice for is told as not measured, like what fails. The CPU's parts take about 20 minutes
together, a GPU's less than 9.
"""

import sys

if __name__ == "__main__":  # and not where memory is measured, in new processes
    sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import speed_ffn
import speed_loss
import speed_scaling
import speed_step
import torch
import typer
from measure import as_table, describe_machine, reason, say
from rich.console import Console
from speed_goals import Goal, cpu_goals, goals_table, gpu_goals

from polyglu.errors import PolygluError, run_command
from polyglu.files import write_json

PARTS: dict[str, Any] = {"ffn": speed_ffn, "step": speed_step, "loss": speed_loss, "scaling": speed_scaling}
SECONDS = {
    "cpu": {"ffn": 90, "step": 580, "loss": 40, "scaling": 380},
    "gpu": {"ffn": 60, "step": 255, "loss": 35, "scaling": 120},
}
"""Budgets. A part may overdraw its own by what a case needs that has begun."""
PACKAGES = ("torch", "triton", "transformers", "liger_kernel", "deepspeed", "flash_attn")


class Kind(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


def main(
    device: Annotated[Kind, typer.Argument(help="What to measure.")],
    json: Annotated[Path | None, typer.Option(help="Also write the results here, after each part.")] = None,
    only: Annotated[str, typer.Option(help="Parts, separated by commas.")] = ",".join(PARTS),
) -> None:
    """Measure and print a table for each part, then the goals."""
    unknown = set(only.split(",")) - set(PARTS)
    if unknown:
        raise PolygluError(f"--only: {', '.join(sorted(unknown))} is no part; choose from {', '.join(PARTS)}.")
    if device == Kind.gpu and not torch.cuda.is_available():
        raise PolygluError("speed.py gpu: there is no CUDA device here; choose cpu.")
    torch.manual_seed(0)
    machine = describe_machine(PACKAGES) | {"threads": torch.get_num_threads()}
    if device == Kind.gpu:
        machine["gpu"] = torch.cuda.get_device_name()
    console, results, seconds = Console(width=180), {}, {}
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    goals: list[Goal] = []
    for name in [part for part in PARTS if part in only.split(",")]:
        started = time.perf_counter()
        results[name], tables = measure_part(name, device)
        seconds[name] = round(time.perf_counter() - started, 1)
        for table in tables:
            console.print(table)
        goals = cpu_goals(results) if device == Kind.cpu else gpu_goals(results)
        if json is not None:
            machine["load_after"] = round(os.getloadavg()[0], 2)
            told = {"machine": machine, "seconds": seconds, "goals": [goal.as_json() for goal in goals]}
            write_json(json, told | {"results": results})
    console.print(goals_table(goals))
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    console.print(f"load {machine['load']} before, {os.getloadavg()[0]:.2f} after; {took}")


def measure_part(name: str, device: Kind) -> tuple[dict[str, Any], list[Any]]:
    """Results, group by group, and tables of them."""
    module, budget = PARTS[name], SECONDS[device][name]
    say(f"{name}: {budget} s")
    try:
        shape = module.cpu_shape() if device == Kind.cpu else module.gpu_shape()
        results = module.measure(shape, budget)
        return results, module.tables(results)
    except Exception as error:
        failed = {"all": {name: {"failed": reason(error)}}}
        return failed, [as_table(name, failed, {})]


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
