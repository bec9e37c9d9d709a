"""Two steps of a run, a save and a load, through the code that trains, in a folder that is removed.

start ──► step ──► save ──► step ──► load: the same bits as saved? ──► the second step again: the same bits?
"""

import hashlib
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from polyglu.data.chunks import TokenSource
from polyglu.errors import PolygluError
from polyglu.model.model import Checkpoint
from polyglu.training.checkpoint import ResumePoint, read_resume_point, restore, step_folder
from polyglu.training.devices import peak_memory
from polyglu.training.engine import Engine, create_engine
from polyglu.training.estimate import Trial
from polyglu.training.fit import Plan, fit
from polyglu.training.guard import RunState
from polyglu.training.journal import Journal, StepNumbers
from polyglu.training.memory import fit_micro_batch, rows_per_step
from polyglu.training.metrics import Level
from polyglu.training.portable import resume_portable
from polyglu.training.preflight import existing_parent
from polyglu.training.ranks import Ranks
from polyglu.training.saver import Checkpoints, Job
from polyglu.training.schedules import learning_rate, temperature
from polyglu.training.signals import Stop
from polyglu.training.train import CutLoader, create_loader, starting_model

PREFIX = "polyglu-dry-run-"
"""Of the temporary folder's name."""


@dataclass(frozen=True)
class Outcome:
    """What a trial showed."""

    engine: str
    device: torch.device
    compute: torch.dtype
    micro_batch: int
    """Rows."""
    losses: tuple[float, float]
    """Nats per token, of the two steps."""
    seconds: float
    """Of the second step."""
    save_seconds: float
    """From a copy of all weights and moments to a checkpoint that is whole on disk."""
    peak: int
    """Largest memory in use, in bytes: of the GPU, or of the process."""
    repeated: bool
    """The second step, made again after the load, had the same bits."""


def try_out(
    trial: Trial,
    sources: Sequence[TokenSource],
    ranks: Ranks,
    found: ResumePoint | Checkpoint | None,
    order: Mapping[str, Any],
    near: Path,
) -> Outcome:
    """Make two steps of a run, save, load and make the second one again (all ranks call it).

    Args:
        trial: with what.
        sources: open ones.
        ranks: processes of the run.
        found: what ``resume_from`` led to; it is left as it is.
        order: what determines the run's model and data order.
        near: folder beside which the temporary one is made.

    Raises:
        PolygluError: a step, the save or the load failed, or what was loaded is not what was saved.
    """
    config, settings = trial.config, trial.config.training
    engine = create_engine(starting_model(config, found if trial.whole_model else None), settings, ranks)
    size = fit_micro_batch(settings, engine.loss, ranks, settings.tau_max, engine.buffer_bytes)
    loader = CutLoader(lambda rows: create_loader(config, sources, ranks, rows), size, rows_per_step(settings))
    state = replace(_started(engine, found if trial.whole_model else None, order), bad_in_a_row=0)
    record = _Record(engine)

    def step(state: RunState) -> RunState:
        plan = Plan(
            total_steps=state.step + 1,
            learning_rate=lambda step: learning_rate(
                step, settings.learning_rate, settings.warmup_steps, settings.total_steps
            ),
            tau=lambda step: temperature(step, settings),
            seed=settings.seed,
            gumbel=settings.gumbel,
            checkpoint_every=1,
            max_rollbacks=0,
        )
        record.begin()
        return fit(engine, loader, plan, state, checkpoints, record, Stop())

    with _temporary_folder(ranks, near) as folder:
        checkpoints = _OneSave(engine, folder, order, record, state.step + 1)
        try:
            state = step(state)
            save_seconds = time.perf_counter() - record.ended
            ranks.agree(record.require_sound)
            saved = fingerprint(engine)
            step(state)
            continued = fingerprint(engine)
            point = ranks.agree(lambda: read_resume_point(step_folder(folder, state.step)))
            restore(engine, point)
            unlike = ranks.sum([float(fingerprint(engine) != saved or point.state != state)])[0]
            ranks.agree(lambda: _require_as_saved(point, not unlike))
            step(point.state)
            ranks.agree(record.require_sound)
        finally:
            checkpoints.wait()
    numbers = record.numbers
    unlike = fingerprint(engine) != continued or numbers[2].loss != numbers[1].loss
    return Outcome(
        engine=engine.name,
        device=ranks.device,
        compute=engine.loss.compute_dtype,
        micro_batch=loader.size,
        losses=(numbers[0].loss, numbers[1].loss),
        seconds=record.seconds[1],
        save_seconds=save_seconds,
        peak=peak_memory(ranks.device),
        repeated=not ranks.sum([float(unlike)])[0],
    )


@torch.no_grad()
def fingerprint(engine: Engine) -> str:
    """SHA-256 (hex) of all that this rank's next step depends on: weights, moments, count of updates."""
    digest = hashlib.sha256(str(engine.updates).encode())
    for piece in engine.pieces():
        for kind, tensor in piece.tensors.items():
            digest.update(f"{kind}/{piece.name}/{piece.start}".encode())
            digest.update(tensor.cpu().numpy().data)
    return digest.hexdigest()


def _require_as_saved(point: ResumePoint, as_saved: bool) -> None:
    """Check that a load gave what was saved.

    Raises:
        PolygluError: it did not.
    """
    if not as_saved:
        raise PolygluError(
            f"what was loaded from {point.folder} is not what was saved, though its SHA-256 is right: the memory of "
            "this machine is faulty, or a library does not copy what it should."
        )


def _started(engine: Engine, found: ResumePoint | Checkpoint | None, order: Mapping[str, Any]) -> RunState:
    if isinstance(found, ResumePoint):
        restore(engine, found)
        return found.state
    return RunState() if found is None else resume_portable(engine, found, order)


class _Record(Journal):
    """Keeps the numbers of the steps, instead of telling them."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, None, log_every=1, total_steps=1)
        self.numbers: list[StepNumbers] = []
        self.seconds: list[float] = []
        self.faults: list[str] = []
        self.begun = self.ended = 0.0

    def begin(self) -> None:
        """Note that a step begins."""
        self.begun = self._now()

    def step(self, state: RunState, numbers: StepNumbers, routing: Sequence[Tensor]) -> None:
        """Note the numbers of a step that is done."""
        self.ended = self._now()
        self.numbers.append(numbers)
        self.seconds.append(self.ended - self.begun)

    def tell(self, step: int, kind: str, message: str, level: Level) -> None:
        """Note an event; only faults of a save are told in so short a run."""
        self.faults.append(f"{kind}: {message}")

    def require_sound(self) -> None:
        """Check that all was well so far.

        Raises:
            PolygluError: a save failed, or a loss or gradient was not finite.
        """
        for fault in self.faults:
            raise PolygluError(fault)
        for numbers in self.numbers:
            if not (math.isfinite(numbers.loss) and math.isfinite(numbers.grad_norm)):
                raise PolygluError(
                    f"a step tried out has loss {numbers.loss:.4g} and a gradient of norm {numbers.grad_norm:.4g}; "
                    "resume from another checkpoint, or check training.precision and the model's size."
                )

    def _now(self) -> float:
        if self.engine.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.engine.ranks.device)
        return time.perf_counter()


class _OneSave(Checkpoints):
    """Saves one step and no other."""

    def __init__(self, engine: Engine, folder: Path, order: Mapping[str, Any], record: _Record, step: int) -> None:
        super().__init__(engine, folder, order, keep=2, tell=record.tell)
        self.step = step

    def save(self, state: RunState, jobs: Mapping[str, Job] = MappingProxyType({}), resumable: bool = True) -> float:
        """Save if it is the step."""
        return super().save(state, jobs, resumable) if state.step == self.step else 0.0

    def wait(self) -> None:
        """Wait for this rank's writing alone, whatever the others do: its folder is about to be removed."""
        if self._under_way is not None:
            self._under_way.join()


@contextmanager
def _temporary_folder(ranks: Ranks, near: Path) -> Iterator[Path]:
    """A folder beside ``near``, on its file system if possible; removed at the end, on Ctrl-C and SIGTERM too."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    folder = Path()
    try:
        folder = ranks.agree(lambda: Path(tempfile.mkdtemp(prefix=PREFIX, dir=place_for_trial(near))))
        yield folder
    finally:
        if folder.name:
            shutil.rmtree(folder, ignore_errors=True)
        if main:
            signal.signal(signal.SIGTERM, before)


def place_for_trial(near: Path) -> Path:
    """Where the temporary folder goes: to the nearest parent of ``near``, which itself gets nothing.

    If that is on another file system or not writable, the system's place for temporary files.
    """
    existing = existing_parent(near)
    parent = existing_parent(near.absolute().parent)
    same = parent.stat().st_dev == existing.stat().st_dev
    return parent if same and os.access(parent, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
