"""Resume checkpoints: whole or not there, verified before use.

    <checkpoint_dir>/ds_checkpoint/
        step_00001000/   state of the engine, and manifest.json (written last): step, engine, order, SHA-256 of files
        step_00002000/
        step_00003000.tmp/   a save that was cut off: ignored and removed by the next one

A save writes ``.tmp``, flushes, hashes, writes the manifest and renames. The newest folder that verifies is resumed.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from polyglu.errors import PolygluError
from polyglu.files import TEMPORARY_SUFFIX, flush, read_json, sha256, write_json
from polyglu.model.model import Checkpoint, read_checkpoint
from polyglu.training.engine import Engine

logger = logging.getLogger(__name__)

RESUME_FOLDER = "ds_checkpoint"
MANIFEST = "manifest.json"


class _Manifest(BaseModel):
    """What a resume checkpoint's manifest must hold; written last, so its files are whole."""

    model_config = ConfigDict(strict=True)
    step: PositiveInt
    engine: str
    world_size: PositiveInt
    order: dict[str, Any]
    files: Annotated[dict[str, str], Field(min_length=1)]


@dataclass(frozen=True)
class ResumePoint:
    """A verified resume checkpoint."""

    folder: Path
    step: int
    engine: str
    world_size: int
    order: dict[str, Any]
    """What determines the run's data order."""


def save_resume_point(engine: Engine, checkpoint_dir: Path, step: int, order: Mapping[str, Any], keep: int) -> None:
    """Write the resume checkpoint of a step (all ranks call it), then remove all up to it but the newest ``keep``."""
    root = checkpoint_dir / RESUME_FOLDER
    final = root / f"step_{step:08d}"
    temporary = final.with_name(final.name + TEMPORARY_SUFFIX)
    if engine.rank == 0:
        for cut_off in root.glob(f"*{TEMPORARY_SUFFIX}"):
            shutil.rmtree(cut_off)
        temporary.mkdir(parents=True)
    engine.barrier()
    engine.save(temporary)
    engine.barrier()
    if engine.rank == 0:
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {
            "step": step,
            "engine": engine.name,
            "world_size": engine.world_size,
            "order": dict(order),
            "files": {str(path.relative_to(temporary)): _flushed_digest(path) for path in files},
        }
        write_json(temporary / MANIFEST, manifest)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        flush(root)
        # Later steps are those of another run in the same folder: not ours to remove.
        for old in sorted(folder for folder in root.glob("step_*") if folder.name <= final.name)[:-keep]:
            shutil.rmtree(old)
    engine.barrier()


def find_resume_point(resume_from: str, checkpoint_dir: Path) -> ResumePoint | Checkpoint | None:
    """What ``resume_from`` names: a ds_checkpoint folder (or one step of it), a portable file, or 'auto'.

    Returns:
        A resume point, the content of a portable checkpoint, or None where 'auto' finds nothing to resume.

    Raises:
        PolygluError: nothing there, or nothing of it whole.
    """
    if resume_from == "auto":
        root = checkpoint_dir / RESUME_FOLDER
        return _newest_whole(root) if root.is_dir() else None
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
    point = _newest_whole(path)
    if point is None:
        raise PolygluError(f"training.resume_from: {path} holds no whole resume checkpoint (step_*/{MANIFEST}).")
    return point


def read_resume_point(folder: Path) -> ResumePoint:
    """Verify one ``step_*`` folder against its manifest.

    Raises:
        PolygluError: a file is missing or has other bytes.
    """
    path = folder / MANIFEST
    try:
        manifest = _Manifest.model_validate(read_json(path))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise PolygluError(f"{path}: {where}: {fault['msg']}; resume from another checkpoint.") from None
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file() or sha256(file) != digest:
            raise PolygluError(f"{file} is missing or damaged; resume from another checkpoint.")
    return ResumePoint(folder, manifest.step, manifest.engine, manifest.world_size, manifest.order)


def resume(engine: Engine, found: ResumePoint | Checkpoint | None, order: Mapping[str, Any]) -> int:
    """Bring an engine to a resume point, if that is what was found; return the steps done there, else 0.

    Raises:
        PolygluError: another engine, number of ranks or data order.
    """
    if not isinstance(found, ResumePoint):
        return 0
    check_fits(found, engine, order)
    engine.load(found.folder)
    logger.info("resuming at step %d from %s", found.step, found.folder)
    return found.step


def check_fits(point: ResumePoint, engine: Engine, order: Mapping[str, Any]) -> None:
    """Check that a run can go on from a resume point with the same bits.

    Raises:
        PolygluError: another engine, number of ranks or data order.
    """
    portable = "start from a portable .pt file instead, or resume as the run was started"
    if (point.engine, point.world_size) != (engine.name, engine.world_size):
        raise PolygluError(
            f"{point.folder} was written by the {point.engine} engine on {point.world_size} rank(s), this run uses the "
            f"{engine.name} engine on {engine.world_size}; {portable}."
        )
    changed = sorted(key for key in order.keys() | point.order.keys() if order.get(key) != point.order.get(key))
    if changed:
        raise PolygluError(
            f"{point.folder} belongs to a run whose {', '.join(changed)} differ from this config's; "
            f"{portable}, or choose another training.checkpoint_dir."
        )


def _newest_whole(root: Path) -> ResumePoint | None:
    for folder in sorted(root.glob("step_*"), reverse=True):
        if folder.name.endswith(TEMPORARY_SUFFIX):
            continue
        try:
            return read_resume_point(folder)
        except PolygluError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
    return None


def _flushed_digest(path: Path) -> str:
    flush(path)
    return sha256(path)
