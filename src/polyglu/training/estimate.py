"""What a run will need: parameters, data, disk, memory, time. Pure arithmetic on its config."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig, Recompute, TrainConfig
from polyglu.training.cross_entropy import METHODS
from polyglu.training.memory import rows_per_step
from polyglu.training.shards import BYTES_PER_PARAMETER, MOMENTS

FP32 = 4
"""Bytes of a weight, of its gradient and of each of its moments."""
ASSUMED_MFU = 0.135
"""Share of the peak that is assumed where nothing was measured: the published run's on one A100, by 6 N."""
BUCKET = 500_000_000
"""DeepSpeed's default reduce_bucket_size, in elements."""
TRIAL_STEPS = 3
"""Steps of a trial: two, and the second one again."""


@dataclass(frozen=True)
class Parameters:
    """Sizes of a model, in numbers."""

    total: int
    embedding: int
    """Part of ``total``; the head is tied to it."""


@dataclass(frozen=True)
class SourceNeed:
    """What a run takes from a source, in tokens."""

    name: str
    needed: int
    there: int
    """In whole windows."""

    @property
    def epochs(self) -> float:
        """Times that the source is read."""
        return self.needed / self.there


@dataclass(frozen=True)
class Trial:
    """What two steps are tried with."""

    config: TrainConfig
    whole_step: bool
    """A step has all of its micro batches, not just one."""
    whole_model: bool
    """The model is the run's, not a smaller one."""


def count_parameters(config: ModelConfig) -> Parameters:
    """Sizes of a model, which is not made."""
    with torch.device("meta"):
        model = PolychromaticLM(config)
    return Parameters(sum(weight.numel() for weight in model.parameters()), model.embed_tokens.weight.numel())


def tokens_per_step(config: TrainConfig, ranks: int) -> int:
    """Tokens of a step of all ranks."""
    return rows_per_step(config.training) * ranks * config.model.seq_length


def source_needs(names: Sequence[str], samples: Sequence[int], windows: Sequence[int], length: int) -> list[SourceNeed]:
    """What a run takes from each source.

    Args:
        names: of the sources.
        samples: that the run takes from each: the last of the order's quotas.
        windows: that each has.
        length: tokens of a window.
    """
    counted = zip(names, samples, windows, strict=True)
    return [SourceNeed(name, int(taken) * length, has * length) for name, taken, has in counted]


def disk_need(parameters: int, resume: int, portable: int, with_moments: bool) -> int:
    """Bytes that checkpoints to come take.

    Args:
        parameters: of the model.
        resume: resume checkpoints that do not exist yet, the one being written while all others are kept included.
        portable: portable checkpoints that do not exist yet, besides the final one; none is ever removed.
        with_moments: these hold the optimiser's state too.
    """
    each = BYTES_PER_PARAMETER if with_moments else FP32
    return parameters * (resume * BYTES_PER_PARAMETER + portable * each + FP32)


def state_bytes(parameters: int, ranks: int, zero: Mapping[str, Any] | None) -> dict[str, int]:
    """Memory of a rank for what lasts from step to step.

    Args:
        parameters: of the model.
        ranks: processes of the run.
        zero: section ``zero_optimization`` of the DeepSpeed config; None: the plain engine.

    Returns:
        What -> bytes. Under ZeRO, moments and the weights they update are spread over the ranks, gradients in stage 2;
        the buckets of its reductions are as large as configured, whatever the model.
    """
    whole = FP32 * parameters
    if zero is None:
        return {"weights": whole, "gradients": whole, "moments": len(MOMENTS) * whole}
    buckets = FP32 * int(zero.get("reduce_bucket_size", BUCKET)) * (2 if zero.get("overlap_comm") else 1)
    return {
        "weights": whole + whole // ranks,
        "gradients": whole // ranks if zero.get("stage") == 2 else whole,
        "moments": len(MOMENTS) * whole // ranks,
        "buckets": buckets,
    }


def activation_bytes(config: ModelConfig, rows: int, compute: torch.dtype, recompute: Recompute) -> int:
    """Memory that a forward pass keeps for backward, on a GPU.

    Per token and block, with c bytes a number of the compute dtype:
        2 (4 + c) D                    the residual stream before each norm, and the norms
        c (6 H + 3 G) d                queries, keys, values: projected, rotated, repeated for grouped heads; the output
        3 c F                          gate, up, hidden; with one activation for all, also that of the gate
        F (K c + c), F (8 K + 4)       kernels ``reference`` besides: branches and mixture; routing weights of every
                                       token, unless the row has one mean (``sequence``)
    ``hidden`` keeps c F less. With ``ffn``, a feed-forward layer keeps its input (4 D), with ``full`` a block does, and
    one of them at a time keeps all. Besides: the gradients of the features and of the head, which the loss makes in
    advance (4 D a token, 4 V D); the head's weight in the compute dtype, if that is another (c V D); as many logits as
    exist at once, each of which becomes its own gradient in place. Kernels ``reference`` have all logits at once, in
    the compute dtype and fp32, and their gradient.
    """
    c, tokens = torch.empty((), dtype=compute).element_size(), rows * config.seq_length
    residual, d_ff, routed = FP32 * config.d_model, config.d_ff, config.ffn == "polyglu"
    attention = residual + c * config.d_model
    attention += c * (6 * config.n_q_heads + 3 * config.n_kv_heads) * config.head_dim
    ffn = residual + c * config.d_model + c * d_ff * (3 if routed else 4)
    if routed and config.kernels == "reference":
        ffn += d_ff * (config.n_activations + 1) * c
        if config.routing_scope != "sequence":
            ffn += d_ff * (8 * config.n_activations + 4)
    if recompute == "hidden" and routed:
        ffn -= c * d_ff
    kept, at_once = {"ffn": (attention + residual, ffn), "full": (residual, attention + ffn)}.get(
        recompute, (attention + ffn, 0)
    )
    blocks = kept * config.n_layers + at_once
    logits = tokens * config.vocab_size
    if config.kernels == "reference":
        return tokens * blocks + logits * (2 * FP32 + c)
    head = config.vocab_size * config.d_model * (FP32 if c == FP32 else FP32 + c)
    logits = min(logits, METHODS["cuda"].logits_at_once) * c
    return tokens * (blocks + FP32 * config.d_model) + head + logits


def training_seconds(parameters: int, tokens: int, flops: float) -> float:
    """Time to train on tokens at a speed in FLOP/s, by 6 FLOPs a parameter and token."""
    return 6 * parameters * tokens / flops


def choose_trial(config: TrainConfig, memory: float, flops: float, seconds: float) -> Trial:
    """The trial closest to the run that fits into memory and time; the smallest one if none does.

    Args:
        config: of the run.
        memory: bytes that a rank may take.
        flops: FLOP/s of a rank.
        seconds: that all steps of the trial may take.
    """
    for trial in _trials(config):
        parameters = count_parameters(trial.config.model).total
        tokens = TRIAL_STEPS * tokens_per_step(trial.config, 1)
        if trial_bytes(trial.config, parameters) <= memory and training_seconds(parameters, tokens, flops) <= seconds:
            break
    return trial


def trial_bytes(config: TrainConfig, parameters: int) -> int:
    """Memory of a rank in fp32 on the plain engine, the copy that is being saved included."""
    settings = config.training
    rows = 1 if settings.micro_batch_size == "auto" else settings.micro_batch_size
    kept = activation_bytes(config.model, rows, torch.float32, settings.activation_checkpointing)
    return sum(state_bytes(parameters, 1, None).values()) + BYTES_PER_PARAMETER * parameters + kept


def _trials(config: TrainConfig) -> Iterator[Trial]:
    """From the run's own step to one row and a model of a few thousand parameters besides its vocabulary."""
    yield Trial(config, whole_step=True, whole_model=True)
    settings = config.training
    size = 1 if settings.micro_batch_size == "auto" else settings.micro_batch_size
    cut = config.model_copy(update={"training": _changed(settings, micro_batch_size=size, grad_accum_steps=1)})
    yield Trial(cut, whole_step=False, whole_model=True)
    row = config.model_copy(update={"training": _changed(settings, micro_batch_size=1, grad_accum_steps=1)})
    model = config.model
    while model.n_layers > 1 or max(model.d_model, model.d_ff) > 16:
        if model.n_layers > 1:
            model = _changed(model, n_layers=model.n_layers // 2)
        else:
            model = _changed(model, d_model=max(16, model.d_model // 2), d_ff=max(16, model.d_ff // 2))
        yield Trial(row.model_copy(update={"model": model}), whole_step=False, whole_model=False)


def _changed(section: Any, **values: Any) -> Any:
    return section.model_copy(update=values)
