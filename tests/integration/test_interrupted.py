"""A run that is asked to stop: it ends its step, saves, says how to go on, and what goes on has the same bits."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from support import random_documents, write_token_source

from polyglu.config_file import validate
from polyglu.errors import EXIT_INTERRUPTED, Interrupted
from polyglu.model.config import TrainConfig
from polyglu.training import saver, session
from polyglu.training import train as train_module
from polyglu.training.checkpoint import newest_whole, read_resume_point
from polyglu.training.train import train

ROOT = Path(__file__).parents[2]
STEPS = 60


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    write_token_source(tmp_path / "data", random_documents(np.random.default_rng(0), 6000))
    return {
        "model": {
            "vocab_size": 64, "d_model": 16, "d_ff": 24, "n_layers": 1, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 8,
            "seq_length": 32, "routing_scope": "causal",
        },
        "data": {"sources": {"a": {"path": str(tmp_path / "data"), "mix": 1.0, "mix_end": 1.0}}},
        "training": {
            "total_steps": STEPS, "micro_batch_size": 2, "grad_accum_steps": 2, "learning_rate": 3e-3,
            "warmup_steps": 3, "precision": "fp32", "log_every": 1, "checkpoint_every": STEPS,
            "checkpoint_dir": str(tmp_path / "checkpoints"), "run_dir": str(tmp_path / "run"),
        },
        "wandb": {"mode": "disabled"},
    }  # fmt: skip


def changed(values: dict[str, Any], **training: Any) -> TrainConfig:
    return validate(TrainConfig, {**values, "training": {**values["training"], **training}}, source="test")


def metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def bits(folder: Path) -> list[tuple[float, ...]]:
    return [(row["step"], row["train/loss"], row["train/grad_norm"], row["train/tau"]) for row in metrics(folder)]


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (torch.load(path, weights_only=True)["model"] for path in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def until(process: subprocess.Popen[str], arrived: Any) -> None:
    deadline = time.monotonic() + 120
    while not arrived():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.005)


@pytest.mark.timeout(300)
def test_the_command_that_is_named_goes_on_to_the_same_bits(values: dict[str, Any], tmp_path: Path) -> None:
    """Ctrl-C, then SIGTERM, then nothing: a person's terminal and a machine that is taken away."""
    train(changed(values, checkpoint_dir=str(tmp_path / "whole"), run_dir=str(tmp_path / "whole_run")))
    config = tmp_path / "my config.yaml"
    config.write_text(yaml.safe_dump(values))
    command = shlex.join(["polyglu", "train", "--config", str(config), "--set", "training.resume_from=null"])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = 0
    for number in (signal.SIGINT, signal.SIGTERM, None):
        with subprocess.Popen(
            shlex.split(command), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            if number is not None:
                until(process, lambda seen=done: len(metrics(tmp_path / "run")) > seen + 2)
                process.send_signal(number)
            _, said = process.communicate()
        if number is None:
            assert process.returncode == 0, said
            continue
        assert process.returncode == EXIT_INTERRUPTED, said
        done = len(metrics(tmp_path / "run"))
        folder = tmp_path / f"checkpoints/ds_checkpoint/step_{done:08d}"
        (sentence,) = [line for line in said.splitlines() if line.startswith("interrupted: ")]
        assert sentence.startswith(f"interrupted: stopped after step {done}, saved in {folder}. Go on with: polyglu ")
        assert f"{number.name}: finishing the step, then saving" in said and "Traceback" not in said
        assert read_resume_point(folder).state.step == done < STEPS
        command = sentence.split("Go on with: ")[1]
    assert bits(tmp_path / "run") == bits(tmp_path / "whole_run")
    assert_same_weights(tmp_path / "whole/portable_final.pt", tmp_path / "checkpoints/portable_final.pt")


def test_a_signal_before_the_first_step_saves_where_the_run_is(values: dict[str, Any], tmp_path: Path) -> None:
    open_metrics = session.open_metrics

    def asked(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return open_metrics(*arguments)

    with patch.object(session, "open_metrics", asked), pytest.raises(Interrupted, match="stopped after step 0, saved"):
        train(changed(values, total_steps=3))
    point = newest_whole(tmp_path / "checkpoints/ds_checkpoint")
    assert point is not None and point.state.step == 0 and metrics(tmp_path / "run") == []
    train(changed(values, total_steps=3, resume_from="auto"))
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_signal_during_a_save_leaves_that_save_and_the_last_step_whole(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """The save is slow: the step in hand ends before it does, and has to be saved too."""
    write, begun = saver.write_shard, []

    def slow(*arguments: Any) -> None:
        begun.append(threading.current_thread().name)
        if len(begun) == 2:  # the one due after step 2
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        write(*arguments)

    with patch.object(saver, "write_shard", slow), pytest.raises(Interrupted) as raised:
        train(changed(values, checkpoint_every=2, keep_checkpoints=5))
    folders = sorted((tmp_path / "checkpoints/ds_checkpoint").iterdir())
    steps = [read_resume_point(folder).state.step for folder in folders]  # every one verifies, nothing else is there
    assert steps[:2] == [0, 2] and str(raised.value) == f"stopped after step {steps[-1]}, saved in {folders[-1]}."
    assert set(begun) == {"save"} and len(metrics(tmp_path / "run")) == steps[-1] < STEPS


def test_a_signal_in_the_last_step_ends_the_run_as_usual(values: dict[str, Any], tmp_path: Path) -> None:
    temperature = train_module.temperature

    def asked(step: int, *rest: Any) -> float:
        if step == 2:  # of the last step
            os.kill(os.getpid(), signal.SIGTERM)
        return temperature(step, *rest)

    before = signal.getsignal(signal.SIGTERM)
    with patch.object(train_module, "temperature", asked):
        final = train(changed(values, total_steps=3))
    assert final.exists() and signal.getsignal(signal.SIGTERM) is before


def test_a_run_in_another_thread_takes_no_signals(values: dict[str, Any], tmp_path: Path) -> None:
    """As in a notebook or a service, whose signals are its own."""
    before, finals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], []
    thread = threading.Thread(target=lambda: finals.append(train(changed(values, total_steps=2))))
    thread.start()
    thread.join()
    assert finals == [tmp_path / "checkpoints/portable_final.pt"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
