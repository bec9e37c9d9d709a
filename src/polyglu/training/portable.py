"""Portable checkpoints of a run: the weights for every later stage and, on request, all that a resume needs."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from polyglu.errors import PolygluError
from polyglu.files import plain
from polyglu.model.config import ModelConfig
from polyglu.model.model import Checkpoint, save_portable
from polyglu.training.engine import Engine
from polyglu.training.guard import RunState
from polyglu.training.shards import MOMENTS

logger = logging.getLogger(__name__)

MOST = 2**40
"""More than any run counts."""


def portable_writer(
    engine: Engine,
    path: Path,
    config: ModelConfig,
    state: RunState,
    tau: float,
    tokenizer: Mapping[str, Any],
    order: Mapping[str, Any] | None = None,
) -> Callable[[], str]:
    """Copy what a portable checkpoint holds, as it is now (all ranks call it); what is returned writes it (rank 0).

    Args:
        engine: whose weights.
        path: of the file.
        config: what the file says of the model.
        state: where the run is.
        tau: routing temperature of that step.
        tokenizer: name and fingerprint.
        order: the run's data order; given, the file also holds the optimiser's state, three times the size.
    """
    model = engine.loss.model
    training = None
    if order is not None:
        moments = {kind: _gathered(engine, kind) for kind in MOMENTS}
        training = {"updates": engine.updates, "state": plain(asdict(state)), "order": plain(order), "moments": moments}
    keep = engine.ranks.rank == 0
    weights = {name: weight.detach().to("cpu", copy=True) for name, weight in model.state_dict().items() if keep}
    return lambda: save_portable(path, weights, config, state.step, tau, tokenizer, training)


def resume_portable(engine: Engine, found: Checkpoint, order: Mapping[str, Any]) -> RunState:
    """Bring an engine that has a portable checkpoint's weights to its training state, if that is of the same order.

    Args:
        engine: with the weights.
        found: the checkpoint.
        order: what determines this run's model and data order.

    Returns:
        Where the run is: with another data order, or without training state, the step alone.

    Raises:
        PolygluError: the training state is damaged, or fits another model.
    """
    if found.training is None:
        why = "the file holds no optimiser state"
    elif changed := differences(found.training.get("order"), order):
        why = f"its run differs in {', '.join(changed)}"
    else:
        state = restore_training(engine, found.training, found.step)
        logger.info("resuming at step %d from a portable checkpoint with its optimiser state", state.step)
        return state
    logger.warning(
        "going on at step %d with the portable checkpoint's weights alone: %s, so AdamW starts anew", found.step, why
    )
    return RunState(step=found.step, due=found.step)


def differences(theirs: Any, ours: Mapping[str, Any]) -> list[str]:
    """In what a checkpoint's model or data order differs from this run's: the keys, sorted."""
    ours = plain(ours)
    try:
        theirs = plain(theirs)
    except (TypeError, ValueError, RecursionError):  # no JSON: it was not written by a run
        theirs = None
    if not isinstance(theirs, dict):
        return sorted(ours)
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def read_state(content: Any) -> RunState:
    """A run's state as a checkpoint tells it.

    Raises:
        ValueError, TypeError, RecursionError: it is none.
    """
    state = TypeAdapter(RunState).validate_json(json.dumps(content, allow_nan=False), strict=True)
    counts = (state.step, state.passed, state.skipped, state.bad_in_a_row, state.rollbacks, state.due)
    if plain(asdict(state)) != content or not all(0 <= count < MOST for count in counts):
        raise ValueError("state: other parts than a run's state has, or counts that no run can have")
    return state


def write_portable(
    engine: Engine, path: Path, config: ModelConfig, state: RunState, tau: float, tokenizer: Mapping[str, Any]
) -> None:
    """Write a portable checkpoint now, on rank 0 (all ranks call it)."""
    write = portable_writer(engine, path, config, state, tau, tokenizer)
    if engine.ranks.rank == 0:
        write()


def restore_training(engine: Engine, training: Mapping[str, Any], step: int) -> RunState:
    """Bring an engine, whose weights are loaded, to the training state of a portable checkpoint; return the run's.

    Args:
        engine: with the weights.
        training: what the checkpoint holds.
        step: of the weights.

    Raises:
        PolygluError: the state is not whole, or does not fit the model.
    """
    try:
        state, updates = read_state(training["state"]), training["updates"]
        if state.step != step:
            raise ValueError(f"state: it is of step {state.step}, the weights are of step {step}")
        if type(updates) is not int or not 0 <= updates < MOST:
            raise ValueError(f"updates: expected a count, got {updates!r:.40}")
        shapes = {name: parameter.shape for name, parameter in engine.loss.model.named_parameters()}
        for piece in engine.pieces():
            for kind in MOMENTS:
                moment = training["moments"][kind][piece.name]
                if not _is_moment(moment, shapes[piece.name], kind):
                    raise ValueError(f"moments: {kind} of {piece.name} is no tensor of its numbers")
                target = piece.tensors[kind]
                target.copy_(moment.reshape(-1)[piece.start : piece.start + target.numel()])
    except (KeyError, TypeError, ValueError, RecursionError, RuntimeError) as error:
        raise PolygluError(
            f"training.resume_from: the portable checkpoint's training state is not whole "
            f"({' '.join(str(error).split())[:200]}); resume from another checkpoint."
        ) from None
    engine.updates = updates
    return state


def _is_moment(value: Any, shape: torch.Size, kind: str) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not dense or value.shape != shape or value.dtype != torch.float32 or not value.isfinite().all():
        return False
    return kind != "exp_avg_sq" or not (value < 0).any()


@torch.no_grad()
def _gathered(engine: Engine, kind: str) -> dict[str, Tensor]:
    """One kind of moment of every parameter, put together from all ranks: whole on rank 0, in the host's memory."""
    held = {piece.name: piece for piece in engine.pieces()}
    whole = {}
    for name, parameter in engine.loss.model.named_parameters():
        buffer = torch.zeros(parameter.numel(), dtype=torch.float32, device=engine.ranks.device)
        if name in held:
            part = held[name].tensors[kind]
            buffer[held[name].start : held[name].start + len(part)] = part
        engine.ranks.add_up(buffer)
        if engine.ranks.rank == 0:
            whole[name] = buffer.cpu().view(parameter.shape)
    return whole
