"""What entropy_reg does to routing and loss on a small run: python benchmarks/entropy_reg.py [--json FILE]

A model of two causal layers learns to continue arithmetic progressions, at a learning rate at which its router sharpens
until all neurons choose the same activation. Told at the end: loss on fresh progressions without noise, entropy of
routing on them (at most ln 4 = 1.386 nats): dynamic (full logits, what entropy_reg rewards) and static (alpha alone).
The last row trains without it and sets it for as many steps again: what it does for a run that has collapsed.
"""

import sys

sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import describe_machine, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

from polyglu.data.dataloader import MicroBatch
from polyglu.errors import run_command
from polyglu.files import write_json
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import LoopSection, ModelConfig
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.model import create_model
from polyglu.model.routing import dynamic_entropy, gumbel_noise, static_entropy
from polyglu.training.loss import LanguageModelLoss
from polyglu.training.optimizer import create_optimizer

MODEL = ModelConfig(
    vocab_size=64, d_model=32, d_ff=64, n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=16, seq_length=48,
    routing_scope="causal",
)  # fmt: skip
LEARNING_RATE, TAU_MAX, TAU_MIN = 2e-2, 1.0, 0.1
ROWS = 8
VALUES = (0.0, 0.01, 0.1, 1.0)
RESCUE = 0.1
"""Set after the collapse, in the last row."""


def main(
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each run.", min=1)] = 200,
    seeds: Annotated[int, typer.Option(help="Runs of each value.", min=1)] = 3,
) -> None:
    """Train with several values of entropy_reg; print loss and entropies, median over seeds."""
    results = {f"{value:g}": [train((value,), steps, seed) for seed in range(seeds)] for value in VALUES}
    results[f"0, then {RESCUE:g}"] = [train((0.0, RESCUE), steps, seed) for seed in range(seeds)]
    told = {name: summary(runs) for name, runs in results.items()}
    machine = describe_machine() | {"threads": torch.get_num_threads(), "steps": steps, "seeds": seeds}
    Console(width=140).print(as_table(machine, told))
    if json is not None:
        write_json(json, {"machine": machine, "results": told})


def train(entropy_regs: tuple[float, ...], steps: int, seed: int) -> dict[str, float]:
    """Train ``steps`` steps with each value in turn; tau falls during the first, and stays; then measure."""
    model = create_model(MODEL, seed)
    optimizer = create_optimizer(model, LoopSection(learning_rate=LEARNING_RATE))
    for stage, entropy_reg in enumerate(entropy_regs):
        loss_module = LanguageModelLoss(model, torch.float32, recompute="none", entropy_reg=entropy_reg)
        for step in range(stage * steps, (stage + 1) * steps):
            batch = progressions(seed, step)
            noise = gumbel_noise(seed, batch.sample_ids, MODEL.n_layers, MODEL.d_ff, MODEL.n_activations)
            parts = loss_module(batch, TAU_MAX + (TAU_MIN - TAU_MAX) * min(1.0, step / steps), noise)
            ((parts.loss + parts.penalty) / batch.n_targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return measure(model, seed)


@torch.no_grad()
def measure(model: PolychromaticLM, seed: int) -> dict[str, float]:
    """Loss per target on a fresh batch at the last temperature without noise, and mean entropies, in nats."""
    batch = progressions(seed, -1, rows=256)
    parts = LanguageModelLoss(model, torch.float32, recompute="none")(batch, TAU_MIN, None)
    alphas = [layer.mlp.alpha for layer in model.layers if isinstance(layer.mlp, PolyGLU)]
    dynamic = [dynamic_entropy(alpha, logits, 4096) for alpha, logits in zip(alphas, parts.routing, strict=True)]
    return {
        "loss": float(parts.loss) / batch.n_targets,
        "dynamic": float(torch.stack(dynamic).mean()),
        "static": float(torch.stack([static_entropy(alpha) for alpha in alphas]).mean()),
    }


def progressions(seed: int, step: int, rows: int = ROWS) -> MicroBatch:
    """Rows start, start + d, start + 2 d, ... modulo the vocabulary, with d from 1 to 7."""
    columns, vocabulary = MODEL.seq_length, MODEL.vocab_size
    generator = torch.Generator().manual_seed(seed * 10**6 + step + 1)
    start, d = (torch.randint(low, high, (rows, 1), generator=generator) for low, high in ((0, vocabulary), (1, 8)))
    ids: Tensor = (start + d * torch.arange(columns + 1)) % vocabulary  # [B, T + 1]
    bounds = torch.arange(0, rows * columns + 1, columns, dtype=torch.int32)
    samples = torch.arange(rows) + rows * (step + 1)
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), bounds, samples)


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median, least and most of each number over the runs."""
    return {key: value for name in runs[0] for key, value in spread(name, [run[name] for run in runs]).items()}


def as_table(machine: Mapping[str, Any], results: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title=", ".join(f"{key} {value}" for key, value in machine.items()), title_justify="left")
    table.add_column("entropy_reg")
    for heading in ("loss (min to max)", "dynamic entropy", "static entropy"):
        table.add_column(heading, justify="right")
    for name, row in results.items():
        cells = (
            f"{row[k]:.3f} ({row[f'{k}_min']:.3f} to {row[f'{k}_max']:.3f})" for k in ("loss", "dynamic", "static")
        )
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
