"""Planning past one machine: python benchmarks/scaling.py plan | start-up | traffic

plan       a table of time, traffic and memory for 1 to 1,024 GPUs, from assumptions that the options name
start-up   seconds until one rank of many has its first batch: should not depend on the number of ranks
traffic    bytes that DeepSpeed's collectives take a step; deepspeed --num_gpus=2 --no_local_rank in place of python
"""

import sys

sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import describe_machine, spread
from rich.console import Console
from rich.table import Table

PARAMETERS = 597_153_888
LAYERS, D_MODEL = 28, 1024
SEQ_LENGTH = 4096
ROWS = 128
"""Rows of the paper's step: 524,288 tokens."""
TOKENS = 19_531 * ROWS * SEQ_LENGTH
"""Tokens of the paper's run."""
BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in elements; with overlap_comm there are two of them."""
FP32 = 4
GPUS = "1,2,4,8,16,64,128,256,512,1024"
COLUMNS = {
    "gpus": "GPUs", "rows_per_step": "rows a step", "cut": "rows x micro a GPU", "compute": "compute s",
    "sent": "GB sent a GPU", "reduce": "reduce s", "gather": "gather s", "step_hidden": "s a step, hidden",
    "step_open": "not hidden", "rate": "M tokens/s", "efficiency": "efficiency %", "days": "days",
    "read": "MB/s read, all", "memory": "GB state a GPU", "file": "GB a rank's file",
}  # fmt: skip

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Assumptions:
    """What the table is made from; defaults are told in docs/scaling.md."""

    peak: float
    """FLOP/s of a GPU."""
    mfu: float
    """Share of it that 6 FLOPs a parameter and token are; recomputation is not counted."""
    micro_rows: int
    gpus_per_machine: int
    inside: float
    """Bytes/s that a GPU sends to its neighbour inside a machine."""
    between: float
    """Bytes/s that a machine sends to another."""
    stage: int
    """Of ZeRO."""


def plan_for(gpus: int, given: Assumptions) -> dict[str, Any]:
    """A row of the table."""
    rows_per_step = max(ROWS, gpus)  # a row is the least that a GPU can work on: beyond 128 GPUs the batch grows
    rows = rows_per_step / gpus
    micro = min(given.micro_rows, rows)
    micro_batches = rows / micro
    compute = rows * SEQ_LENGTH * 6 * PARAMETERS / (given.peak * given.mfu)

    # A ring: an all-reduce sends 2 (R-1)/R of the tensor from each GPU, an all-gather (R-1)/R. It passes each machine's
    # link once, so the slowest link on the way sets its pace.
    once = FP32 * PARAMETERS * (gpus - 1) / gpus
    reduced = 2 * once * (micro_batches if given.stage == 2 else 1)
    link = given.inside if gpus <= given.gpus_per_machine else min(given.inside, given.between)
    reduce, gather = reduced / link, once / link
    hidden, visible = max(compute, reduce) + gather, compute + reduce + gather

    gradients = (2 / gpus if given.stage == 2 else 1 + 1 / gpus) * PARAMETERS
    state = FP32 * ((1 + 3 / gpus) * PARAMETERS + gradients + 2 * BUCKET)
    tokens = rows_per_step * SEQ_LENGTH
    alone = given.peak * given.mfu / (6 * PARAMETERS)
    return {
        "gpus": f"{gpus:,}",
        "rows_per_step": f"{rows_per_step:,}",
        "cut": f"{micro:g} x {micro_batches:g}",
        "compute": f"{compute:.2f}",
        "sent": f"{(reduced + once) / 1e9:.1f}",
        "reduce": f"{reduce:.2f}",
        "gather": f"{gather:.2f}",
        "step_hidden": f"{hidden:.2f}",
        "step_open": f"{visible:.2f}",
        "rate": f"{tokens / visible / 1e6:.3g} to {tokens / hidden / 1e6:.3g}",
        "efficiency": f"{100 * tokens / visible / alone / gpus:.0f} to {100 * tokens / hidden / alone / gpus:.0f}",
        "days": f"{TOKENS / tokens * hidden / 86400:.2f} to {TOKENS / tokens * visible / 86400:.2f}",
        "read": f"{FP32 * tokens / hidden / 1e6:.2f}",
        "memory": f"{state / 1e9:.1f}",
        "file": f"{12 * PARAMETERS / gpus / 1e9:.3f}",
    }


@app.command()
def plan(
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs.")] = GPUS,
    peak: Annotated[float, typer.Option(help="TFLOP/s of a GPU, bf16, dense.")] = 312,
    mfu: Annotated[float, typer.Option(help="Share of the peak that training reaches, by 6N.")] = 0.1355,
    micro_rows: Annotated[int, typer.Option(help="Rows of a micro batch.", min=1)] = 2,
    gpus_per_machine: Annotated[int, typer.Option(min=1)] = 8,
    inside: Annotated[float, typer.Option(help="GB/s that a GPU sends inside a machine.")] = 200,
    between: Annotated[float, typer.Option(help="GB/s that a machine sends to another.")] = 10,
    storage: Annotated[float, typer.Option(help="GB/s that the shared storage writes.")] = 1,
    stage: Annotated[int, typer.Option(help="Of ZeRO.", min=1, max=2)] = 2,
) -> None:
    """Print the table, in Markdown."""
    given = Assumptions(peak * 1e12, mfu, micro_rows, gpus_per_machine, inside * 1e9, between * 1e9, stage)
    rows = [plan_for(int(number), given) for number in gpus.split(",")]
    print("| " + " | ".join(COLUMNS.values()) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(row[key] for key in COLUMNS) + " |")
    for name, size in (("resume", 12 * PARAMETERS / 1e9), ("portable", FP32 * PARAMETERS / 1e9)):
        print(f"\n{name} checkpoint: {size:.1f} GB, {size / storage:.1f} s")


@app.command()
def start_up(rounds: Annotated[int, typer.Option(help="Turns of each case.", min=1)] = 5) -> None:
    """Measure one rank's start, from the folders' names to its first micro batches, for runs of 1 to 1,024 ranks."""
    from loader import BIG_CHUNKS, BIG_STEPS, END, START, VOCABULARY, write_sparse_source

    from polyglu.data.chunks import open_source
    from polyglu.data.dataloader import TokenLoader
    from polyglu.data.order import MixSchedule

    torch.set_num_threads(1)
    cases = [(ranks, max(ROWS, ranks)) for ranks in (1, 8, 128, 1024)] + [(1, 1024)]  # the last: batch alone, no ranks
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    processor: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(index) for index in range(len(BIG_CHUNKS))]
        for path, chunks in zip(folders, BIG_CHUNKS, strict=True):
            write_sparse_source(path, chunks)
        for _ in range(rounds):
            for ranks, rows in cases:
                start, start_processor = time.perf_counter(), time.process_time()
                TokenLoader(
                    [open_source(path) for path in folders],
                    MixSchedule(START, END, anneal_start=0.8, total_steps=BIG_STEPS * ROWS // rows),
                    seq_length=SEQ_LENGTH,
                    rows=1,
                    accumulation=rows // ranks,
                    rank=ranks - 1,
                    world_size=ranks,
                    seed=0,
                    vocab_size=VOCABULARY,
                ).step(0)
                seconds[ranks, rows].append(time.perf_counter() - start)
                processor[ranks, rows].append(time.process_time() - start_processor)
    table = Table("ranks", "rows a step", "rows a rank", "s", "s of the processor", title=str(describe_machine()))
    for ranks, rows in cases:
        figures = [spread("value", values[ranks, rows]) for values in (seconds, processor)]
        told = [f"{one['value']:.3f} ({one['value_min']:.3f} to {one['value_max']:.3f})" for one in figures]
        table.add_row(str(ranks), str(rows), str(rows // ranks), *told)
    Console(width=120).print(table)


@app.command()
def traffic(
    micro_batches: Annotated[int, typer.Option(help="Of a step.", min=1)] = 4,
    stage: Annotated[int, typer.Option(help="Of ZeRO.", min=1, max=2)] = 2,
) -> None:
    """Count the bytes of DeepSpeed's collectives over a step of a small model, as multiples of its fp32 weights."""
    import deepspeed

    from polyglu.training.engine import read_deepspeed_config

    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    weights = FP32 * sum(parameter.numel() for parameter in model.parameters())
    config = read_deepspeed_config(Path("configs/ds_config.json"))
    config["zero_optimization"] |= {"stage": stage, "reduce_bucket_size": 1_000_000}
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro_batches}
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=True)
    counted: Counter[str] = Counter()
    for name in (
        "all_reduce",
        "reduce",
        "reduce_scatter_fn",
        "reduce_scatter_tensor",
        "all_gather_into_tensor",
        "all_gather",
    ):
        setattr(deepspeed.comm, name, counting(name, getattr(deepspeed.comm, name), counted))
    for _ in range(micro_batches):
        engine.backward(engine(torch.randn(2, 64)).sum())
        engine.step()
    if int(os.environ["RANK"]) == 0:
        for name, size in counted.items():
            print(f"{name}: {size / weights:.3f} of the weights")


def counting(name: str, function: Any, counted: Counter[str]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        tensor = arguments[0] if arguments else options.get("tensor", options.get("output_tensor"))
        tensors = tensor if isinstance(tensor, list) else [tensor]
        counted[name] += sum(one.numel() * one.element_size() for one in tensors)
        return function(*arguments, **options)

    return call


if __name__ == "__main__":
    app()
