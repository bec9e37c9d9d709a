"""What routing costs on the CPU, next to SwiGLU: python benchmarks/mixture.py [--json FILE]

mixture    elementwise part of a feed-forward layer, forward and backward: mixed activation of the gate, times up
step       whole training step of configs/tiny/train.yaml's model: noise, forward, loss, backward, AdamW

The cases take turns, A B C A B C ..., so that a slow moment of the machine meets all of them.
"MB kept" is what autograd holds between forward and backward.
"""

import sys

sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import typer
from measure import describe_machine, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

from polyglu.config_file import load_config
from polyglu.data.dataloader import MicroBatch
from polyglu.errors import run_command
from polyglu.files import write_json
from polyglu.model import architecture
from polyglu.model.config import FeedForward, TrainConfig
from polyglu.model.model import create_model
from polyglu.model.routing import mix_activations, mix_reference
from polyglu.training.engine import PlainEngine
from polyglu.training.loss import LanguageModelLoss, batch_noise
from polyglu.training.ranks import Ranks

TINY = Path(__file__).parents[1] / "configs/tiny/train.yaml"
SHAPES = {"demo: N=1024 F=384": (4, 256, 384), "N=1024 F=2048": (4, 256, 2048)}
"""Name -> rows, positions, neurons."""
K, TAU = 4, 0.5
DOCUMENT = 88
"""Tokens of a document, the mean of the demo's mathematics."""
BASELINE = "SwiGLU"

Mixture = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Case = Callable[[], None]


def main(
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each case.", min=1)] = 30,
) -> None:
    """Measure the mixture and the training step; print a table of medians."""
    results = {f"mixture, {name}": compare(mixture_cases(*shape), rounds, calls=3) for name, shape in SHAPES.items()}
    results["training step, configs/tiny/train.yaml"] = compare(step_cases(), rounds, calls=1)
    machine = describe_machine() | {"threads": torch.get_num_threads(), "dtype": "fp32"}
    Console(width=140).print(as_table(machine, results))
    if json is not None:
        write_json(json, {"machine": machine, "rounds": rounds, "results": results})


def compare(cases: Mapping[str, Case], rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Time cases in turns: ms of a call, and ratio to the baseline in the same round; median, least and most.

    Beside them, the megabytes that a call keeps for its backward pass, weights included.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 2):
        for name, case in cases.items():
            start = time.perf_counter()
            for _ in range(calls):
                case()
            if turn >= 2:  # the first two warm up
                times[name].append((time.perf_counter() - start) / calls * 1e3)
    results = {}
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[BASELINE], strict=True)]
        results[name] = {**spread("ms", values), **spread("ratio", ratios), "kept_mb": kept_bytes(cases[name]) / 1e6}
    return results


def kept_bytes(case: Case) -> int:
    """Size of all memory that autograd holds between forward and backward, each piece counted once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        case()
    return sum(kept.values())


def mixture_cases(rows: int, columns: int, d_ff: int) -> dict[str, Case]:
    """Routing depends on the position, as under causal scope, and each row has its own noise, as in training."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    gate, up = random(rows, columns, d_ff), random(rows, columns, d_ff)
    neuron, token = random(rows, d_ff, K), random(rows, columns, K)
    grad = torch.randn(gate.shape, generator=generator)

    def polyglu(mixture: Mixture) -> Case:
        return lambda: run(mixture(gate, neuron, token, TAU) * up, gate, up, neuron, token)

    def run(hidden: Tensor, *inputs: Tensor) -> None:
        torch.autograd.grad(hidden, inputs, grad)

    return {
        BASELINE: lambda: run(F.silu(gate) * up, gate, up),
        "PolyGLU, chunked": polyglu(mix_activations),
        "PolyGLU, reference": polyglu(mix_reference),
    }


def step_cases() -> dict[str, Case]:
    """The same batch, optimiser and engine for all; the reference takes the place of the chunked mixture."""
    config = load_config(TrainConfig, TINY, ["training.precision=fp32"])
    batch = random_batch(config)
    reference = training_step(config, "polyglu", batch)

    def with_reference() -> None:
        with patch.object(architecture, "mix_activations", mix_reference):
            reference()

    return {
        BASELINE: training_step(config, "swiglu", batch),
        "PolyGLU, chunked": training_step(config, "polyglu", batch),
        "PolyGLU, reference": with_reference,
    }


def training_step(config: TrainConfig, ffn: FeedForward, batch: MicroBatch) -> Case:
    model_config = config.model.model_copy(update={"ffn": ffn})
    loss_module = LanguageModelLoss(create_model(model_config), torch.float32, recompute="none")
    engine, n_targets = PlainEngine(loss_module, config.training, Ranks(torch.device("cpu"))), batch.n_targets

    def step() -> None:
        parts = engine.forward(batch, TAU, batch_noise(model_config, batch, seed=0))
        engine.backward(parts.loss / n_targets, last=True)
        engine.step(1e-4)

    return step


def random_batch(config: TrainConfig) -> MicroBatch:
    rows, columns = config.training.micro_batch_size, config.model.seq_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.model.vocab_size, (rows, columns + 1), generator=generator)
    bounds = sorted({row * columns + start for row in range(rows) for start in range(0, columns, DOCUMENT)})
    cu_seqlens = torch.tensor([*bounds, rows * columns], dtype=torch.int32)
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), cu_seqlens, torch.arange(rows))


def as_table(machine: Mapping[str, Any], results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    table = Table(title=", ".join(f"{key} {value}" for key, value in machine.items()), title_justify="left")
    for heading in ("what", "case"):
        table.add_column(heading)
    for heading in ("ms (min to max)", "of SwiGLU (min to max)", "MB kept"):
        table.add_column(heading, justify="right")
    for what, cases in results.items():
        for name, case in cases.items():
            cells = (f"{case[k]:.2f} ({case[f'{k}_min']:.2f} to {case[f'{k}_max']:.2f})" for k in ("ms", "ratio"))
            table.add_row(what if name == BASELINE else "", name, *cells, f"{case['kept_mb']:.1f}")
        table.add_section()
    return table


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
