"""A run resumes from the newest checkpoint that is whole, whatever happened while one was written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polyglu.data.dataloader import MicroBatch
from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig, TrainingSection
from polyglu.model.model import Checkpoint, create_model, save_portable
from polyglu.training import checkpoint
from polyglu.training.checkpoint import (
    MANIFEST,
    RESUME_FOLDER,
    ResumePoint,
    find_resume_point,
    resume,
    save_resume_point,
)
from polyglu.training.engine import PlainEngine
from polyglu.training.loss import LanguageModelLoss

ORDER = {"seed": 1, "sources": {"a": "digest"}}
SMALL = ModelConfig(vocab_size=16, d_model=8, d_ff=12, n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim=4, seq_length=8)


class FakeEngine:
    """Saves a line of text in a file of a sub-folder."""

    def __init__(self, content: str = "state", name: str = "plain", world_size: int = 1) -> None:
        self.content, self.name, self.world_size, self.rank = content, name, world_size, 0
        self.fails = False

    def barrier(self) -> None:
        pass

    def save(self, folder: Path) -> None:
        assert not (folder / MANIFEST).exists()
        assert folder.name.endswith(".tmp")
        (folder / "state").mkdir()
        (folder / "state" / "half.txt").write_text("written before the end")
        if self.fails:
            raise OSError("no space left on device")
        (folder / "state" / "weights.txt").write_text(self.content)

    def load(self, folder: Path) -> None:
        self.content = (folder / "state" / "weights.txt").read_text()


def save(checkpoint_dir: Path, step: int, keep: int = 2, engine: Any = None) -> Path:
    save_resume_point(engine or FakeEngine(f"step {step}"), checkpoint_dir, step, ORDER, keep)
    return checkpoint_dir / RESUME_FOLDER / f"step_{step:08d}"


def names(checkpoint_dir: Path) -> list[str]:
    return sorted(entry.name for entry in (checkpoint_dir / RESUME_FOLDER).iterdir())


def newest(checkpoint_dir: Path) -> int | None:
    point = find_resume_point("auto", checkpoint_dir)
    assert point is None or isinstance(point, ResumePoint)
    return None if point is None else point.step


def test_manifest_names_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["files"].keys() == {"state/half.txt", "state/weights.txt"}
    assert {key: manifest[key] for key in manifest if key != "files"} == {
        "step": 10, "engine": "plain", "world_size": 1, "order": ORDER,
    }  # fmt: skip


def test_newest_is_resumed(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for step in (5, 900, 1000):
        save(tmp_path, step, keep=3)
    engine = FakeEngine()
    assert resume(engine, find_resume_point("auto", tmp_path), ORDER) == 1000  # type: ignore[arg-type]
    assert engine.content == "step 1000"


@pytest.mark.parametrize(
    "fault", ["truncated", "one bit", "file missing", "no manifest", "cut manifest", "manifest of another kind"]
)
def test_damaged_is_passed_over_and_said(tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    folder = save(tmp_path, 20)
    state, manifest = folder / "state/weights.txt", folder / MANIFEST
    if fault == "truncated":
        state.write_bytes(state.read_bytes()[:-1])
    elif fault == "one bit":
        state.write_bytes(bytes([state.read_bytes()[0] ^ 1]) + state.read_bytes()[1:])
    elif fault == "file missing":
        state.unlink()
    elif fault == "no manifest":
        manifest.unlink()
    elif fault == "cut manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text("[]")
    assert newest(tmp_path) == 10
    assert "passing over a damaged checkpoint" in caplog.text and "step_00000020" in caplog.text
    with pytest.raises(PolygluError, match="step_00000020"):
        checkpoint.read_resume_point(folder)


def test_all_damaged_is_a_fresh_start_only_under_auto(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    (folder / "state/weights.txt").unlink()
    assert newest(tmp_path) is None
    with pytest.raises(PolygluError, match="holds no whole resume checkpoint"):
        find_resume_point(str(folder.parent), tmp_path)


def test_save_that_fails_leaves_the_one_before_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    engine = FakeEngine()
    engine.fails = True
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 20, engine=engine)
    assert names(tmp_path) == ["step_00000010", "step_00000020.tmp"]
    assert newest(tmp_path) == 10


def test_save_cut_off_before_its_manifest_leaves_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest comes last: when it is being written, every other file is there."""
    save(tmp_path, 10)

    def killed(path: Path, manifest: Any) -> None:
        assert {str(file.relative_to(path.parent)) for file in path.parent.rglob("*") if file.is_file()} == set(
            manifest["files"]
        )
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "write_json", killed)
        save(tmp_path, 20)
    assert newest(tmp_path) == 10
    save(tmp_path, 20)
    assert names(tmp_path) == ["step_00000010", "step_00000020"]
    assert newest(tmp_path) == 20


def test_left_over_saves_are_ignored_and_removed_and_not_counted(tmp_path: Path) -> None:
    save(tmp_path, 10)
    whole = save(tmp_path, 20)
    left_over = whole.with_name("step_00000025.tmp")
    whole.rename(left_over)  # as if the machine had died just before the rename
    assert newest(tmp_path) == 10
    save(tmp_path, 30)
    assert names(tmp_path) == ["step_00000010", "step_00000030"]


@pytest.mark.parametrize("keep", [2, 3])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=keep)
        assert names(tmp_path) == [f"step_{kept:08d}" for kept in range(max(1, step - keep + 1), step + 1)]


def test_pruning_leaves_later_steps_of_another_run(tmp_path: Path) -> None:
    save(tmp_path, 100)
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_00000020", "step_00000030", "step_00000100"]


def test_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10, engine=FakeEngine("old"))
    save(tmp_path, 10, engine=FakeEngine("new"))
    engine = FakeEngine()
    resume(engine, find_resume_point("auto", tmp_path), ORDER)  # type: ignore[arg-type]
    assert (engine.content, names(tmp_path)) == ("new", ["step_00000010"])


def test_what_resume_from_may_name(tmp_path: Path) -> None:
    """The guide's folder, the one above it, one of its steps, or a portable file."""
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    for given, step in ((second.parent, 20), (tmp_path, 20), (first, 10)):
        point = find_resume_point(str(given), tmp_path / "elsewhere")
        assert isinstance(point, ResumePoint) and point.step == step
    portable = tmp_path / "portable.pt"
    save_portable(portable, create_model(SMALL).state_dict(), SMALL, 15, 0.5, {"name": "t", "fingerprint": "f"})
    found = find_resume_point(str(portable), tmp_path)
    assert isinstance(found, Checkpoint) and found.step == 15
    assert resume(FakeEngine(), found, ORDER) == resume(FakeEngine(), None, ORDER) == 0  # type: ignore[arg-type]
    with pytest.raises(PolygluError, match=r"training.resume_from: .*nowhere does not exist"):
        find_resume_point(str(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize(
    ("engine", "order", "message"),
    [
        (FakeEngine(name="deepspeed"), ORDER, "written by the plain engine on 1 rank.* uses the deepspeed engine on 1"),
        (FakeEngine(world_size=2), ORDER, "this run uses the plain engine on 2"),
        (FakeEngine(), {**ORDER, "seed": 2}, "whose seed differ"),
        (FakeEngine(), {"seed": 1}, "whose sources differ"),
        (FakeEngine(), {**ORDER, "seq_length": 8}, "whose seq_length differ"),
    ],
)
def test_another_run_is_refused_before_anything_is_loaded(
    tmp_path: Path, engine: FakeEngine, order: dict[str, Any], message: str
) -> None:
    save(tmp_path, 10)
    with pytest.raises(PolygluError, match=message):
        resume(engine, find_resume_point("auto", tmp_path), order)  # type: ignore[arg-type]
    assert engine.content == "state"


def plain_engine(seed: int) -> PlainEngine:
    loss = LanguageModelLoss(create_model(SMALL, seed), torch.float32, recompute=False)
    return PlainEngine(loss, TrainingSection(), torch.device("cpu"))


def train_steps(engine: PlainEngine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(step))
        bounds = torch.tensor([0, 8, 16], dtype=torch.int32)
        loss, _ = engine.forward(MicroBatch(ids[:, :-1], ids[:, 1:], bounds, torch.arange(2)), 0.5, None)
        engine.backward(loss / 16)
        losses += [float(loss.detach()), engine.step(1e-2)]
    return losses


def test_plain_engine_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Weights and both moments of the optimiser come back."""
    whole = plain_engine(seed=0)
    train_steps(whole, range(3))
    save_resume_point(whole, tmp_path, 3, ORDER, keep=2)
    expected = train_steps(whole, range(3, 6))
    resumed = plain_engine(seed=1)
    assert resume(resumed, find_resume_point("auto", tmp_path), ORDER) == 3
    assert train_steps(resumed, range(3, 6)) == expected
    weights = resumed.loss.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.loss.model.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"),
    [("order", None), ("step", "x"), ("step", -1), ("step", 1.5), ("step", None), ("files", {}), ("world_size", "2")],
)
def test_manifest_of_wrong_values_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = save(tmp_path, 3) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(PolygluError, match=rf"manifest\.json: {key}.*; resume from another checkpoint"):
        find_resume_point(str(path.parent), tmp_path)
    assert find_resume_point("auto", tmp_path) is None
