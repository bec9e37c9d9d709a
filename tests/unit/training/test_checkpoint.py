"""A run resumes from the newest checkpoint that is whole, whatever happened while one was written."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import ORDER, Malicious, Saved, SplitEngine, System, on_ranks, reseal

from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig
from polyglu.model.model import Checkpoint, create_model, save_portable
from polyglu.training import checkpoint
from polyglu.training.checkpoint import (
    FORMAT,
    MANIFEST,
    ResumePoint,
    abandon_after,
    check_fits,
    find_resume_point,
    newest_whole,
    read_resume_point,
    resume,
    set_aside,
)
from polyglu.training.guard import RunState
from polyglu.training.ranks import Ranks
from polyglu.training.shards import shard_name

SMALL = ModelConfig(vocab_size=16, d_model=8, d_ff=12, n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim=4, seq_length=8)
STATE = RunState(step=7, passed=3, skipped=2, bad_in_a_row=1, rollbacks=1, losses=(2.5, 0.1), wandb_id="abc")


def saved_steps(folder: Path, *steps: int, keep: int = 9) -> Saved:
    saved = Saved(folder, keep=keep)
    for step in steps:
        saved.save(step)
    assert not saved.told
    return saved


def point_of(found: Any) -> ResumePoint:
    assert isinstance(found, ResumePoint)
    return found


def newest(folder: Path) -> int | None:
    found = find_resume_point("auto", folder)
    return None if found is None else point_of(found).state.step


def test_manifest_says_all_of_the_run_and_of_each_shard(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    saved.save(STATE)
    folder = saved.root / "step_00000007"
    manifest = json.loads((folder / MANIFEST).read_text())
    reseal(folder)  # as documented: nothing that it says is changed by that
    assert json.loads((folder / MANIFEST).read_text()) == manifest
    assert manifest["format"] == FORMAT and manifest["engine"] == "split" and manifest["updates"] == 7
    point = read_resume_point(folder)
    assert (point.state, point.order, point.folder, len(point.shards)) == (STATE, ORDER, folder, 1)


def test_newest_is_resumed(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    saved = saved_steps(tmp_path, 5, 900, 1000)
    engine = SplitEngine(Ranks(torch.device("cpu")))
    assert resume(engine, find_resume_point("auto", tmp_path), ORDER, tmp_path) == RunState(step=1000, due=1000)
    assert engine.is_at(1000) and saved.names() == ["step_00000005", "step_00000900", "step_00001000"]


DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "truncated": lambda shard, manifest: shard.write_bytes(shard.read_bytes()[:-1]),
    "one bit": lambda shard, manifest: shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1])),
    "shard missing": lambda shard, manifest: shard.unlink(),
    "a folder for a shard": lambda shard, manifest: (shard.unlink(), shard.mkdir()),
    "no manifest": lambda shard, manifest: manifest.unlink(),
    "cut manifest": lambda shard, manifest: manifest.write_text(manifest.read_text()[:40]),
    "manifest of another kind": lambda shard, manifest: manifest.write_text("[]"),
    "another format": lambda shard, manifest: manifest.write_text(manifest.read_text().replace(FORMAT, "1")),
    "manifest changed": lambda shard, manifest: manifest.write_text(
        manifest.read_text().replace('"step": 20', '"step": 21')
    ),
    "a folder for the manifest": lambda shard, manifest: (manifest.unlink(), manifest.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_is_set_aside_and_said(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    saved = saved_steps(tmp_path, 10, 20)
    folder = saved.root / "step_00000020"
    DAMAGE[damage](folder / shard_name(0), folder / MANIFEST)
    with pytest.raises(PolygluError, match="step_00000020"):
        read_resume_point(folder)
    assert point_of(find_resume_point("auto", tmp_path, aside=False)).state.step == 10
    assert saved.names() == ["step_00000010", "step_00000020"]
    assert newest(tmp_path) == 10
    assert saved.names() == ["damaged_step_00000020", "step_00000010"]
    assert "step_00000020" in caplog.text and "Set aside as damaged_step_00000020." in caplog.text
    assert newest(tmp_path) == 10


def test_all_damaged_is_a_fresh_start_only_under_auto(tmp_path: Path) -> None:
    saved = saved_steps(tmp_path, 10)
    (saved.root / "step_00000010" / shard_name(0)).unlink()
    with pytest.raises(PolygluError, match="shard_00000.safetensors is missing; resume from another checkpoint"):
        find_resume_point(str(saved.root / "step_00000010"), tmp_path)
    with pytest.raises(PolygluError, match="holds no whole resume checkpoint"):
        find_resume_point(str(saved.root), tmp_path)
    assert newest(tmp_path) is None and saved.names() == ["damaged_step_00000010"]


def test_a_disk_that_cannot_be_read_or_written_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A bad sector under the newest one, and then a disk that is read-only besides: the one before it is resumed."""
    saved = saved_steps(tmp_path, 10, 20)
    reading = System()
    with reading.watching():
        read_resume_point(saved.root / "step_00000020")
    numbers = [number for number, (name, _) in enumerate(reading.calls) if name in ("open", "read", "readinto")]
    assert len(numbers) >= 4
    for number in numbers:
        with System(number, 5).watching(), pytest.raises(PolygluError, match="step_00000020 cannot be read"):
            read_resume_point(saved.root / "step_00000020")
    (saved.root / "step_00000020" / shard_name(0)).write_bytes(b"")
    looking = System()
    with looking.watching():
        assert point_of(newest_whole(saved.root)).state.step == 10
    rename = [name for name, _ in looking.calls].index("rename")
    (saved.root / "damaged_step_00000020").rename(saved.root / "step_00000020")
    with System(rename, 30).watching():
        assert point_of(newest_whole(saved.root)).state.step == 10
    assert saved.names() == ["step_00000010", "step_00000020"]
    assert "cannot be set aside: [Errno 30]" in caplog.text


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    saved = saved_steps(tmp_path, 10, 20)
    (saved.root / "step_00000020").rename(saved.root / "step_00000025.tmp")  # killed just before the rename
    assert newest(tmp_path) == 10


@pytest.mark.parametrize("keep", [2, 3])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    saved = Saved(tmp_path, keep=keep)
    for step in range(1, 7):
        saved.save(step)
        assert saved.names() == [f"step_{kept:08d}" for kept in range(max(1, step - keep + 1), step + 1)]


def test_pruning_keeps_the_newest_good_one_and_what_is_set_aside(tmp_path: Path) -> None:
    """Those of an interruption among bad steps are no use to a rollback."""
    saved = saved_steps(tmp_path, 10, 20)
    set_aside(saved.root / "step_00000010", "damaged")
    for step in (21, 22, 23):
        saved.save(RunState(step=step, bad_in_a_row=step - 20, due=20))
    kept = ["damaged_step_00000010", "step_00000020", "step_00000021", "step_00000022", "step_00000023"]
    assert saved.names() == kept
    saved.checkpoints.keep = 2
    saved.save(RunState(step=24, bad_in_a_row=4, due=20))
    assert saved.names() == ["damaged_step_00000010", "step_00000020", "step_00000023", "step_00000024"]
    saved.save(30)
    assert saved.names() == ["damaged_step_00000010", "step_00000024", "step_00000030"]


def test_names_of_what_is_set_aside_do_not_clash(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    for content in ("first", "second", "third"):
        (saved.root / "step_00000010").mkdir(parents=True)
        (saved.root / "step_00000010" / "content").write_text(content)
        set_aside(saved.root / "step_00000010", "damaged")
    assert saved.names() == [f"damaged_step_00000010{suffix}" for suffix in ("", ".2", ".3")]
    assert [(saved.root / name / "content").read_text() for name in saved.names()] == ["first", "second", "third"]


def test_what_another_course_of_the_run_saved_is_set_aside(tmp_path: Path) -> None:
    """Later steps, and the same step unless that was resumed: a rollback must not return to weights of that course."""
    saved, engine = saved_steps(tmp_path, 10, 20, 30), SplitEngine(Ranks(torch.device("cpu")))
    point = find_resume_point(str(saved.root / "step_00000020"), tmp_path)
    assert resume(engine, point, ORDER, tmp_path).step == 20 and engine.is_at(20)
    assert saved.names() == ["abandoned_step_00000030", "step_00000010", "step_00000020"]
    elsewhere = saved_steps(tmp_path / "elsewhere", 20)
    point = find_resume_point(str(elsewhere.root), tmp_path)
    assert resume(engine, point, ORDER, tmp_path).step == 20
    assert saved.names() == ["abandoned_step_00000020", "abandoned_step_00000030", "step_00000010"]
    assert elsewhere.names() == ["step_00000020"]
    assert resume(engine, None, ORDER, tmp_path) == RunState()
    assert saved.names() == [f"abandoned_step_000000{step}" for step in (10, 20, 30)]
    abandon_after(tmp_path / "nowhere", 0)


def test_a_run_that_begins_anew_takes_nothing_of_step_0(tmp_path: Path) -> None:
    saved, engine = saved_steps(tmp_path, 0), SplitEngine(Ranks(torch.device("cpu")))
    resume(engine, None, ORDER, tmp_path)
    assert saved.names() == ["abandoned_step_00000000"]


def test_what_resume_from_may_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's folder, the one above it, one of its steps, or a portable file; absolute or not."""
    saved = saved_steps(tmp_path, 10, 20)
    for given_path, step in ((saved.root, 20), (tmp_path, 20), (saved.root / "step_00000010", 10)):
        assert point_of(find_resume_point(str(given_path), tmp_path / "elsewhere")).state.step == step
    monkeypatch.chdir(tmp_path)
    point = find_resume_point("ds_checkpoint", tmp_path)
    resume(SplitEngine(Ranks(torch.device("cpu"))), point, ORDER, tmp_path)
    assert saved.names() == ["step_00000010", "step_00000020"]
    portable = tmp_path / "portable.pt"
    save_portable(portable, create_model(SMALL).state_dict(), SMALL, 15, 0.5, {"name": "t", "fingerprint": "f"})
    found = find_resume_point(str(portable), tmp_path)
    assert isinstance(found, Checkpoint) and found.step == 15
    with pytest.raises(PolygluError, match=r"training.resume_from: .*nowhere does not exist"):
        find_resume_point(str(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({**ORDER, "seed": 2}, "whose seed differ"),
        ({"seed": 1, "model": ORDER["model"]}, "whose sources differ"),
        ({**ORDER, "seed": 2, "samples_per_step": 8}, "whose samples_per_step, seed differ.*set grad_accum_steps"),
    ],
)
def test_another_run_is_refused_before_anything_is_loaded(tmp_path: Path, order: Any, message: str) -> None:
    saved, engine = saved_steps(tmp_path, 10, 20), SplitEngine(Ranks(torch.device("cpu")))
    with pytest.raises(PolygluError, match=message):
        resume(engine, find_resume_point(str(saved.root / "step_00000010"), tmp_path), order, tmp_path)
    assert engine.is_at(0) and saved.names() == ["step_00000010", "step_00000020"]


def test_an_order_is_the_same_read_back(tmp_path: Path) -> None:
    saved = saved_steps(tmp_path, 10)
    check_fits(read_resume_point(saved.root / "step_00000010"), {**ORDER, "sources": (("a", "digest"),)})


def test_another_model_is_refused(tmp_path: Path) -> None:
    saved = saved_steps(tmp_path, 10)
    saved.engine.loss.model["fourth"] = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(PolygluError, match="does not hold all of weight/fourth"):
        checkpoint.restore(saved.engine, read_resume_point(saved.root / "step_00000010"))


@pytest.mark.parametrize("kind", ["shard", "files of DeepSpeed"])
def test_a_malicious_file_with_a_matching_manifest_is_never_executed(tmp_path: Path, kind: str) -> None:
    saved, trace = saved_steps(tmp_path, 10), tmp_path / "trace"
    folder = saved.root / "step_00000010"
    if kind == "shard":
        (folder / shard_name(0)).write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    else:
        (saved.root / "latest").write_text("step_00000010")
        for name in ("state.pt", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            torch.save({"module": Malicious(trace)}, folder / name)
    reseal(folder)
    engine, point = SplitEngine(Ranks(torch.device("cpu"))), find_resume_point(str(saved.root), tmp_path)
    if kind == "shard":
        with pytest.raises(PolygluError, match="shard_00000.safetensors is no shard of a checkpoint"):
            resume(engine, point, ORDER, tmp_path)
    else:
        resume(engine, point, ORDER, tmp_path)
        assert engine.is_at(10)
    assert not trace.exists()


def test_a_fault_that_rank_0_finds_ends_all_ranks(tmp_path: Path) -> None:
    saved = saved_steps(tmp_path, 10)

    def look(ranks: Ranks) -> None:
        ranks.agree(lambda: find_resume_point(str(saved.root / "nothing"), tmp_path))

    error, *others = on_ranks(4, look)
    assert isinstance(error, PolygluError) and all(isinstance(other, SystemExit) for other in others)
