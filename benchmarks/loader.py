"""How fast training gets its batches: python benchmarks/loader.py [--json FILE] [--tokens N]

speed      tokens/s of ``TokenLoader.step`` on one core, from data in the page cache: whole steps, ready for a model
prefetch   milliseconds a consumer waits for its batch when the loader runs ahead in a thread
start-up   seconds to open 100 billion tokens (1,000 chunks, sparse files), plan 190,735 steps and make the first one

Median, and least and most, of all rounds; the cases of a round take turns.
"""

import sys

sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure import describe_machine, spread
from rich.console import Console
from rich.table import Table

from polyglu.data.chunks import TOKEN, TokenSource, open_source
from polyglu.data.dataloader import TokenLoader
from polyglu.data.manifest import new_manifest, write_manifest
from polyglu.data.order import MixSchedule
from polyglu.data.prefetch import prefetch
from polyglu.errors import run_command
from polyglu.files import write_json
from polyglu.training.feed import STEPS_AHEAD, host_batches

VOCABULARY, EOS = 151_669, 151_643
START, END = (0.70, 0.25, 0.05), (0.85, 0.10, 0.05)
DOCUMENT = 600
"""Tokens of a document, on average."""
CHUNK = 8_000_000
STEPS = 10_000
SHAPES = [
    (4096, 2, 64), (4096, 16, 8), (4096, 2, 1),
    (512, 2, 64), (512, 4, 32), (512, 8, 16), (512, 16, 8), (512, 16, 1),
]  # fmt: skip
"""(T, rows of a micro batch, micro batches of a step)."""
STEP_SECONDS = 0.05
"""What a training step of 524,288 tokens takes in the prefetch case: 10 million tokens/s, a fast node."""
BIG_CHUNKS, BIG_CHUNK, BIG_STEPS = (700, 250, 50), 100_000_000, 190_735


def main(
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens on disk, for speed.", min=3_000_000)] = 96_000_000,
    rounds: Annotated[int, typer.Option(help="Turns of each case.", min=1)] = 9,
) -> None:
    """Measure the loader; print a table."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        sources = write_sources(Path(folder), tokens)
        results: dict[str, Any] = {"million tokens/s on one core": speed(sources, rounds)}
        results["ms waited for a batch, prefetching"] = {f"a step of {STEP_SECONDS * 1e3:.0f} ms": waits(sources)}
    with tempfile.TemporaryDirectory() as folder:
        results["s to start, 100 billion tokens"] = {"3 sources, 1,000 chunks": start_up(Path(folder), rounds)}
    machine = describe_machine()
    Console(width=140).print(as_table(machine, results))
    if json is not None:
        write_json(json, {"machine": machine, "tokens": tokens, "rounds": rounds, "results": results})


def speed(sources: Sequence[TokenSource], rounds: int) -> dict[str, dict[str, float]]:
    """Million tokens/s of each shape; a round is steps of about 10 million tokens that no round before has read."""
    loaders = {shape: create_loader(sources, STEPS, *shape) for shape in SHAPES}
    rates: dict[tuple[int, int, int], list[float]] = {shape: [] for shape in SHAPES}
    for turn in range(rounds + 1):
        for shape, loader in loaders.items():
            size = shape[0] * shape[1] * shape[2]
            steps = max(1, min(10_000_000 // size, STEPS // (rounds + 1)))
            start = time.perf_counter()
            for step in range(turn * steps, (turn + 1) * steps):
                loader.step(step)
            if turn:  # the first warms up
                rates[shape].append(steps * size / (time.perf_counter() - start) / 1e6)
    return {f"T={T}, {rows} rows x {micro}": spread("value", rates[T, rows, micro]) for T, rows, micro in SHAPES}


def waits(sources: Sequence[TokenSource]) -> dict[str, float]:
    """Milliseconds from asking for a step's batches to having them, the first step apart."""
    steps, waited = range(60), []
    loader = create_loader(sources, len(steps), *SHAPES[0])
    with closing(prefetch(host_batches(loader, steps, torch.device("cpu")), STEPS_AHEAD)) as ready:
        for _ in steps:
            start = time.perf_counter()
            next(ready)
            waited.append((time.perf_counter() - start) * 1e3)
            time.sleep(STEP_SECONDS)  # the device trains
    return spread("value", waited[1:])


def start_up(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds from the folders' names to the first step's batches."""
    folders = [folder / str(index) for index in range(len(BIG_CHUNKS))]
    for path, chunks in zip(folders, BIG_CHUNKS, strict=True):
        write_sparse_source(path, chunks)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        create_loader([open_source(path) for path in folders], BIG_STEPS, 4096, 2, 64).step(0)
        seconds.append(time.perf_counter() - start)
    return spread("value", seconds)


def create_loader(sources: Sequence[TokenSource], steps: int, seq_length: int, rows: int, micro: int) -> TokenLoader:
    return TokenLoader(
        sources,
        MixSchedule(START, END, anneal_start=0.8, total_steps=steps),
        seq_length=seq_length,
        rows=rows,
        accumulation=micro,
        rank=0,
        world_size=1,
        seed=0,
        vocab_size=VOCABULARY,
    )


def write_sources(folder: Path, tokens: int) -> list[TokenSource]:
    """Random documents in sources of the mix's sizes; what is just written lies in the page cache."""
    rng = np.random.default_rng(0)
    for index, share in enumerate(START):
        chunks = []
        for start in range(0, int(tokens * share), CHUNK):
            ids = rng.integers(0, EOS, min(CHUNK, int(tokens * share) - start), dtype=TOKEN.type)
            ids[rng.random(len(ids), dtype=np.float32) < 1 / DOCUMENT] = EOS
            chunks.append(ids)
        path = folder / str(index)
        write_folder(path, [len(chunk) for chunk in chunks])
        for number, chunk in enumerate(chunks):
            chunk.tofile(path / f"chunk_{number:05d}.bin")
    return [open_source(folder / str(index)) for index in range(len(START))]


def write_sparse_source(folder: Path, chunks: int) -> None:
    """Chunks that take no room on disk: all holes, read as token 0."""
    write_folder(folder, [BIG_CHUNK] * chunks)
    for number in range(chunks):
        with open(folder / f"chunk_{number:05d}.bin", "wb") as file:
            file.truncate(BIG_CHUNK * TOKEN.itemsize)


def write_folder(folder: Path, sizes: Sequence[int]) -> None:
    tokenizer = {"name": "none", "fingerprint": "0" * 64, "vocab_size": VOCABULARY, "eos_id": EOS}
    manifest = new_manifest(tokenizer, {}, max(sizes))
    end = {"file": 0, "row_group": 0, "row": 0, "tokens": 0}
    manifest["chunks"] = [
        {"file": f"chunk_{number:05d}.bin", "tokens": size, "documents": 0, "sha256": f"{number:064x}", "end": end}
        for number, size in enumerate(sizes)
    ]
    folder.mkdir()
    write_manifest(folder, manifest | {"tokens": sum(sizes), "complete": True})


def as_table(machine: dict[str, Any], results: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table(title=", ".join(f"{key} {value}" for key, value in machine.items()), title_justify="left")
    for heading in ("what", "case"):
        table.add_column(heading)
    for heading in ("median", "least", "most"):
        table.add_column(heading, justify="right")
    for what, cases in results.items():
        for name, case in cases.items():
            figures = (f"{case[key]:.3g}" for key in ("value", "value_min", "value_max"))
            table.add_row(what if name == next(iter(cases)) else "", name, *figures)
        table.add_section()
    return table


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
