"""Saving while training goes on: copied at once, written in a thread, whole on disk or not there.

    loop ── save(state) ──► is there room? ──► copy to the host's memory ──► thread: write, flush, hash ──┐
    loop ── settle(), at a later step, once all ranks have written ──► manifest, rename, prune ◄──────────┘

A save that fails (a full disk, a fault of the disk) is told of and leaves the checkpoints before it as they are;
training goes on, and the next one that is due tries again. All ranks call every method at the same step.
"""

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from polyglu.errors import PolygluError
from polyglu.files import TEMPORARY_SUFFIX, write_atomically
from polyglu.training.checkpoint import (
    RESUME_FOLDER,
    ResumePoint,
    abandon_after,
    check_fits,
    commit,
    describe,
    newest_whole,
    prune,
    restore,
    step_folder,
)
from polyglu.training.engine import Engine
from polyglu.training.guard import RunState
from polyglu.training.metrics import Level
from polyglu.training.shards import BYTES_PER_PARAMETER, Piece, copied, shard_name, write_shard

Tell = Callable[[int, str, str, Level], None]
"""Receives step, kind, message and level of an event; on rank 0 it tells the user, elsewhere nobody."""
Job = Callable[[], Any]
"""Writes a file from memory that training does not touch."""
RESUME = "resume checkpoint"
GIGABYTE = 10**9


class Checkpoints:
    """The resume checkpoints of a run, and files that are written beside them.

    Args:
        engine: whose weights and moments are saved.
        checkpoint_dir: folder of the run's checkpoints.
        order: what determines the run's model and data order.
        keep: resume checkpoints kept.
        tell: told of saves that failed.
    """

    def __init__(self, engine: Engine, checkpoint_dir: Path, order: Mapping[str, Any], keep: int, tell: Tell) -> None:
        self.engine, self.ranks, self.checkpoint_dir = engine, engine.ranks, checkpoint_dir
        self.order, self.keep, self.tell = order, keep, tell
        self._buffers: dict[str, Tensor] = {}
        self._under_way: _Save | None = None

    @property
    def n_bytes(self) -> int:
        """Size of a resume checkpoint."""
        return BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in self.engine.loss.model.parameters())

    @property
    def is_writing(self) -> bool:
        """Whether this rank is writing just now."""
        return self._under_way is not None and self._under_way.is_alive()

    def save(self, state: RunState, jobs: Mapping[str, Job] = MappingProxyType({}), resumable: bool = True) -> float:
        """Begin to save a step, once a save that is under way has ended; a step that is saved is not saved again.

        Args:
            state: where the run is.
            jobs: files that rank 0 writes besides: what each is -> what writes it.
            resumable: write a resume checkpoint.

        Returns:
            Seconds that the caller waited.
        """
        begun = time.perf_counter()
        self.finish()
        final = step_folder(self.checkpoint_dir, state.step)
        temporary = final.with_name(final.name + TEMPORARY_SUFFIX)
        writers = dict(jobs) if self.ranks.rank == 0 else {}
        if resumable and self.ranks.agree(lambda: self._make_room(final, temporary, state.step)):
            pieces = copied(self.engine.pieces(), self._buffers)
            shard = temporary / shard_name(self.ranks.rank)
            writers = {RESUME: lambda: _write_shard(shard, pieces)} | writers
        self._under_way = _Save(state.step, describe(self.engine, state, self.order), temporary, writers)
        self._under_way.start()
        return time.perf_counter() - begun

    def settle(self) -> None:
        """Make final what was being written, if anything was; to be called when no rank is writing any more."""
        save, self._under_way = self._under_way, None
        if save is None:
            return
        written = self.ranks.gather((save.written.get(RESUME), save.faults))
        if self.ranks.rank == 0:
            shards = [shard for shard, _ in written if shard is not None]
            faults = [fault for _, all_of in written for fault in all_of]
            doing = RESUME
            try:
                if len(shards) == self.ranks.world_size:
                    commit(save.temporary, save.description, shards)
                    doing = "removal of older ones"
                    prune(self.checkpoint_dir, self.keep)
                elif save.temporary.exists():
                    shutil.rmtree(save.temporary)
            except OSError as error:
                faults.append(f"{doing}: {error}")
            for fault in faults:
                self.tell(save.step, "save failed", f"{fault}; earlier checkpoints are as they were", "error")
        if save.error is not None:
            raise save.error

    def finish(self) -> None:
        """Wait for the save that is under way, if any, and make it final."""
        if self._under_way is not None:
            self._under_way.join()
        self.settle()

    def return_to_good(self, state: RunState) -> RunState:
        """Bring the engine back to the newest checkpoint that was saved when all was well.

        Returns:
            The state from which the run goes on; what was saved later is set aside.

        Raises:
            PolygluError: there is none, or it is another run's.
        """
        self.finish()
        point = self.ranks.agree(lambda: self._newest_good(state.due))
        restore(self.engine, point)
        self.ranks.agree(lambda: abandon_after(self.checkpoint_dir, point.state.step, point.folder))
        return state.rolled_back_to(point.state)

    def _newest_good(self, due: int) -> ResumePoint:
        """The one that was due last, so that no interruption decides; if it is gone, any saved when all was well."""
        root = self.checkpoint_dir / RESUME_FOLDER
        point = newest_whole(root, lambda saved: saved.bad_in_a_row == 0 and saved.step <= due)
        point = point or newest_whole(root, lambda saved: saved.bad_in_a_row == 0)
        if point is None:
            raise PolygluError(f"{root} holds no whole resume checkpoint to return to after bad steps.")
        check_fits(point, self.order)
        return point

    def _make_room(self, final: Path, temporary: Path, step: int) -> bool:
        """Make an empty folder for a resume checkpoint; False if the step is saved, and, told, if it would not fit."""
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            for cut_off in temporary.parent.glob(f"step_*{TEMPORARY_SUFFIX}"):
                shutil.rmtree(cut_off)
            if final.exists():
                prune(self.checkpoint_dir, self.keep)  # a kill right after that save may have come before it
                return False
            free = shutil.disk_usage(temporary.parent).free
            if free >= self.n_bytes:
                temporary.mkdir()
                return True
            fault = f"it needs {self.n_bytes / GIGABYTE:.2f} GB, {free / GIGABYTE:.2f} GB are free; make room"
        except OSError as error:
            fault = str(error)
        self.tell(step, "save failed", f"no resume checkpoint in {temporary.parent}: {fault}", "error")
        return False


def _write_shard(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    digest = write_atomically(path, lambda file: write_shard(file, pieces))
    return {"bytes": path.stat().st_size, "sha256": digest}


class _Save(threading.Thread):
    """Writes a rank's files of one step. It dies with the process: what it leaves then has a temporary name."""

    def __init__(self, step: int, description: Mapping[str, Any], temporary: Path, jobs: Mapping[str, Job]) -> None:
        super().__init__(name="save", daemon=True)
        self.step, self.description, self.temporary, self._jobs = step, description, temporary, jobs
        self.written: dict[str, Any] = {}
        """What each job returned."""
        self.faults: list[str] = []
        """What could not be written, and why."""
        self.error: Exception | None = None
        """A fault of the program."""

    def run(self) -> None:
        """Do every job; one that fails does not keep the next from being done."""
        for what, job in self._jobs.items():
            try:
                self.written[what] = job()
            except OSError as error:
                self.faults.append(f"{what}: {error}")
            except Exception as error:
                self.error = error
