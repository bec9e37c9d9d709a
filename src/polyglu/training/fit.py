"""The training loop of pre-training and fine-tuning. It does not know the engine, nor where batches come from.

batch ──► forward, backward ──► loss sane? ──► update ──► state ──► metrics, checkpoint ──► next step
              │                     └ no: no update; three in a row: back to the last good checkpoint, and on
              │                           with the data after them
              └ out of memory, in the first steps: smaller micro batches, the same step again
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from polyglu.data.dataloader import MicroBatch
from polyglu.errors import EXIT_BAD_INPUT, Interrupted, PolygluError
from polyglu.training.checkpoint import step_folder
from polyglu.training.engine import Engine
from polyglu.training.feed import Feed, Loader
from polyglu.training.guard import BAD_IN_A_ROW, RunState
from polyglu.training.journal import Journal, StepNumbers
from polyglu.training.loss import batch_noise
from polyglu.training.memory import is_out_of_memory
from polyglu.training.saver import Checkpoints, Job
from polyglu.training.signals import Stop

FIRST_STEPS = 3
"""Steps after the start of the process in which memory that runs out is answered by smaller micro batches."""
TOO_LARGE = (
    "the memory does not suffice for training.micro_batch_size: lower it, and raise training.grad_accum_steps by the "
    "same factor; training.resume_from: auto goes on from the last checkpoint."
)
"""What to say when they cannot be smaller."""


@dataclass(frozen=True)
class Plan:
    """What happens at which step. A step is counted when it is done; schedules take the number of steps done."""

    total_steps: int
    learning_rate: Callable[[int], float]
    tau: Callable[[int], float]
    seed: int
    checkpoint_every: int
    gumbel: bool = True
    """Noise in the routing logits."""
    skip_spikes: bool = False
    """Leave out the update of a step whose loss is a spike."""
    max_rollbacks: int = 3
    """Returns to a good checkpoint before the run gives up."""
    files: Callable[[RunState], Mapping[str, Job]] = lambda state: {}
    """Files due after a step besides resume checkpoints, the same on all ranks: what each is -> what writes it."""


def fit(
    engine: Engine, loader: Loader, plan: Plan, state: RunState, checkpoints: Checkpoints, journal: Journal, stop: Stop
) -> RunState:
    """Train from ``state`` to the end of the plan; return the state there.

    The loss of a step is the sum over all targets of the global batch divided by their number, over all micro
    batches and ranks, so that how a batch is cut never changes what is learnt.

    Args:
        engine: runs forward, backward and the update.
        loader: makes this rank's micro batches.
        plan: schedules and cadence.
        state: where the run is.
        checkpoints: where it is saved.
        journal: what tells of it.
        stop: set when the run shall end after the step in hand.

    Raises:
        Interrupted: ``stop`` was set; the run is saved.
        PolygluError: bad data, a micro batch that does not fit, or more bad steps than ``max_rollbacks`` mends.
    """
    ranks, started = engine.ranks, state.step
    checkpoints.save(state)
    with _errors_in_order(checkpoints), closing(Feed(loader, ranks.device)) as feed:
        while state.step < plan.total_steps:
            micro_batches, own_targets, bad_data = _next_batch(feed, state, plan)
            flags = stop.requested, checkpoints.is_writing, bad_data is not None
            n_targets, stops, writing, any_bad_data = ranks.sum([own_targets, *flags])
            if not writing:
                checkpoints.settle()
            if any_bad_data:
                checkpoints.finish()
                raise bad_data or SystemExit(EXIT_BAD_INPUT)  # the rank that has the fault says it
            if stops:
                raise _interrupted(state, checkpoints)
            tau, rate = plan.tau(state.step), plan.learning_rate(state.step)
            passes = _forward_backward(engine, micro_batches, max(1.0, n_targets), state, tau, plan)
            if passes is None:
                feed.use(_smaller(engine, feed.loader, state.step - started))
                continue
            grad_norm, loss = engine.step(rate), float(passes.loss)  # where alone the host waits for a GPU
            fault = state.fault_of(loss)
            barred = state.bars(loss, plan.skip_spikes)
            state = state.after_step(loss, updated=math.isfinite(grad_norm))
            work = (
                sum(batch.input_ids.numel() for batch in micro_batches),
                sum(batch.attention_pairs for batch in micro_batches),
            )
            journal.step(state, StepNumbers(loss, grad_norm, fault, barred, rate, tau, *work), passes.routing)
            if state.bad_in_a_row == BAD_IN_A_ROW:
                state = _go_back(state, plan, checkpoints, journal)
            else:
                state = _save_what_is_due(state, plan, checkpoints, journal)
    checkpoints.finish()
    return state


def _next_batch(feed: Feed, state: RunState, plan: Plan) -> tuple[Sequence[MicroBatch], int, Exception | None]:
    """This rank's micro batches and the number of their targets; or why there are none."""
    try:
        return *feed.step(state.step + state.passed, plan.total_steps + state.passed), None
    except (PolygluError, OSError) as error:
        return [], 0, error


class _Passes(NamedTuple):
    """What the passes of a step gave besides the gradient, which the engine holds."""

    loss: Tensor
    """fp64 scalar on the device, in nats per target."""
    routing: list[Tensor]


def _forward_backward(
    engine: Engine, micro_batches: Sequence[MicroBatch], n_targets: float, state: RunState, tau: float, plan: Plan
) -> _Passes | None:
    """Gradient of a step; None: memory is out. All that the passes held is free when it returns.

    The device decides itself whether the step may count, so that the host can queue all of it without waiting.
    """
    losses: list[Tensor] = []
    try:
        for host_batch in micro_batches:
            batch, last = host_batch.to(engine.ranks.device), host_batch is micro_batches[-1]
            noise = batch_noise(engine.loss.model.config, batch, plan.seed) if plan.gumbel else None
            parts = engine.forward(batch, tau, noise)
            losses.append(parts.loss.detach())
            objective = (parts.loss + parts.penalty) / n_targets
            if last:
                loss = torch.stack(losses).sum().double()
                engine.ranks.add_up(loss)
                loss /= n_targets
                counts = loss.isfinite() & (loss <= state.largest_loss(plan.skip_spikes))
                # No engine updates with a gradient of NaN.
                objective = objective * torch.where(counts, 1.0, math.nan)
            engine.backward(objective, last)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return _Passes(loss, parts.routing)


def _save_what_is_due(state: RunState, plan: Plan, checkpoints: Checkpoints, journal: Journal) -> RunState:
    """The state that knows of it. Among bad steps no resume checkpoint is due: a rollback could not use it."""
    last = state.step == plan.total_steps
    resumable = last or (state.step % plan.checkpoint_every == 0 and not state.bad_in_a_row)
    if resumable and not state.bad_in_a_row:
        state = replace(state, due=state.step)
    files = plan.files(state)
    if resumable or files:
        journal.sync()
        journal.waited(checkpoints.save(state, files, resumable))
    return state


def _go_back(state: RunState, plan: Plan, checkpoints: Checkpoints, journal: Journal) -> RunState:
    """Return to the last good checkpoint, past the data since then."""
    if state.rollbacks >= plan.max_rollbacks:
        checkpoints.finish()
        checkpoints.ranks.agree(lambda: _give_up(state))
    back = checkpoints.return_to_good(state)
    journal.went_back(back)
    passed = f"the data of the {state.step - back.step:,} steps since then is passed over"
    said = f"{BAD_IN_A_ROW} steps in a row without an update: back to step {back.step:,}; {passed}"
    journal.tell(state.step, "rollback", said, "warning")
    return back


def _give_up(state: RunState) -> NoReturn:
    raise PolygluError(
        f"training failed at step {state.step:,}: {BAD_IN_A_ROW} steps in a row without an update, after "
        f"{state.rollbacks} returns to an earlier checkpoint (training.max_rollbacks). Lower learning_rate or "
        "check the data; training.resume_from: auto goes on from the last good checkpoint."
    )


def _smaller(engine: Engine, loader: Loader, steps_done: int) -> Loader:
    """A loader of smaller micro batches, once the gradients of the broken step are forgotten."""
    gc.collect()  # frames that hold each other, and the tensors of the broken passes
    smaller = loader.recut() if steps_done < FIRST_STEPS and engine.discard() else None
    if smaller is None:
        raise PolygluError(TOO_LARGE)
    return smaller


@contextmanager
def _errors_in_order(checkpoints: Checkpoints) -> Iterator[None]:
    """An error loses no save that is under way, and missing memory is put into words.

    An update that finds no memory is not tried again: a part of it may have been made.
    """
    try:
        yield
    except BaseException as error:
        if checkpoints.ranks.world_size == 1:  # other ranks may not have the error
            checkpoints.finish()
        if is_out_of_memory(error):
            raise PolygluError(TOO_LARGE) from None
        raise


def _interrupted(state: RunState, checkpoints: Checkpoints) -> Interrupted:
    checkpoints.save(state)
    checkpoints.finish()
    folder = step_folder(checkpoints.checkpoint_dir, state.step)
    saved = f"saved in {folder}" if folder.exists() else f"NOT saved; {folder.parent} has what was saved before"
    return Interrupted(f"stopped after step {state.step:,}, {saved}.")
