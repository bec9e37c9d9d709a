"""Two engines behind one small interface: plain PyTorch on one device, and DeepSpeed ZeRO on any number of ranks.

The training loop does not know which it drives. Both keep fp32 weights and compute in the dtype of the loss module,
so that their results agree. ``deepspeed`` is imported here and nowhere else.
"""

import itertools
import json
import logging
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from polyglu.data.dataloader import MicroBatch
from polyglu.errors import PolygluError
from polyglu.files import read_json
from polyglu.model.config import LoopSection
from polyglu.model.model import read_tensors
from polyglu.training.devices import compute_dtype, pick_device
from polyglu.training.loss import LanguageModelLoss
from polyglu.training.optimizer import create_optimizer

logger = logging.getLogger(__name__)

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
    rank: int
    world_size: int
    device: torch.device
    loss: LanguageModelLoss

    def forward(self, batch: MicroBatch, tau: float, gumbel: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Summed loss and token logits of a micro batch that is on the device."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the global loss."""

    def step(self, learning_rate: float) -> float:
        """Add up the ranks' gradients, clip, update the weights; return the gradient's norm before clipping."""

    def sum(self, value: float) -> float:
        """Sum of a number over all ranks."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state into a folder (all ranks call it)."""

    def load(self, folder: Path) -> None:
        """Take back what ``save`` wrote."""

    def close(self) -> None:
        """Leave the process group, if any."""


class PlainEngine:
    """One device, plain PyTorch."""

    name = "plain"
    rank = 0
    world_size = 1

    def __init__(self, loss: LanguageModelLoss, settings: LoopSection, device: torch.device) -> None:
        self.loss, self.device, self.grad_clip = loss, device, settings.grad_clip
        self.optimizer = create_optimizer(loss.model, settings)

    def forward(self, batch: MicroBatch, tau: float, gumbel: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """See ``Engine``."""
        return self.loss(batch, tau, gumbel)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """See ``Engine``."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        """See ``Engine``."""
        norm = torch.nn.utils.clip_grad_norm_(self.loss.parameters(), self.grad_clip)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def sum(self, value: float) -> float:
        """See ``Engine``."""
        return value

    def barrier(self) -> None:
        """See ``Engine``."""

    def save(self, folder: Path) -> None:
        """See ``Engine``."""
        torch.save(
            {"model": self.loss.model.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / "state.pt"
        )

    def load(self, folder: Path) -> None:
        """See ``Engine``."""
        state = read_tensors(folder / "state.pt")
        try:
            self.loss.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise PolygluError(f"{folder / 'state.pt'} is no state of this run; resume from another one.") from None

    def close(self) -> None:
        """See ``Engine``."""


class DeepSpeedEngine:
    """ZeRO over any number of ranks, started by the ``deepspeed`` launcher (or torchrun)."""

    name = "deepspeed"

    def __init__(self, loss: LanguageModelLoss, settings: LoopSection, device: torch.device) -> None:
        config = read_deepspeed_config(Path(settings.deepspeed_config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed's imports warn about what it does not find
            import deepspeed

        self._comm = deepspeed.comm
        self.loss, self.device = loss, device
        config["train_micro_batch_size_per_gpu"] = settings.micro_batch_size
        config["gradient_accumulation_steps"] = settings.grad_accum_steps
        config["gradient_clipping"] = settings.grad_clip
        self.engine, *_ = deepspeed.initialize(
            model=loss, optimizer=create_optimizer(loss.model, settings), config=config, dist_init_required=True
        )
        self.rank, self.world_size = self._comm.get_rank(), self._comm.get_world_size()

    def forward(self, batch: MicroBatch, tau: float, gumbel: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """See ``Engine``."""
        return self.engine(batch, tau, gumbel)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """See ``Engine``. DeepSpeed averages over ranks; the loss is this rank's share of a sum, so it is undone."""
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro batch

    def step(self, learning_rate: float) -> float:
        """See ``Engine``."""
        set_learning_rate(self.engine.optimizer, learning_rate)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def sum(self, value: float) -> float:
        """See ``Engine``."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        self._comm.all_reduce(total)
        return float(total)

    def barrier(self) -> None:
        """See ``Engine``."""
        self._comm.barrier()

    def save(self, folder: Path) -> None:
        """See ``Engine``."""
        self.engine.save_checkpoint(str(folder), tag="state", save_latest=False)

    def load(self, folder: Path) -> None:
        """See ``Engine``."""
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        # DeepSpeed would unpickle anything: PyTorch's own switch holds the process to tensors and these three classes.
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            try:
                self.engine.load_checkpoint(str(folder), tag="state")
            except pickle.UnpicklingError:
                raise PolygluError(
                    f"{folder} holds more than tensors and DeepSpeed's own values; nothing in it was executed. "
                    "Resume from a checkpoint of your own."
                ) from None

    def close(self) -> None:
        """See ``Engine``."""
        self.engine.destroy()
        torch.distributed.destroy_process_group()


def launched_distributed() -> bool:
    """Whether a launcher (deepspeed, torchrun) started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def create_engine(model: Any, settings: LoopSection) -> Engine:
    """DeepSpeed when a launcher started the process as a rank, else plain PyTorch; the model moves to the device."""
    device = pick_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = compute_dtype(settings.precision, device)
    loss = LanguageModelLoss(model, dtype, settings.activation_checkpointing == "full").to(device).train()
    return DeepSpeedEngine(loss, settings, device) if launched_distributed() else PlainEngine(loss, settings, device)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


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
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise PolygluError(f"{path}: zero_optimization.stage must be 0, 1 or 2, got {stage!r}.")
    return config


def launch() -> None:
    """Run DeepSpeed's launcher, which spells ``-m`` as ``--module``: installed as the command ``deepspeed``.

    So ``deepspeed --num_gpus=1 -m src.training.train`` works as ``python -m`` does; all else passes through.
    """
    from deepspeed.launcher import runner

    arguments = sys.argv[1:]
    own = list(itertools.takewhile(lambda argument: not argument.endswith(".py"), arguments))
    if "-m" in own:
        arguments[own.index("-m")] = "--module"
    sys.argv[1:] = arguments
    runner.main()
