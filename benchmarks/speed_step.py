"""A whole training step (``steps``): PolyGLU beside its SwiGLU twin and transformers' Qwen3 of the same shape.

sides       documents kept apart, and whole rows; in each precision that the device is fast at. "reference" is this
            project's readable path, "published operations" what the published code does instead (``published``)
recompute   what ``activation_checkpointing`` costs and saves
rows        of a micro batch, on a GPU
DeepSpeed   ZeRO-2 on one rank beside the plain engine, taking turns in one process started by the launcher

MFU is a share of the data sheet's peak, or on a CPU of that of a measured matrix product, which noise can halve.
"""

import importlib.util
from dataclasses import dataclass, replace
from functools import partial

import torch
from measure import as_table
from published import published_step
from rich.table import Table
from speed_ranks import DEEPSPEED, PLAIN, launch
from steps import Setting, compare_steps, peak_of_device, qwen3_step, step_columns, training_step, with_work
from turns import Build, Group, Rows, measure_groups

from polyglu.model.config import ModelConfig
from polyglu.training.devices import compute_dtype

TWIN, QWEN3, PUBLISHED = "SwiGLU twin", "transformers Qwen3", "published operations"
RECOMPUTED = ("none", "hidden", "ffn", "full")


@dataclass(frozen=True)
class Shape:
    setting: Setting
    """Of documents; its precision is the first."""
    precisions: list[str]
    sweep: tuple[int, ...]
    """Rows of a micro batch."""


def cpu_shape() -> Shape:
    model = ModelConfig(
        vocab_size=16_384, d_model=512, d_ff=2048, n_layers=8, n_q_heads=8, n_kv_heads=4, head_dim=64, seq_length=512,
    )  # fmt: skip
    device = torch.device("cpu")
    precisions = ["fp32", "bf16"] if compute_dtype("auto", device) == torch.bfloat16 else ["fp32"]
    return Shape(Setting(model, device, 4, 88, "fp32"), precisions, ())


def gpu_shape() -> Shape:
    """The paper's model, with as many rows as leave room for five models at a time."""
    device = torch.device("cuda")
    rows = 4 if torch.cuda.get_device_properties(device).total_memory > 100e9 else 1
    return Shape(Setting(ModelConfig(), device, rows, 1000, "bf16"), ["bf16"], tuple({8, 4, 2, 1} - {rows}))


def measure(shape: Shape, seconds: float) -> dict[str, Rows]:
    peaks, groups = peak_of_device(shape.setting.device, shape.precisions), {}
    for precision in shape.precisions:
        setting, peak = replace(shape.setting, precision=precision), peaks[precision]
        for document in (setting.document, setting.model.seq_length):
            of_documents = replace(setting, document=document)
            weight = 7 if setting.device.type == "cuda" and not groups else 3  # the first compiles what others find
            groups[f"sides, {of_documents}"] = Group(weight, partial(measure_sides, of_documents, peak))
    setting, peak = replace(shape.setting, precision=shape.precisions[-1]), peaks[shape.precisions[-1]]
    groups[f"DeepSpeed, {setting}"] = Group(3, partial(measure_deepspeed, setting, peak))
    groups[f"recompute, {setting}"] = Group(2, partial(measure_recompute, setting, peak))
    for rows in shape.sweep:
        of_rows = replace(setting, rows=rows)
        groups[f"rows, {of_rows}"] = Group(0.5, partial(measure_rows, of_rows, peak))
    return measure_groups(groups, seconds)


def sides(setting: Setting) -> dict[str, Build]:
    on_gpu, causal = setting.device.type == "cuda", setting.with_model(routing_scope="causal")
    builds: dict[str, Build] = {
        TWIN: partial(training_step, setting.with_model(ffn="swiglu")),
        "fused, causal": partial(training_step, causal),
        "fused, sequence": partial(training_step, setting),
        QWEN3: partial(qwen3_step, setting),
        "reference, sequence": partial(training_step, setting.with_model(kernels="reference")),
    }
    if on_gpu and importlib.util.find_spec("flash_attn") is not None:
        builds[f"{QWEN3}, flash_attention_2"] = partial(qwen3_step, setting, "flash_attention_2")
    if not on_gpu:  # on a GPU, its weights of every token, neuron and activation would not fit
        builds["reference, causal"] = partial(training_step, causal.with_model(kernels="reference"))
    if on_gpu or setting.document >= setting.model.seq_length:  # the published code keeps documents apart on a GPU only
        builds[PUBLISHED] = partial(published_step, setting)
    return builds


def measure_sides(setting: Setting, peak: float, seconds: float) -> Rows:
    return compare_steps(sides(setting), setting, peak, seconds)


def measure_recompute(setting: Setting, peak: float, seconds: float) -> Rows:
    causal = setting.with_model(routing_scope="causal")
    builds: dict[str, Build] = {kind: partial(training_step, replace(causal, recompute=kind)) for kind in RECOMPUTED}
    return compare_steps(builds, setting, peak, seconds)


def measure_rows(setting: Setting, peak: float, seconds: float) -> Rows:
    builds: dict[str, Build] = {"fused, causal": partial(training_step, setting.with_model(routing_scope="causal"))}
    return compare_steps(builds, setting, peak, seconds)


def measure_deepspeed(setting: Setting, peak: float, seconds: float) -> Rows:
    causal = setting.with_model(routing_scope="causal")
    rounds = 10 if setting.device.type == "cuda" else 5
    rows = launch(causal, ranks=1, threads=torch.get_num_threads(), seconds=seconds, rounds=rounds)
    return with_work(rows, setting, peak)


def tables(results: dict[str, Rows]) -> list[Table]:
    bases = {"sides": TWIN, "recompute": "none", "rows": "", "DeepSpeed": PLAIN}
    titles = {"sides": "Training step", "recompute": "Recomputation", "rows": "Rows", "DeepSpeed": DEEPSPEED}
    return [
        as_table(titles[kind], rows, step_columns(base))
        for kind, base in bases.items()
        if (rows := {group: cases for group, cases in results.items() if group.startswith(kind)})
    ]
