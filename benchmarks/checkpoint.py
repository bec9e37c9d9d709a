"""What saving costs a run: python benchmarks/checkpoint.py [--json FILE] [--steps N] [--rounds N]

loop    seconds that a resume checkpoint takes from the loop: in the foreground (``save`` and ``finish``), and in the
        background (``save``, some training steps, ``finish``, less what the steps take alone); the three take turns
speed   MB/s of each part of a save and of a resume, alone: copy, write and flush, hash, verify, load; files that were
        just written lie in the page cache

The model has about 100 million parameters, its checkpoint 1.1 GB. Median, and least and most, of all rounds.
"""

import sys

sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import describe_machine, spread
from rich.console import Console
from rich.table import Table

from polyglu.data.dataloader import MicroBatch
from polyglu.errors import run_command
from polyglu.files import sha256, write_atomically, write_json
from polyglu.model.config import ModelConfig, TrainingSection
from polyglu.model.model import create_model
from polyglu.model.routing import gumbel_noise
from polyglu.training.checkpoint import read_resume_point, restore, step_folder
from polyglu.training.devices import pick_device
from polyglu.training.engine import Engine, create_engine
from polyglu.training.guard import RunState
from polyglu.training.ranks import Ranks
from polyglu.training.saver import Checkpoints
from polyglu.training.shards import copied, write_shard

MODEL = ModelConfig(
    vocab_size=32_768, d_model=640, d_ff=2560, n_layers=12, n_q_heads=10, n_kv_heads=5, head_dim=64, seq_length=16,
    routing_scope="causal",
)  # fmt: skip
MB = 10**6


def main(
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; default: for temporary files.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps after a save.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Turns of each case.", min=1)] = 5,
) -> None:
    """Measure; print a table."""
    ranks = Ranks(pick_device(0))
    engine = create_engine(create_model(MODEL), TrainingSection(), ranks)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        checkpoints = Checkpoints(engine, Path(place), {}, 2, lambda *event: print(*event))
        results = {"s": loop(engine, checkpoints, steps, rounds), "MB/s": speed(engine, checkpoints, rounds)}
        n_bytes = checkpoints.n_bytes
    machine = describe_machine() | {"device": ranks.device.type, "threads": torch.get_num_threads()}
    Console(width=140).print(
        as_table(machine, f"a checkpoint of {n_bytes / MB:,.0f} MB, {steps} steps a turn", results)
    )
    if json is not None:
        write_json(json, {"machine": machine, "bytes": n_bytes, "steps": steps, "rounds": rounds, "results": results})


def train(engine: Engine, checkpoints: Checkpoints, steps: int) -> None:
    """Steps of one short row each, with what the loop does between them."""
    device = engine.ranks.device
    for step in range(steps):
        ids = torch.randint(MODEL.vocab_size, (1, MODEL.seq_length + 1), generator=torch.Generator().manual_seed(step))
        bounds = torch.tensor([0, MODEL.seq_length], dtype=torch.int32)
        batch = MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), bounds, torch.tensor([step])).to(device)
        noise = gumbel_noise(0, batch.sample_ids, MODEL.n_layers, MODEL.d_ff, MODEL.n_activations)
        if not checkpoints.is_writing:
            checkpoints.settle()
        engine.backward(engine.forward(batch, 0.5, noise).loss / MODEL.seq_length, True)
        engine.step(1e-4)


def loop(engine: Engine, checkpoints: Checkpoints, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a turn's parts; the first round, which also makes the buffers, is not counted."""
    seconds: dict[str, list[float]] = {
        "steps alone": [],
        "save in the foreground": [],
        "save in the background adds": [],
        "  of that, until save returns": [],
        "  of that, waiting after the steps": [],
        "background / foreground": [],
    }
    for turn in range(rounds + 1):
        alone = timed(lambda: train(engine, checkpoints, steps))
        front = save(checkpoints, 2 * turn) + timed(checkpoints.finish)
        started = save(checkpoints, 2 * turn + 1)
        behind = timed(lambda: train(engine, checkpoints, steps))
        waited = timed(checkpoints.finish)
        added = started + behind + waited - alone
        if turn:
            values = [alone, front, added, started, waited, added / front]
            for of_kind, value in zip(seconds.values(), values, strict=True):
                of_kind.append(value)
    return {name: spread("value", values) for name, values in seconds.items()}


def save(checkpoints: Checkpoints, step: int) -> float:
    """Seconds until it returns."""
    return checkpoints.save(RunState(step=step))


def speed(engine: Engine, checkpoints: Checkpoints, rounds: int) -> dict[str, dict[str, float]]:
    """MB/s of each part, alone."""
    save(checkpoints, 10**6)
    checkpoints.finish()
    point = read_resume_point(step_folder(checkpoints.checkpoint_dir, 10**6))
    buffers: dict[str, torch.Tensor] = {}
    pieces, shard = copied(engine.pieces(), buffers), checkpoints.checkpoint_dir / "shard"
    parts: dict[str, Callable[[], Any]] = {
        "copy to the host": lambda: copied(engine.pieces(), buffers),
        "write, hash and flush": lambda: write_atomically(shard, lambda file: write_shard(file, pieces)),
        "hash": lambda: sha256(shard),
        "verify": lambda: read_resume_point(point.folder),
        "load": lambda: restore(engine, point),
    }
    rates: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            rates[name].append(checkpoints.n_bytes / MB / timed(part))
    return {name: spread("value", values) for name, values in rates.items()}


def timed(work: Callable[[], Any]) -> float:
    """Seconds that work took, a GPU's included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def as_table(machine: dict[str, Any], title: str, results: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table(title=title, caption=", ".join(f"{key} {value}" for key, value in machine.items()))
    for column in ("", "unit", "median", "least", "most"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    for unit, rows in results.items():
        for name, row in rows.items():
            values = (f"{row[key]:,.2f}" for key in ("value", "value_min", "value_max"))
            table.add_row(name, "" if "/" in name else unit, *values)
    return table


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
