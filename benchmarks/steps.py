"""A whole training step as a case: noise, forward, loss, backward, clipping, AdamW, on random tokens.

Ours runs through ``create_engine``, so on a GPU its blocks are compiled. Beside it stands transformers' Qwen3 of the
same shape, as a user gets it: eager, full logits, ``torch.optim.AdamW`` with its defaults.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from measure import told
from torch import Tensor
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from turns import Build, Case, Row, Rows, Stopwatch, compare, peak, ratios, start_seconds

from polyglu.data.dataloader import MicroBatch
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig, Recompute, TrainingSection
from polyglu.training.devices import compute_dtype, flops_of, peak_flops
from polyglu.training.engine import Engine, create_engine
from polyglu.training.loss import batch_noise
from polyglu.training.ranks import Ranks

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Setting:
    """What a step is made of."""

    model: ModelConfig
    device: torch.device
    rows: int
    document: int
    """Tokens of a document; those of a row or more: rows are whole."""
    precision: str
    recompute: Recompute = "none"

    def with_model(self, **changes: Any) -> "Setting":
        return replace(self, model=self.model.model_copy(update=changes))

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.precision, self.device)

    @property
    def tokens(self) -> int:
        return self.rows * self.model.seq_length

    def batch(self) -> MicroBatch:
        columns = self.model.seq_length
        ids = torch.randint(self.model.vocab_size, (self.rows, columns + 1))
        bounds = [row * columns + start for row in range(self.rows) for start in range(0, columns, self.document)]
        cu_seqlens = torch.tensor([*bounds, self.tokens], dtype=torch.int32)
        batch = MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), cu_seqlens, torch.arange(self.rows))
        return batch.to(self.device)

    def engine(self, ranks: Ranks) -> Engine:
        with self.device:  # there, weights are drawn much faster
            model = PolychromaticLM(self.model)
            model.init_weights()
        training = TrainingSection(precision=self.precision, activation_checkpointing=self.recompute)
        return create_engine(model, training, ranks)

    def __str__(self) -> str:
        rows = "rows whole" if self.document >= self.model.seq_length else f"documents of {self.document}"
        return f"{self.precision}, {self.rows}x{self.model.seq_length}, {rows}"


def training_step(setting: Setting) -> Case:
    return engine_step(setting.engine(Ranks(setting.device)), setting.batch(), setting.tokens)


def engine_step(engine: Engine, batch: MicroBatch, n_targets: int) -> Case:
    taus = (1 - 1e-5 * step for step in itertools.count())  # in training it changes with every step

    def case(watch: Stopwatch) -> None:
        watch.start()
        parts = engine.forward(batch, next(taus), batch_noise(engine.loss.model.config, batch, seed=0))
        engine.backward(parts.loss / n_targets, last=True)
        engine.step(LEARNING_RATE)
        watch.lap("step")

    return case


def qwen3_step(setting: Setting, attention: str = "sdpa") -> Case:
    model, optimizer = qwen3(setting.model, setting.device, attention)
    batch = setting.batch()
    inputs = qwen3_inputs(batch, whole=setting.document >= setting.model.seq_length, flat=attention != "sdpa")

    def case(watch: Stopwatch) -> None:
        watch.start()
        with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.lap("step")

    return case


def qwen3(config: ModelConfig, device: torch.device, attention: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    with device:
        model = Qwen3ForCausalLM(qwen3_config(config, attention, use_cache=False)).train()
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def qwen3_config(config: ModelConfig, attention: str, use_cache: bool) -> Qwen3Config:
    """Of transformers' model of the same shape."""
    return Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_q_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.seq_length,
        rms_norm_eps=config.eps,
        tie_word_embeddings=True,
        use_cache=use_cache,
        attn_implementation=attention,
    )


def qwen3_inputs(batch: MicroBatch, whole: bool, flat: bool) -> dict[str, Tensor]:
    """Documents are told by positions that begin anew; FlashAttention takes that from one row alone."""
    inputs = {"input_ids": batch.input_ids, "labels": batch.targets, "shift_labels": batch.targets}
    if not whole or flat:
        lengths = batch.cu_seqlens.diff().tolist()
        positions = torch.cat([torch.arange(length) for length in lengths]).to(batch.input_ids.device)
        inputs["position_ids"] = positions.view_as(batch.input_ids)
    return {name: tensor.reshape(1, -1) for name, tensor in inputs.items()} if flat else inputs


def compare_steps(builds: Mapping[str, Build], setting: Setting, most_flops: float, seconds: float) -> Rows:
    """Steps of one setting in turn; on a CPU each lives alone, as a run does."""
    rows = compare(builds, setting.device, seconds, alone=setting.device.type == "cpu")
    return with_work(rows, setting, most_flops)


def with_work(rows: Rows, setting: Setting, most_flops: float) -> Rows:
    """Rows of one setting with what a step does: its tokens, and FLOPs as a run's metrics count them."""
    batch, flops = setting.batch(), flops_of(_on_meta(setting.model))
    by_weights = flops.token * setting.tokens
    work = {"tokens": setting.tokens, "flops": by_weights, "flops_attention": by_weights}
    work["flops_attention"] += flops.pair * batch.attention_pairs
    for row in rows.values():
        row |= work | {"flops_per_s": most_flops}
    return rows


def _on_meta(config: ModelConfig) -> PolychromaticLM:
    with torch.device("meta"):
        return PolychromaticLM(config)


def peak_of_device(device: torch.device, precisions: list[str]) -> Mapping[str, float]:
    """Precision -> FLOP/s; for a CPU measured, once for all cases."""
    return {precision: peak_flops(device, compute_dtype(precision, device)) for precision in precisions}


def tokens_per_second(row: Row) -> list[float]:
    return [row["tokens"] / value for value in row["seconds"]["total"]]


def step_columns(base: str) -> dict[str, Any]:
    """Columns of a table of steps; "of ``base``" is time, in the same round."""

    def mfu(kind: str) -> Any:
        def share(row: Row, rows: Rows) -> str:
            return told([100 * row[kind] / row["flops_per_s"] / value for value in row["seconds"]["total"]], 1)

        return share

    return {
        "ms": lambda row, rows: told([1e3 * value for value in row["seconds"]["total"]], 1),
        "tokens/s": lambda row, rows: told(tokens_per_second(row), 0),
        f"of {base}": lambda row, rows: told(ratios(row, rows.get(base))),
        "MFU %": mfu("flops"),
        "with attention": mfu("flops_attention"),
        "start s": start_seconds,
        "peak MB": peak,
    }
