"""Two engines behind one small interface: plain PyTorch on one device, and DeepSpeed ZeRO on any number of ranks.

The training loop does not know which it drives. Both keep fp32 weights and compute in the dtype of the loss module,
so that their results agree.
"""

import json
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from polyglu.data.dataloader import MicroBatch
from polyglu.errors import PolygluError
from polyglu.files import read_json
from polyglu.model.architecture import PolychromaticLM, compile_blocks
from polyglu.model.config import LoopSection
from polyglu.model.flash_attention import flash_serves
from polyglu.training.devices import compute_dtype, keep_freed_memory
from polyglu.training.loss import LanguageModelLoss, LossParts
from polyglu.training.optimizer import (
    adam_state,
    count_updates,
    create_optimizer,
    set_learning_rate,
    set_updates,
    step_if_finite,
)
from polyglu.training.ranks import Ranks, launched_distributed
from polyglu.training.shards import MOMENTS, WEIGHT, Piece

STATED_IN_YAML = {
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.grad_accum_steps",
    "gradient_clipping": "training.grad_clip",
    "train_batch_size": "training.micro_batch_size and training.grad_accum_steps",
    "bf16": "training.precision",
    "fp16": "training.precision",
}
"""Keys that a DeepSpeed config must not have -> where the training config states them."""


class Engine(Protocol):
    """What the loop asks of an engine."""

    name: str
    ranks: Ranks
    loss: LanguageModelLoss

    def forward(self, batch: MicroBatch, tau: float, gumbel: Tensor | None) -> LossParts:
        """Loss of a micro batch that is on the device."""

    def backward(self, objective: Tensor, last: bool) -> None:
        """Add the gradient of this rank's share of the global objective; ``last``: of the step."""

    def step(self, learning_rate: float) -> float:
        """Add up the ranks' gradients, clip, update the weights; return the gradient's norm before clipping.

        A gradient that is not finite updates nothing: neither weights nor moments nor their count.
        """

    def discard(self) -> bool:
        """Forget the gradients of a step that was broken off; False: that cannot be done."""

    def pieces(self) -> list[Piece]:
        """Live weights and moments that this rank updates; all ranks together hold each element once."""

    @property
    def buffer_bytes(self) -> int:
        """Memory of the device that the engine takes in its first step, besides gradients."""

    @property
    def updates(self) -> int:
        """Updates of the weights so far, which AdamW corrects its moments by."""

    @updates.setter
    def updates(self, count: int) -> None: ...


class PlainEngine:
    """One device, plain PyTorch."""

    name = "plain"

    def __init__(self, loss: LanguageModelLoss, settings: LoopSection, ranks: Ranks) -> None:
        self.loss, self.ranks, self.grad_clip = loss, ranks, settings.grad_clip
        self.optimizer = create_optimizer(loss.model, settings)
        self.pieces()  # makes the moments: what memory they need shows now

    def forward(self, batch: MicroBatch, tau: float, gumbel: Tensor | None) -> LossParts:
        """See ``Engine``."""
        return self.loss(batch, tau, gumbel)  # type: ignore[no-any-return]

    def backward(self, objective: Tensor, last: bool) -> None:
        """See ``Engine``."""
        objective.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        """See ``Engine``."""
        norm = torch.nn.utils.clip_grad_norm_(self.loss.parameters(), self.grad_clip)
        set_learning_rate(self.optimizer, learning_rate)
        step_if_finite(self.optimizer, norm)
        self.discard()
        return float(norm)

    def discard(self) -> bool:
        """See ``Engine``."""
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def pieces(self) -> list[Piece]:
        """See ``Engine``."""
        pieces = []
        for name, parameter in self.loss.model.named_parameters():
            moments = adam_state(self.optimizer, parameter)
            tensors = {WEIGHT: parameter.detach(), **{kind: moments[kind] for kind in MOMENTS}}
            pieces.append(Piece(name, 0, {kind: tensor.view(-1) for kind, tensor in tensors.items()}))
        return pieces

    @property
    def buffer_bytes(self) -> int:
        """See ``Engine``."""
        return 0

    @property
    def updates(self) -> int:
        """See ``Engine``."""
        return count_updates(self.optimizer)

    @updates.setter
    def updates(self, count: int) -> None:
        set_updates(self.optimizer, count)


class DeepSpeedEngine:
    """ZeRO over any number of ranks, started by the ``deepspeed`` launcher (or torchrun)."""

    name = "deepspeed"

    def __init__(self, loss: LanguageModelLoss, settings: LoopSection, ranks: Ranks) -> None:
        config = read_deepspeed_config(Path(settings.deepspeed_config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed's imports warn about what it does not find
            import deepspeed

        # On a CPU, DeepSpeed would compile an all-reduce of its own at the start, and wait forever for a process that
        # was killed while it did; gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.loss, self.ranks = loss, ranks
        # The loop says where a step ends; DeepSpeed needs to know that there may be several micro batches in one.
        config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"] = 1, 2
        config["gradient_clipping"] = settings.grad_clip
        self.engine, *_ = deepspeed.initialize(
            model=loss, optimizer=create_optimizer(loss.model, settings), config=config, dist_init_required=False
        )
        self.pieces()

    def forward(self, batch: MicroBatch, tau: float, gumbel: Tensor | None) -> LossParts:
        """See ``Engine``."""
        return self.engine(batch, tau, gumbel)  # type: ignore[no-any-return]

    def backward(self, objective: Tensor, last: bool) -> None:
        """See ``Engine``. DeepSpeed averages over ranks; the objective is a part of a sum, so that is undone."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(objective * self.ranks.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """See ``Engine``. DeepSpeed passes over gradients that are not finite, and calls their norm infinite."""
        set_learning_rate(self.engine.optimizer, learning_rate)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def discard(self) -> bool:
        """See ``Engine``. Other ranks wait for this one inside a reduction, which cannot be called off."""
        return False

    def pieces(self) -> list[Piece]:
        """See ``Engine``."""
        zero, pieces = self.engine.optimizer, []
        for name, parameter in self.loss.model.named_parameters():
            held = parameter._hp_mapping  # type: ignore[attr-defined]
            if held is not None:
                partition = zero.single_partition_of_fp32_groups[held.param_group_index]
                moments = adam_state(zero.optimizer, partition)
                tensors = {WEIGHT: partition.detach(), **{kind: moments[kind] for kind in MOMENTS}}
                start, numel = held.hp_fragment_address.start, held.hp_fragment_address.numel
                parts = {kind: tensor.narrow(0, start, numel) for kind, tensor in tensors.items()}
                pieces.append(Piece(name, held.lp_fragment_address.start, parts))
        return pieces

    @property
    def buffer_bytes(self) -> int:
        """See ``Engine``. ZeRO gathers gradients in buckets, of which one is filled while another is sent."""
        zero = self.engine.optimizer
        buckets = 2 if zero.overlap_comm else 1
        return buckets * 4 * int(zero.reduce_bucket_size) if zero.contiguous_gradients else 0

    @property
    def updates(self) -> int:
        """See ``Engine``."""
        return count_updates(self.engine.optimizer.optimizer)

    @updates.setter
    def updates(self, count: int) -> None:
        set_updates(self.engine.optimizer.optimizer, count)


def create_engine(model: PolychromaticLM, settings: LoopSection, ranks: Ranks) -> Engine:
    """DeepSpeed when a launcher started the process as a rank, else plain PyTorch; the model moves to the device."""
    if ranks.device.type == "cpu":
        keep_freed_memory()
    dtype = compute_dtype(settings.precision, ranks.device)
    loss = LanguageModelLoss(model, dtype, settings.activation_checkpointing, settings.entropy_reg)
    config = model.config
    # Without FlashAttention, attention asks for each document.
    flash = config.use_flash_attn and flash_serves(ranks.device, dtype, config.head_dim)
    if settings.compile == "auto" and flash and config.kernels != "reference":
        compile_blocks(model)
    make = DeepSpeedEngine if launched_distributed() else PlainEngine
    return make(loss.to(ranks.device).train(), settings, ranks)


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON config and refuse what would override or repeat the training config.

    Raises:
        PolygluError: missing, not JSON, or with a key that the training config owns.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise PolygluError(f"{path} must hold a JSON object, got {json.dumps(config)[:40]}.")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise PolygluError(
                f"{path}: remove the '{key}' section: DeepSpeed would put it in place of the run's own, "
                f"which the training config describes."
            )
    for key, home in STATED_IN_YAML.items():
        if key in config:
            raise PolygluError(f"{path}: remove '{key}': it is stated once, in the training config as {home}.")
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2):
        raise PolygluError(f"{path}: zero_optimization.stage must be 1 or 2, got {stage!r}.")
    return config
