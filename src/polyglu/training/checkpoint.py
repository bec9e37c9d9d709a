"""Resume checkpoints on disk: whole or not there, verified before use.

    <checkpoint_dir>/ds_checkpoint/
        step_00001000/             shards of all ranks, and manifest.json (written last, sealed with its own SHA-256):
        step_00002000/             step, run state, data order, SHA-256 and size of each shard
        step_00003000.tmp/         a save that was cut off: removed by the next one
        damaged_step_00000900/     set aside: did not verify
        abandoned_step_00002500/   set aside: the run went on from an earlier step, or anew

They belong to no engine and no number of ranks (``shards``). The newest that verifies is the one resumed.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from polyglu.errors import PolygluError
from polyglu.files import TEMPORARY_SUFFIX, flush, plain, read_json, seal, sha256, write_json
from polyglu.model.model import Checkpoint, read_checkpoint
from polyglu.training.engine import Engine
from polyglu.training.guard import RunState
from polyglu.training.portable import MOST, differences, read_state, resume_portable
from polyglu.training.shards import WEIGHT, Piece, read_shards, shard_name

logger = logging.getLogger(__name__)

RESUME_FOLDER = "ds_checkpoint"
MANIFEST = "manifest.json"
FORMAT = "polyglu-resume-2"
ANOTHER = "; resume from another checkpoint"
HINTS = {
    "samples_per_step": "; rows of a step are micro_batch_size x grad_accum_steps x ranks, so set grad_accum_steps to "
    "fit the number of ranks"
}
"""Part of the data order -> what to do where it differs."""


class ShardFile(BaseModel):
    """What a manifest says of a shard."""

    model_config = ConfigDict(strict=True, extra="forbid")
    bytes: PositiveInt
    sha256: str


class ResumePoint(BaseModel):
    """A verified resume checkpoint: its manifest, and where it lies."""

    model_config = ConfigDict(strict=True, extra="forbid")
    folder: Path
    engine: str
    """That wrote it; any can read it."""
    updates: Annotated[int, Field(ge=0, lt=MOST)]
    """Updates of the weights, which AdamW corrects its moments by."""
    state: RunState
    order: dict[str, Any]
    """What determines the run's data order, and the model."""
    shards: Annotated[list[ShardFile], Field(min_length=1)]
    """One of each rank that wrote it, in their order."""


def step_folder(checkpoint_dir: Path, step: int) -> Path:
    """Where the resume checkpoint of a step lies."""
    return checkpoint_dir / RESUME_FOLDER / f"step_{step:08d}"


def describe(engine: Engine, state: RunState, order: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of a run as it is now, besides the shards."""
    return {"engine": engine.name, "updates": engine.updates, "state": asdict(state), "order": dict(order)}


def commit(temporary: Path, description: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> None:
    """Give a folder whose shards are written its manifest, then its name.

    Raises:
        OSError: the system refused, or a shard is not there: its rank wrote to another machine's disk.
    """
    for rank in range(len(shards)):
        (temporary / shard_name(rank)).stat()
    content = plain({"format": FORMAT, **description, "shards": list(shards)})
    write_json(temporary / MANIFEST, {**content, "sha256": seal(content)})
    temporary.rename(temporary.with_name(temporary.name.removesuffix(TEMPORARY_SUFFIX)))
    flush(temporary.parent)


def prune(checkpoint_dir: Path, keep: int) -> None:
    """Remove all resume checkpoints but the newest ``keep``, and of these the newest that a rollback could use.

    That one was due, and not saved because the run was stopped, perhaps among bad steps. A folder loses its name
    before its files: what a removal that was cut off leaves is taken for no checkpoint.
    """
    newest_first = step_folders(checkpoint_dir / RESUME_FOLDER)
    good = next(filter(_could_return, newest_first), None)
    for folder in newest_first[keep:]:
        if folder != good:
            shutil.rmtree(folder.rename(folder.with_name(folder.name + TEMPORARY_SUFFIX)))


def step_folders(root: Path) -> list[Path]:
    """Folders of resume checkpoints by name, newest first, whole or not."""
    folders = (path for path in root.glob("step_*") if path.name.removeprefix("step_").isdecimal())
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint so that no resume takes it; return its new path."""
    aside, number = folder.with_name(f"{why}_{folder.name}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{why}_{folder.name}.{number}")
    folder.rename(aside)
    flush(folder.parent)
    return aside


def abandon_after(checkpoint_dir: Path, step: int, resumed: Path | None = None) -> None:
    """Set aside what another course of the run saved: all after a step, and of that step all but what was resumed.

    Args:
        checkpoint_dir: of the run.
        step: from which the run goes on; 0 and nothing resumed: everything is set aside.
        resumed: folder of the resume checkpoint that it goes on from, wherever that lies.
    """
    for folder in step_folders(checkpoint_dir / RESUME_FOLDER):
        saved = int(folder.name.removeprefix("step_"))
        if saved > step or (saved == step and not (resumed is not None and folder.samefile(resumed))):
            logger.warning("the run goes on without %s: set aside as %s", folder, set_aside(folder, "abandoned").name)


def find_resume_point(resume_from: str, checkpoint_dir: Path, aside: bool = True) -> ResumePoint | Checkpoint | None:
    """What ``resume_from`` names: a ds_checkpoint folder (or one step of it), a portable file, or 'auto'.

    Args:
        resume_from: as configured.
        checkpoint_dir: of the run.
        aside: set aside newer checkpoints that do not verify.

    Returns:
        A resume point, the content of a portable checkpoint, or None where 'auto' finds nothing to resume.

    Raises:
        PolygluError: nothing there, or nothing of it whole.
    """
    if resume_from == "auto":
        return newest_whole(checkpoint_dir / RESUME_FOLDER, aside=aside)
    path = Path(resume_from)
    if path.is_file():
        return read_checkpoint(path)
    if not path.is_dir():
        raise PolygluError(
            f"training.resume_from: {path} does not exist; give a {RESUME_FOLDER} folder, "
            "a portable .pt file or 'auto'."
        )
    if (path / MANIFEST).is_file():
        return read_resume_point(path)
    if (path / RESUME_FOLDER).is_dir():
        path = path / RESUME_FOLDER
    point = newest_whole(path, aside=aside)
    if point is None:
        raise PolygluError(f"training.resume_from: {path} holds no whole resume checkpoint (step_*/{MANIFEST}).")
    return point


def newest_whole(
    root: Path, usable: Callable[[RunState], bool] = lambda state: True, aside: bool = True
) -> ResumePoint | None:
    """The newest resume checkpoint that verifies and is ``usable``; newer ones that do not verify are set aside.

    Without ``aside`` they are only passed over.
    """
    for folder in step_folders(root):
        try:
            point = read_resume_point(folder)
        except PolygluError as error:
            if not aside:
                logger.warning("%s It is passed over.", error)
                continue
            try:
                logger.warning("%s Set aside as %s.", error, set_aside(folder, "damaged").name)
            except OSError as refusal:
                logger.warning("%s It is passed over, and cannot be set aside: %s.", error, refusal)
        else:
            if usable(point.state):
                return point
    return None


def read_resume_point(folder: Path) -> ResumePoint:
    """Verify one ``step_*`` folder against its manifest.

    Raises:
        PolygluError: the manifest is of another format or was changed, or a shard is missing or has other bytes.
    """
    try:
        point = _read_manifest(folder)
        with ThreadPoolExecutor(4) as pool:
            ranks = range(len(point.shards))
            for fault in pool.map(_fault, (folder / shard_name(rank) for rank in ranks), point.shards):
                if fault is not None:
                    raise PolygluError(f"{fault}{ANOTHER}.")
    except OSError as error:
        raise PolygluError(f"{folder} cannot be read ({error}){ANOTHER}.") from None
    return point


def _read_manifest(folder: Path) -> ResumePoint:
    path = folder / MANIFEST
    content = read_json(path)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise PolygluError(f"{path} is not of the format {FORMAT}{ANOTHER}.")
    try:
        if content.pop("sha256", None) != seal({"format": FORMAT, **content}):
            raise PolygluError(f"{path} was changed after it was written (its SHA-256 differs){ANOTHER}.")
        content["state"] = read_state(content.get("state"))
        return ResumePoint(folder=folder, **content)
    except (ValueError, TypeError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        raise PolygluError(f"{path} is not whole ({' '.join(str(error).split())[:200]}){ANOTHER}.") from None


def check_fits(point: ResumePoint, order: Mapping[str, Any]) -> None:
    """Check that a resume point is of a run with the same model and data order.

    Raises:
        PolygluError: it is of another run; the message names what differs.
    """
    if changed := differences(point.order, order):
        hints = "".join(HINTS.get(key, "") for key in changed)
        raise PolygluError(
            f"{point.folder} belongs to a run whose {', '.join(changed)} differ from this config's{hints}; start from "
            "a portable .pt file instead, resume as the run was started, or choose another training.checkpoint_dir."
        )


def resume(
    engine: Engine, found: ResumePoint | Checkpoint | None, order: Mapping[str, Any], checkpoint_dir: Path
) -> RunState:
    """Bring an engine to what was found (all ranks call it); what a later course of the run saved is set aside.

    Args:
        engine: has the weights of a portable checkpoint already.
        found: by ``find_resume_point``.
        order: what determines this run's model and data order.
        checkpoint_dir: of this run.

    Returns:
        Where the run is. Of a portable checkpoint without training state, or with that of another data order, it is
        the step alone: the optimiser starts anew, and that is said.

    Raises:
        PolygluError: a resume point of another model or data order, or a training state that is not whole.
    """
    state, resumed = RunState(), None
    if isinstance(found, ResumePoint):
        check_fits(found, order)
        restore(engine, found)
        state, resumed = found.state, found.folder
        ranks = f"{found.engine} engine, {len(found.shards)} rank(s)"
        logger.info("resuming at step %d from %s (%s)", state.step, found.folder, ranks)
    elif found is not None:
        state = resume_portable(engine, found, order)
    engine.ranks.agree(lambda: abandon_after(checkpoint_dir, state.step, resumed))
    return state


def restore(engine: Engine, point: ResumePoint) -> None:
    """Bring an engine's weights, moments and count of updates to a resume point (all ranks call it).

    Raises:
        PolygluError: the shards do not hold this model.
    """
    named = engine.loss.model.named_parameters()
    whole = [Piece(name, 0, {WEIGHT: parameter.detach().view(-1)}) for name, parameter in named]
    read_shards(point.folder, len(point.shards), [*engine.pieces(), *whole])
    engine.updates = point.updates


def _fault(path: Path, expected: ShardFile) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != expected.bytes:
        return f"{path} has {path.stat().st_size:,} bytes, expected {expected.bytes:,}"
    return None if sha256(path) == expected.sha256 else f"{path} is damaged (its SHA-256 differs)"


def _could_return(folder: Path) -> bool:
    try:
        state = read_json(folder / MANIFEST)["state"]
        return bool(state["bad_in_a_row"] == 0 and state["step"] == state["due"])
    except (PolygluError, KeyError, TypeError):
        return False
