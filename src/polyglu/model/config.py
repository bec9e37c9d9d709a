"""Every setting of the system, validated at construction; the defaults are the paper's (arXiv 2603.13347)."""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from polyglu.config_file import Section

RoutingScope = Literal["sequence", "document", "causal"]
RoutingParts = Literal["both", "static", "dynamic"]
TauSchedule = Literal["linear", "constant", "cosine"]
FeedForward = Literal["polyglu", "swiglu", "geglu", "reglu", "tanhglu"]
KernelName = Literal["auto", "reference", "chunked", "native", "triton"]
Recompute = Literal["none", "hidden", "ffn", "full"]
Fraction = Annotated[float, Field(ge=0, le=1)]

Size = Annotated[int, Field(ge=1, le=2**24)]
"""A width or length; the bound keeps a damaged config from asking for all of the memory."""

MAX_ACTIVATIONS = 6

NO_ROUTING = "training.entropy_reg is {}, but ffn '{}' has no routing whose entropy could be held up; set it to 0."
"""Why an entropy_reg is refused."""


def _number_or_auto(value: Any) -> Any:
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError(f"must be a number from 1 on, or auto, got {value!r:.80}")
    return value


def _no_auto(value: Any) -> Any:
    if value == "auto":
        raise ValueError(
            "auto is for pre-training alone: a micro batch of fine-tuning is one pack of conversations, so another "
            "size would pack them anew, in another order; give a number"
        )
    return value


class ModelConfig(Section):
    """Shape of PolychromaticLM; ``ModelConfig()`` is the paper's model, 597,153,888 parameters."""

    vocab_size: Size = 151669
    """Rows of the embedding, which is tied to the head."""
    d_model: Size = 1024
    """Width of the residual stream, D."""
    d_ff: Size = 4096
    """Neurons of a feed-forward layer, F."""
    n_layers: Annotated[int, Field(ge=1, le=1024)] = 28
    """Blocks, L."""
    n_q_heads: Size = 16
    """Query heads."""
    n_kv_heads: Size = 8
    """Key and value heads; each serves n_q_heads / n_kv_heads query heads."""
    head_dim: Size = 64
    """Width of a head; even, for RoPE pairs its halves."""
    seq_length: Size = 4096
    """Longest document position, in tokens."""
    n_activations: Annotated[int, Field(ge=1, le=MAX_ACTIVATIONS)] = 4
    """Activations a neuron chooses among, K; the first K of ``polyglu.model.activations.ACTIVATIONS``."""
    eps: PositiveFloat = 1e-6
    """Epsilon of RMSNorm."""
    use_flash_attn: bool = True
    """Use FlashAttention kernels on CUDA; the CPU always computes attention with PyTorch's SDPA."""
    routing_scope: RoutingScope = "sequence"
    """What the dynamic routing input is a mean of: the row (paper), the document, or the document so far (causal)."""
    routing: RoutingParts = "both"
    """What a neuron chooses by: its preference and the input; ``static``: its preference alone, alpha, without a
    router; ``dynamic``: the input alone, without alpha. For ``ffn: polyglu``."""
    ffn: FeedForward = "polyglu"
    """Feed-forward layer: routed, or a gated linear unit with one fixed activation."""
    kernels: KernelName = "auto"
    """What computes the routed layers and the loss: ``reference`` reads like the formulas; the others give the same
    numbers, faster (``polyglu.model.kernels``). auto: the fastest that works on the device."""

    @property
    def routed_by_text(self) -> bool:
        """Whether what is read decides between activations."""
        return self.ffn == "polyglu" and self.routing != "static" and self.n_activations > 1

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.n_q_heads % self.n_kv_heads:
            raise ValueError(f"n_q_heads {self.n_q_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")
        if self.routing != "both" and self.ffn != "polyglu":
            raise ValueError(f"routing is '{self.routing}', but ffn '{self.ffn}' has no routing; remove 'routing'")
        return self


class SourceConfig(Section):
    """One source of pre-training tokens and its share of the mix."""

    path: str
    """Folder of token chunks with a manifest.json."""
    mix: Fraction
    """Share of the samples until annealing starts."""
    mix_end: Fraction
    """Share of the samples at the last step."""


def _paper_sources() -> dict[str, SourceConfig]:
    return {
        "math": SourceConfig(path="data/tokenized/math", mix=0.70, mix_end=0.85),
        "stem": SourceConfig(path="data/tokenized/stem", mix=0.25, mix_end=0.10),
        "code": SourceConfig(path="data/tokenized/code", mix=0.05, mix_end=0.05),
    }


class DataConfig(Section):
    """Sources of a pre-training run; any number of them."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)] = Field(default_factory=_paper_sources)
    """Name -> source."""
    anneal_start: Fraction = 0.8
    """Share of the run after which the mix moves linearly to ``mix_end``."""
    verify_hashes: bool = False
    """Read all data once at the start and compare it with its manifests, instead of the sizes alone."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        for key in ("mix", "mix_end"):
            total = sum(getattr(source, key) for source in self.sources.values())
            if not math.isclose(total, 1.0, abs_tol=1e-6):
                raise ValueError(f"the '{key}' of all sources must sum to 1, they sum to {total:g}")
        return self


class LoopSection(Section):
    """What pre-training and fine-tuning share: optimiser, batch, engine, cadence."""

    learning_rate: PositiveFloat = 1e-4
    """Peak of the cosine schedule."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """On weight matrices only; never on norms, biases, alpha or beta."""
    alpha_decay: bool = False
    """Let weight decay pull alpha towards 0 as well, as the published code did; a preference then has to outrun it."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    grad_clip: PositiveFloat = 1.0
    """Largest norm of the global gradient."""
    entropy_reg: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean dynamic routing entropy, which the objective then rewards; 0: off. For ``ffn: polyglu``."""
    gumbel: bool = True
    """Gumbel noise in the routing logits of training steps; evaluation never has any."""
    micro_batch_size: Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)] = 2
    """Rows of seq_length tokens in one forward pass on one device; auto: the largest number of rows that fits into its
    memory and divides the rows of a step, for which ``grad_accum_steps`` then stands alone."""
    grad_accum_steps: PositiveInt = 64
    """Micro batches a device adds up before a step; with ``micro_batch_size: auto``, the rows of a step on a device,
    as if a micro batch were 1 row."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of initialisation, data order and Gumbel noise."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the compute; weights and optimiser stay fp32. auto: bf16 where the device has fast bf16."""
    activation_checkpointing: Recompute = "none"
    """What is not kept for backward but computed anew: ``hidden``, the routed layers' products before ``down_proj``,
    at hardly any cost; ``ffn``, all of each feed-forward layer but its input; ``full``, all of each block but its
    input."""
    compile: Literal["auto", "never"] = "auto"
    """auto: compile the blocks with ``torch.compile`` on a GPU, which takes a minute or two at the start."""
    deterministic: bool = False
    """On a GPU, choose kernels that give the same bits every time, where there are such; slower. A CPU always does."""
    on_loss_spike: Literal["report", "skip"] = "report"
    """skip: leave out the update of a step whose loss is six deviations above its window's mean, as if not finite."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    """Returns to the last good checkpoint, each after 3 steps in a row without an update, before the run gives up."""
    deepspeed_config: str = "configs/ds_config.json"
    """Read when the run is started by the ``deepspeed`` launcher."""
    log_every: PositiveInt = 100
    """Steps between log lines."""
    checkpoint_every: PositiveInt = 1000
    """Steps between resume checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Resume checkpoints kept; older ones are removed."""
    checkpoint_dir: str = "checkpoints"
    """Folder of resume and portable checkpoints."""
    run_dir: str = "runs/pretrain"
    """Folder of config.yaml, metrics.jsonl and W&B's files."""
    resume_from: str | None = None
    """A ds_checkpoint folder, a portable .pt file, or 'auto': the newest whole one in checkpoint_dir, if any."""


class TrainingSection(LoopSection):
    """Pre-training."""

    total_steps: Annotated[int, Field(gt=0, le=10**7)] = 19531
    """Optimiser steps; the schedules of LR, tau and mix end here."""
    tau_max: PositiveFloat = 1.0
    """Routing temperature at step 0."""
    tau_min: PositiveFloat = 0.1
    """Routing temperature at the end."""
    tau_schedule: TauSchedule = "linear"
    """How the temperature goes from ``tau_max`` to ``tau_min``; ``constant``: it stays at ``tau_max``."""
    portable_checkpoint_every: PositiveInt = 5000
    """Steps between portable checkpoints; a run shorter than this writes one with each resume checkpoint."""
    portable_optimizer: bool = False
    """Put the optimiser's state into portable checkpoints too: three times the size, and each can resume the run."""

    @model_validator(mode="after")
    def _check(self) -> "TrainingSection":
        if self.tau_min > self.tau_max:
            raise ValueError(f"tau_min {self.tau_min} must not exceed tau_max {self.tau_max}")
        return self


class WandbSection(Section):
    """Weights & Biases."""

    project: str = "polyglu"
    """Project name."""
    name: str | None = None
    """Run name; W&B's own if absent."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when WANDB_API_KEY is set, else offline."""


class TrainConfig(Section):
    """A pre-training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingSection = TrainingSection()
    wandb: WandbSection = WandbSection()

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.training.entropy_reg and self.model.ffn != "polyglu":
            raise ValueError(NO_ROUTING.format(self.training.entropy_reg, self.model.ffn))
        return self


class ConversationConfig(Section):
    """Where the conversations of a fine-tuning run come from: a hub dataset, or local jsonl / parquet files."""

    dataset: str | None = "nvidia/Nemotron-Math-v2"
    """Hub dataset."""
    config: str | None = None
    """Hub dataset's configuration."""
    splits: tuple[str, ...] = ("high_part00", "high_part01", "high_part02", "medium", "low")
    """Hub dataset's splits."""
    revision: str | None = None
    """Commit of the hub dataset; absent: the newest one, resolved at the start and logged."""
    files: tuple[str, ...] = ()
    """Local .jsonl or .parquet files; then ``dataset`` is not read."""
    max_conversations: PositiveInt | None = None
    """Read no more than this many usable conversations."""
    tokenizer: str = "Qwen/Qwen3-0.6B-Base"
    """Must be the one the starting checkpoint was trained with."""


class FineTuningSection(LoopSection):
    """Fine-tuning; steps follow from the data and ``epochs``."""

    learning_rate: PositiveFloat = 2e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    epochs: PositiveInt = 1
    """Passes over the conversations."""
    tau: PositiveFloat = 0.1
    """Routing temperature, fixed."""
    init_from: str = "checkpoints/portable_final.pt"
    """Portable checkpoint to start from; model shape and tokenizer come from it."""
    checkpoint_dir: str = "checkpoints_sft"
    run_dir: str = "runs/sft"
    micro_batch_size: Annotated[PositiveInt, BeforeValidator(_no_auto)] = 2
    """A micro batch is one pack of conversations, of up to this many times seq_length tokens."""
    grad_accum_steps: PositiveInt = 8


class SFTConfig(Section):
    """A supervised fine-tuning run."""

    data: ConversationConfig = ConversationConfig()
    training: FineTuningSection = FineTuningSection()
    wandb: WandbSection = WandbSection()
