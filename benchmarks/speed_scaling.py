"""Tokens/s of a training step (``steps``), PolyGLU with causal routing beside its SwiGLU twin, as sizes grow.

T        length of the rows, at the same number of tokens a step, or on one row that is longer; rows are whole
layers   of the model
K        activations that a neuron chooses among
ranks    on the CPU: ZeRO-2 with 1 and 2 ranks of one thread each, beside the plain engine with one thread
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from measure import as_table
from rich.table import Table
from speed_ranks import PLAIN, launch
from steps import Setting, compare_steps, peak_of_device, step_columns, training_step, with_work
from turns import Build, Group, Rows, measure_groups

from polyglu.model.config import ModelConfig

TWIN, FUSED = "SwiGLU twin", "fused, causal"


@dataclass(frozen=True)
class Shape:
    setting: Setting
    """Its rows times its seq_length are the tokens of a step."""
    lengths: tuple[int, ...]
    layers: tuple[int, ...]
    activations: tuple[int, ...]
    ranks: tuple[int, ...]
    """Of DeepSpeed."""


def cpu_shape() -> Shape:
    model = ModelConfig(
        vocab_size=1024, d_model=256, d_ff=1024, n_layers=4, n_q_heads=4, n_kv_heads=2, head_dim=64, seq_length=512,
        routing_scope="causal",
    )  # fmt: skip
    setting = Setting(model, torch.device("cpu"), 8, 512, "fp32")
    return Shape(
        setting,
        lengths=(512, 1024, 2048, 4096, 16_384),
        layers=(1, 4, 16),
        activations=(1, 2, 3, 4, 5, 6),
        ranks=(1, 2),
    )


def gpu_shape() -> Shape:
    """Most telling sizes first: the time may not suffice for all. The first has K = 4 and 28 layers."""
    setting = Setting(ModelConfig(routing_scope="causal"), torch.device("cuda"), 4, 4096, "bf16")
    return Shape(
        setting, lengths=(4096, 16_384, 512, 8192, 2048, 1024), layers=(7, 14), activations=(6, 1, 2, 3, 5), ranks=()
    )


def measure(shape: Shape, seconds: float) -> dict[str, Rows]:
    setting, tokens = shape.setting, shape.setting.tokens
    peak = peak_of_device(setting.device, [setting.precision])[setting.precision]
    groups = {}
    for length in shape.lengths:
        rows, weight = max(1, tokens // length), max(1, length // tokens)
        changed = replace(setting.with_model(seq_length=length), rows=rows, document=length)
        groups[f"T = {length}, {rows} row(s)"] = Group(weight, partial(measure_pair, changed, peak))
    for layers in shape.layers:
        groups[f"layers = {layers}"] = Group(1, partial(measure_pair, setting.with_model(n_layers=layers), peak))
    for count in shape.activations:
        groups[f"K = {count}"] = Group(1, partial(measure_pair, setting.with_model(n_activations=count), peak))
    for ranks in shape.ranks:
        groups[f"ranks = {ranks}"] = Group(1, partial(measure_ranks, setting, peak, ranks))
    return measure_groups(groups, seconds)


def measure_pair(setting: Setting, peak: float, seconds: float) -> Rows:
    builds: dict[str, Build] = {
        TWIN: partial(training_step, setting.with_model(ffn="swiglu")),
        FUSED: partial(training_step, setting),
    }
    return compare_steps(builds, setting, peak, seconds)


def measure_ranks(setting: Setting, peak: float, ranks: int, seconds: float) -> Rows:
    return with_work(launch(setting, ranks, threads=1, seconds=seconds, rounds=5), setting, peak)


def tables(results: dict[str, Rows]) -> list[Table]:
    of_ranks = {group: rows for group, rows in results.items() if group.startswith("ranks")}
    others = {group: rows for group, rows in results.items() if group not in of_ranks}
    titled = {"Scaling": (others, TWIN), "Scaling of ZeRO-2": (of_ranks, PLAIN)}
    return [as_table(title, rows, step_columns(base)) for title, (rows, base) in titled.items() if rows]
