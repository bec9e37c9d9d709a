"""A save that fails, wherever and however, leaves what was whole before it, is told, and the next one succeeds."""

import errno
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import KINDS, ORDER, SHAPES, Saved, SplitEngine, System, seen_open

from polyglu import files
from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig
from polyglu.model.model import read_checkpoint, save_portable
from polyglu.training import saver
from polyglu.training.checkpoint import MANIFEST, newest_whole, read_resume_point, step_folders
from polyglu.training.guard import RunState
from polyglu.training.shards import shard_name

KINDS_OF_CALLS = {
    "stat", "mkdir", "scandir", "unlink", "rmdir", "statvfs", "open", "write", "flush", "fsync", "close", "replace",
    "rename", "readinto", "read",
}  # fmt: skip


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such: flushing it costs nothing."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory)) if memory.is_dir() else tmp_path
    yield folder
    shutil.rmtree(folder)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@cache
def weights_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def portable(path: Path, step: int) -> Any:
    return lambda: save_portable(path, weights_of(step), ModelConfig(), step, 0.5, {})


def is_portable(path: Path, step: int) -> bool:
    weights, expected = read_checkpoint(path).weights, weights_of(step)
    return all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def before_the_save(folder: Path) -> None:
    """Steps 10 and 20 are saved, and a save of 25 was cut off."""
    saved = Saved(folder)
    for step in (10, 20):
        saved.save(step)
    cut_off = saved.root / "step_00000025.tmp"
    cut_off.mkdir()
    (cut_off / shard_name(0)).write_bytes(b"half")
    portable(folder / "portable_step20.pt", 20)()


def save_30(folder: Path, system: System) -> Saved:
    saved = Saved(folder)
    with system.watching():
        saved.save(30, jobs={"portable_step30.pt": portable(folder / "portable_step30.pt", 30)})
    return saved


@pytest.mark.parametrize(("code", "done"), [(errno.ENOSPC, False), (errno.EIO, True)])
def test_any_call_into_the_system_may_fail(fast: Path, code: int, done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call after another, in both threads, that a save with a portable file makes, is refused."""
    monkeypatch.setattr(files, "open", seen_open, raising=False)
    before, folder, undisturbed = fast / "before", fast / "run", System()
    before_the_save(before)
    portable(fast / "first.pt", 1)()  # what is imported by the first one is no part of a save
    shutil.copytree(before, folder)
    saved = save_30(folder, undisturbed)
    assert not saved.told and saved.names() == ["step_00000020", "step_00000030"]
    assert {name for name, _ in undisturbed.calls} >= KINDS_OF_CALLS
    assert {thread for _, thread in undisturbed.calls} == {"MainThread", "save"} and len(undisturbed.calls) > 100

    for number, (name, _) in enumerate(undisturbed.calls):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        system = System(number, code, done)
        saved = save_30(folder, system)
        assert system.refused == -1 and system.calls[number][0] == name
        check_what_is_left(saved, before)
        saved.told.clear()
        saved.save(40)
        assert not saved.told and saved.names()[-1] == "step_00000040" and len(saved.names()) == 2


def test_everything_is_flushed_before_it_is_named_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves no name without its bytes: shard, portable file, manifest, then the folder; pruning last."""
    monkeypatch.setattr(files, "open", seen_open, raising=False)
    before_the_save(tmp_path)
    system = System()
    save_30(tmp_path, system)
    order = [name for name, _ in system.calls if name in ("fsync", "replace", "rename")]
    assert order == ["fsync", "replace", "fsync"] * 3 + ["rename", "fsync", "rename"]


def check_what_is_left(saved: Saved, before: Path) -> None:
    """After a save of step 30 in which something failed."""
    final = {path.name: path for path in step_folders(saved.root)}
    for path in final.values():
        read_resume_point(path)  # nothing that is not whole has a final name
    for path in step_folders(before / "ds_checkpoint"):
        assert path.name not in final or content_of(final[path.name]) == content_of(path)
    assert "step_00000020" in final and ("step_00000010" in final or "step_00000030" in final)
    old, new = (saved.root.parent / f"portable_step{step}.pt" for step in (20, 30))
    assert old.read_bytes() == (before / old.name).read_bytes()
    assert not new.exists() or is_portable(new, 30)
    went_well = new.exists() and saved.names() == ["step_00000020", "step_00000030"]
    assert went_well or saved.told
    for step, kind, message, level in saved.told:
        assert (step, kind, level) == (30, "save failed", "error") and "[Errno " in message


@pytest.mark.parametrize("limit", [50, 400, 1500])
def test_a_file_that_may_not_grow(tmp_path: Path, limit: int) -> None:
    """The kernel itself ends a write in the middle, as on a full disk (setrlimit(2): EFBIG)."""
    before, folder = tmp_path / "before", tmp_path / "run"
    before_the_save(before)
    shutil.copytree(before, folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        saved = save_30(folder, System())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_what_is_left(saved, before)
    told = [message for _, _, message, _ in saved.told]
    assert len(told) == (1 if limit == 1500 else 2)
    assert f"File too large: '{folder}/portable_step30.pt'; earlier checkpoints are as they were" in told[-1]
    saved.save(40)
    assert saved.names()[-1] == "step_00000040" and len(saved.told) == len(told)


def test_too_little_room_is_told_and_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_the_save(tmp_path)
    saved = Saved(tmp_path)
    before = {path: content_of(path) for path in step_folders(saved.root)}
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=saved.checkpoints.n_bytes - 1))
        saved.save(30, jobs={"portable": portable(tmp_path / "portable_step30.pt", 30)})
    ((step, kind, message, level),) = saved.told
    assert (step, kind, level) == (30, "save failed", "error")
    assert "it needs 0.00 GB, 0.00 GB are free; make room" in message and str(saved.root) in message
    assert saved.names() == ["step_00000010", "step_00000020"]  # what was cut off makes room
    assert {path: content_of(path) for path in step_folders(saved.root)} == before
    assert is_portable(tmp_path / "portable_step30.pt", 30)
    n_elements = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert saved.checkpoints.n_bytes == 4 * len(KINDS) * n_elements


def test_a_fault_of_the_program_is_raised_once_the_rest_is_saved(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    with pytest.raises(ZeroDivisionError):
        saved.save(10, jobs={"broken": lambda: 1 // 0, "portable": portable(tmp_path / "portable.pt", 10)})
    assert not saved.told and saved.names() == ["step_00000010"] and is_portable(tmp_path / "portable.pt", 10)


def test_an_error_of_torch_that_no_disk_caused_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        files.write_atomically(tmp_path / "file", broken)
    assert not list(tmp_path.iterdir())


def test_training_goes_on_while_a_step_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state at the save, whatever becomes of the live one; it is final once it is settled."""
    may_write, write = threading.Event(), saver.write_shard

    def held_up(file: Any, pieces: Any) -> None:
        assert may_write.wait(20)
        write(file, pieces)

    monkeypatch.setattr(saver, "write_shard", held_up)
    saved = Saved(tmp_path)
    saved.engine.become(10)
    assert saved.checkpoints.save(RunState(step=10, due=10)) < 10
    assert saved.checkpoints.is_writing
    saved.engine.become(11)
    may_write.set()
    deadline = time.monotonic() + 20
    while saved.checkpoints.is_writing and time.monotonic() < deadline:
        time.sleep(0.001)
    assert saved.names() == ["step_00000010.tmp"]
    saved.checkpoints.settle()
    assert saved.names() == ["step_00000010"] and saved.engine.is_at(11)
    assert saved.checkpoints.return_to_good(RunState(step=11, due=10)).step == 10 and saved.engine.is_at(10)


def test_a_step_that_is_saved_is_not_saved_again(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    saved.save(10)
    before = content_of(saved.root / "step_00000010")
    (saved.root / "step_00000005.tmp").mkdir()  # a pruning that was cut off
    saved.engine.become(99)
    saved.checkpoints.save(RunState(step=10), jobs={"portable": portable(tmp_path / "portable.pt", 10)})
    saved.checkpoints.finish()
    assert content_of(saved.root / "step_00000010") == before and not saved.told
    assert saved.names() == ["step_00000010"]
    assert is_portable(tmp_path / "portable.pt", 10)


def test_older_ones_that_a_kill_left_are_removed_where_the_run_goes_on(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    for step in (10, 20):
        saved.save(step)
    shutil.copytree(saved.root / "step_00000010", saved.root / "step_00000005")
    saved.checkpoints.save(RunState(step=20))
    saved.checkpoints.finish()
    assert saved.names() == ["step_00000010", "step_00000020"] and not saved.told


def test_a_left_over_of_the_same_step_is_no_obstacle(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    left_over = saved.root / "step_00000010.tmp"
    left_over.mkdir(parents=True)
    (left_over / shard_name(7)).write_bytes(b"half")
    (saved.root / "notes.tmp").write_text("the user's")
    saved.save(10)
    assert saved.names() == ["notes.tmp", "step_00000010"] and not saved.told
    assert sorted(content_of(saved.root / "step_00000010")) == [MANIFEST, shard_name(0)]


def test_nothing_but_other_files_is_due(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    saved.save(10, jobs={"portable": portable(tmp_path / "portable.pt", 10)}, resumable=False)
    assert not saved.root.exists() and is_portable(tmp_path / "portable.pt", 10)


# Returning to a good one.


def test_the_newest_good_one_that_verifies_is_returned_to(tmp_path: Path) -> None:
    saved = Saved(tmp_path, keep=5)
    for step in (10, 20, 30):
        saved.save(step)
    saved.save(RunState(step=40, bad_in_a_row=2, skipped=2, due=30))
    (saved.root / "step_00000030" / shard_name(0)).write_bytes(b"")
    state = saved.checkpoints.return_to_good(RunState(step=43, passed=1, skipped=5, rollbacks=1, due=30))
    assert state == RunState(step=20, passed=24, skipped=5, rollbacks=2, due=20) and saved.engine.is_at(20)
    assert saved.names() == [
        "abandoned_step_00000040", "damaged_step_00000030", "step_00000010", "step_00000020"
    ]  # fmt: skip


def test_no_return_to_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    saved.save(10)
    saved.checkpoints.order = {**ORDER, "seed": 2}
    with pytest.raises(PolygluError, match="step_00000010 belongs to a run whose seed differ"):
        saved.checkpoints.return_to_good(RunState(step=13, due=10))
    assert newest_whole(saved.root) is not None and SplitEngine(saved.engine.ranks, 10).is_at(10)
