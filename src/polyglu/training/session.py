"""What surrounds the loop of a stage: resume, checkpoints, journal, signals, and how to go on after them."""

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polyglu.errors import EXIT_INTERRUPTED, Interrupted, PolygluError
from polyglu.model.config import LoopSection, SFTConfig, TrainConfig
from polyglu.model.model import Checkpoint
from polyglu.training.checkpoint import RESUME_FOLDER, ResumePoint, resume, step_folders
from polyglu.training.engine import Engine
from polyglu.training.guard import RunState
from polyglu.training.journal import Journal
from polyglu.training.metrics import open_metrics
from polyglu.training.ranks import launched_distributed
from polyglu.training.saver import GIGABYTE, Checkpoints
from polyglu.training.signals import Stop, stop_on_signals

MODULES = {"train": "src.training.train", "sft": "src.sft.sft"}
"""Verb -> module of the stage."""


@dataclass(frozen=True)
class Session:
    """A run under way."""

    state: RunState
    checkpoints: Checkpoints
    journal: Journal
    stop: Stop


@contextmanager
def session(
    config: TrainConfig | SFTConfig,
    engine: Engine,
    total_steps: int,
    found: ResumePoint | Checkpoint | None,
    order: Mapping[str, Any],
) -> Iterator[Session]:
    """Bring a run to where it goes on, with all that looks after it; end it with the context (all ranks call it).

    Args:
        config: of the stage.
        engine: with the weights to start from.
        total_steps: of the run.
        found: what ``resume_from`` led to.
        order: what determines the run's model and data order.

    Raises:
        PolygluError: a resume point of another run, or no room for checkpoints.
    """
    settings, ranks, checkpoint_dir = config.training, engine.ranks, Path(config.training.checkpoint_dir)
    with stop_on_signals() as stop:
        state = resume(engine, found, order, checkpoint_dir)
        metrics = open_metrics(config, ranks.rank, state.step, total_steps, state.wandb_id)
        journal = Journal(engine, metrics, settings.log_every, total_steps)
        checkpoints = Checkpoints(engine, checkpoint_dir, order, settings.keep_checkpoints, journal.tell)
        try:
            ranks.agree(lambda: check_room(checkpoint_dir, checkpoints.n_bytes, settings.keep_checkpoints))
            wandb_id = state.wandb_id if metrics is None else metrics.wandb_id
            yield Session(replace(state, wandb_id=wandb_id), checkpoints, journal, stop)
        finally:
            if metrics is not None:
                metrics.close()
    ranks.close()


def check_room(checkpoint_dir: Path, n_bytes: int, keep: int) -> None:
    """Refuse to start where the checkpoints of a run would not fit.

    Args:
        checkpoint_dir: of the run.
        n_bytes: of a resume checkpoint; weights alone are a third of it.
        keep: resume checkpoints kept; one more exists while it is written.

    Raises:
        PolygluError: too little is free.
    """
    root = checkpoint_dir / RESUME_FOLDER
    root.mkdir(parents=True, exist_ok=True)
    new = max(1, keep + 1 - len(step_folders(root)))
    needed, free = new * n_bytes + n_bytes // 3, shutil.disk_usage(root).free
    if free < needed:
        raise PolygluError(
            f"training.checkpoint_dir {checkpoint_dir} has {free / GIGABYTE:.2f} GB free, the run needs at least "
            f"{needed / GIGABYTE:.2f} GB there: {new} resume checkpoints and a portable one; make room or give another."
        )


def apply_determinism(settings: LoopSection) -> None:
    """Choose deterministic kernels for the process, if that is configured (PyTorch: notes on reproducibility)."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def saying_how_to_go_on(verb: str, config: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Add to an interruption the command that resumes the run; rank 0 says it for all ranks."""
    try:
        yield
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(EXIT_INTERRUPTED) from None
        if int(os.environ.get("CROSS_SIZE", "1")) > 1:  # of machines, by DeepSpeed's launcher
            how = "the command that started the run, on all machines, with training.resume_from: auto"
            raise Interrupted(f"{interrupted} Go on with {how}.") from None
        start = ["polyglu", verb]
        if launched_distributed():
            start = ["deepspeed", f"--num_gpus={os.environ['WORLD_SIZE']}", "-m", MODULES[verb]]
        kept = [override for override in overrides if not override.startswith("training.resume_from=")]
        settings = [part for override in [*kept, "training.resume_from=auto"] for part in ("--set", override)]
        command = shlex.join([*start, "--config", str(config), *settings])
        raise Interrupted(f"{interrupted} Go on with: {command}") from None
