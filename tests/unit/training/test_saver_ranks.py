"""Several ranks save together: each its share, all of it whole or nothing, and none is left waiting for another."""

import errno
from pathlib import Path
from typing import Any

import pytest
from saving import Saved, on_ranks

from polyglu.errors import PolygluError
from polyglu.training import saver
from polyglu.training.checkpoint import read_resume_point, step_folders
from polyglu.training.guard import RunState
from polyglu.training.ranks import Ranks
from polyglu.training.shards import shard_name


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_each_rank_writes_its_share_and_any_number_reads_them(tmp_path: Path, n_ranks: int) -> None:
    def save(ranks: Ranks) -> Saved:
        saved = Saved(tmp_path, ranks)
        for step in (10, 20, 30):
            saved.save(step)
        return saved

    saved = on_ranks(n_ranks, save)
    assert not any(of_rank.told for of_rank in saved)
    assert saved[0].names() == ["step_00000020", "step_00000030"]
    assert len(list((saved[0].root / "step_00000030").iterdir())) == n_ranks + 1

    def go_back(ranks: Ranks) -> tuple[RunState, bool]:
        of_rank = Saved(tmp_path, ranks)
        state = of_rank.checkpoints.return_to_good(RunState(step=33, due=30))
        return state, of_rank.engine.is_at(30)

    for others in (1, 2, 4):
        assert on_ranks(others, go_back) == [(RunState(step=30, passed=3, rollbacks=1, due=30), True)] * others


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("a fault")])
def test_a_rank_that_cannot_write(
    tmp_path: Path, n_ranks: int, failing: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All go on together; what the others wrote is removed, rank 0 tells it once."""
    write, fails = saver.write_atomically, [True]

    def full_disk(path: Path, *rest: Any) -> str:
        if path.name == shard_name(failing) and path.parent.name == "step_00000020.tmp" and fails:
            raise error
        return write(path, *rest)

    monkeypatch.setattr(saver, "write_atomically", full_disk)

    def save(ranks: Ranks) -> tuple[list[Any], list[str]]:
        saved = Saved(tmp_path, ranks)
        saved.save(10)
        try:
            saved.save(20)
        except ValueError:
            assert ranks.rank == failing
        told, names = list(saved.told), saved.names()
        ranks.gather(None)
        saved.save(30)
        assert saved.told == told
        return told, names

    results = on_ranks(n_ranks, save)
    message = "resume checkpoint: [Errno 28] No space left on device; earlier checkpoints are as they were"
    expected = [(20, "save failed", message, "error")] if isinstance(error, OSError) else []
    assert [told for told, _ in results] == [expected] + [[]] * (n_ranks - 1)
    assert results[0][1] == ["step_00000010"]
    assert [path.name for path in step_folders(tmp_path / "ds_checkpoint")] == ["step_00000030", "step_00000010"]
    for folder in step_folders(tmp_path / "ds_checkpoint"):
        assert len(read_resume_point(folder).shards) == n_ranks


def test_rank_0_alone_meets_the_fault_and_no_rank_is_left_waiting(tmp_path: Path) -> None:
    """Of the folder: a file is in its place."""
    (tmp_path / "ds_checkpoint").write_text("")

    def save(ranks: Ranks) -> int:
        saved = Saved(tmp_path, ranks)
        saved.save(10)
        saved.save(20)
        return len(saved.told)

    assert on_ranks(2, save) == [2, 0]


def test_ranks_that_write_to_disks_of_their_own_are_told_of(tmp_path: Path) -> None:
    """Each machine has a checkpoint_dir of that name, but it is not the same: no checkpoint is whole anywhere."""

    def save(ranks: Ranks) -> Saved:
        saved = Saved(tmp_path / f"machine {ranks.rank}", ranks)
        saved.save(10)
        return saved

    first, other = on_ranks(2, save)
    ((_, kind, message, _),) = first.told
    assert kind == "save failed" and "No such file" in message and shard_name(1) in message
    assert not step_folders(first.root) and not step_folders(other.root)


def test_none_to_return_to_is_one_sentence_on_rank_0(tmp_path: Path) -> None:
    def go_back(ranks: Ranks) -> None:
        Saved(tmp_path, ranks).checkpoints.return_to_good(RunState(step=3))

    error, other = on_ranks(2, go_back)
    assert isinstance(error, PolygluError) and "holds no whole resume checkpoint to return to" in str(error)
    assert isinstance(other, SystemExit) and other.code == 2
