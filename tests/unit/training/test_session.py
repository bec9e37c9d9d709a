"""What surrounds the loop: room for checkpoints, how an interrupted run goes on, ends in order."""

import os
import shlex
from collections import namedtuple
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import SMALL, plain_engine

from polyglu.config_file import load_config
from polyglu.errors import Interrupted, PolygluError
from polyglu.model.config import TrainConfig, TrainingSection, WandbSection
from polyglu.training import session as session_module
from polyglu.training.checkpoint import RESUME_FOLDER
from polyglu.training.session import apply_determinism, check_room, saying_how_to_go_on, session

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)


# --- room


@pytest.mark.parametrize(("keep", "there", "new"), [(2, 0, 3), (2, 1, 2), (2, 3, 1), (2, 9, 1), (5, 2, 4)])
def test_a_run_whose_checkpoints_would_not_fit_is_refused(tmp_path: Path, keep: int, there: int, new: int) -> None:
    for step in range(there):
        (tmp_path / RESUME_FOLDER / f"step_{step:08d}").mkdir(parents=True)
    needed = new * 3 * 10**9 + 10**9
    with patch("shutil.disk_usage", lambda _: Usage(0, 0, needed)):
        check_room(tmp_path, 3 * 10**9, keep)
    with patch("shutil.disk_usage", lambda _: Usage(0, 0, needed - 10**7)), pytest.raises(PolygluError) as raised:
        check_room(tmp_path, 3 * 10**9, keep)
    said = f"has {(needed - 10**7) / 1e9:.2f} GB free, the run needs at least {needed / 1e9:.2f} GB there"
    assert said in str(raised.value) and "training.checkpoint_dir" in str(raised.value)


def config_of(folder: Path) -> TrainConfig:
    section = TrainingSection(checkpoint_dir=str(folder / "checkpoints"), run_dir=str(folder / "run"))
    return TrainConfig(model=SMALL, training=section, wandb=WandbSection(mode="disabled"))


@pytest.mark.parametrize("fault", ["no room", "in the loop"])
def test_metrics_are_closed_and_handlers_put_back_however_a_session_ends(tmp_path: Path, fault: str) -> None:
    import signal

    before, opened, closed = signal.getsignal(signal.SIGTERM), session_module.open_metrics, []

    def noting(*arguments: Any) -> Any:
        metrics = opened(*arguments)
        assert metrics is not None
        close = metrics.close
        metrics.close = lambda: closed.append(close())  # type: ignore[method-assign]
        return metrics

    free = 10 if fault == "no room" else 10**12
    with (
        patch.object(session_module, "open_metrics", noting),
        patch("polyglu.training.journal.peak_flops", lambda *_: 1.0),
        patch("shutil.disk_usage", lambda _: Usage(0, 0, free)),
        pytest.raises(PolygluError, match="needs at least" if fault == "no room" else "in the loop"),
        session(config_of(tmp_path), plain_engine(), 10, None, {}),
    ):
        raise PolygluError("in the loop")
    assert closed == [None] and signal.getsignal(signal.SIGTERM) is before


def test_deterministic_kernels_are_a_matter_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        apply_determinism(TrainingSection())
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        apply_determinism(TrainingSection(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


# --- how to go on


def said(verb: str, config: Path, overrides: list[str]) -> str:
    with pytest.raises(Interrupted) as raised, saying_how_to_go_on(verb, config, overrides):
        raise Interrupted("stopped after step 3, saved in x.")
    sentence, command = str(raised.value).split(" Go on with: ")
    assert sentence == "stopped after step 3, saved in x."
    return command


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1, max_size=8), max_size=3))
def test_the_command_is_the_same_run_to_any_shell(values: list[str]) -> None:
    overrides = [f"wandb.name={value}" for value in values]
    command = shlex.split(said("train", Path("my configs/a b.yaml"), [*overrides, "training.resume_from=old"]))
    settings = [part for override in [*overrides, "training.resume_from=auto"] for part in ("--set", override)]
    assert command == ["polyglu", "train", "--config", "my configs/a b.yaml", *settings]


def test_the_command_resumes_whatever_the_config_says(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {resume_from: somewhere, seed: 3}\n")
    command = shlex.split(said("train", tmp_path / "a.yaml", ["training.seed=4", "training.resume_from=old"]))
    overrides = [command[place + 1] for place, part in enumerate(command) if part == "--set"]
    settings = load_config(TrainConfig, Path(command[command.index("--config") + 1]), overrides).training
    assert (settings.resume_from, settings.seed) == ("auto", 4)


@pytest.mark.parametrize(("verb", "module"), [("train", "src.training.train"), ("sft", "src.sft.sft")])
def test_a_launched_run_goes_on_with_as_many_ranks(verb: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "8"), ("CROSS_SIZE", "1")):
        monkeypatch.setenv(name, value)
    expected = f"deepspeed --num_gpus=8 -m {module} --config a.yaml --set training.resume_from=auto"
    assert said(verb, Path("a.yaml"), []) == expected


def test_several_machines_are_named_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's arguments, as the hostfile, are not known to a rank."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "8"), ("CROSS_SIZE", "2")):
        monkeypatch.setenv(name, value)
    end = r"on all machines, with training\.resume_from: auto\.$"
    with pytest.raises(Interrupted, match=end) as raised, saying_how_to_go_on("train", Path("a.yaml"), []):
        raise Interrupted("stopped.")
    assert "--num_gpus" not in str(raised.value)


def test_other_ranks_leave_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised, saying_how_to_go_on("train", Path("a.yaml"), []):
        raise Interrupted("stopped.")
    assert raised.value.code == 75


def test_other_errors_pass() -> None:
    with pytest.raises(PolygluError, match=r"^bad$"), saying_how_to_go_on("train", Path("a.yaml"), []):
        raise PolygluError("bad")
