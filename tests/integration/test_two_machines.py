"""Two machines, one rank each: two network namespaces with a virtual cable between them, a hostfile, no ssh.

Where the system does not allow namespaces, both are nodes on this machine, which meet on its loopback device.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import free_port, random_documents, write_token_source

from polyglu.config_file import validate
from polyglu.errors import EXIT_INTERRUPTED
from polyglu.model.config import TrainConfig
from polyglu.training.train import train

ROOT = Path(__file__).parents[2]
STEPS = 100
LOSS_TOLERANCE = 1e-4
"""Nats by which two ranks may differ from one: sums in another order."""


@dataclass(frozen=True)
class Machine:
    """A node of the run: what to put before a command, so that it runs there, and what its processes must know."""

    enter: list[str]
    environment: dict[str, str]

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path} | self.environment
        return subprocess.Popen([*self.enter, *command], cwd=ROOT, env=environment)

    def run(self, *command: str) -> None:
        subprocess.run([*self.enter, *command], check=True)


@pytest.fixture
def machines() -> Iterator[tuple[list[Machine], str]]:
    """Two machines, and the address under which the second one finds the first."""
    if subprocess.run(["sh", "-c", "unshare --user --map-root-user --net ip link set lo up"], check=False).returncode:
        yield [Machine([], {}), Machine([], {})], "127.0.0.1"
        return
    with ExitStack() as stack:
        first = keep_namespace(stack, ["unshare", "--user", "--map-root-user", "--net"])
        here = ["nsenter", f"--target={first}", "--user", "--net", "--preserve-credentials"]
        second = keep_namespace(stack, [*here, "unshare", "--net"])
        pids = (first, second)
        both = [
            Machine(
                ["nsenter", f"--target={pid}", "--user", "--net", "--preserve-credentials"],
                {"GLOO_SOCKET_IFNAME": "cable"},
            )
            for pid in pids
        ]
        both[0].run(*f"ip link add cable type veth peer name cable netns {second}".split())
        for number, machine in enumerate(both, start=1):
            machine.run(*f"ip address add 10.0.0.{number}/24 dev cable".split())
            for device in ("lo", "cable"):
                machine.run(*f"ip link set {device} up".split())
        yield both, "10.0.0.1"


def keep_namespace(stack: ExitStack, command: list[str]) -> int:
    """Start a process in a namespace that lasts as long as it does; return its id."""
    process = stack.enter_context(
        subprocess.Popen([*command, "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE)
    )
    stack.callback(process.kill)
    assert process.stdout is not None
    process.stdout.readline()
    return process.pid


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    write_token_source(tmp_path / "data", random_documents(np.random.default_rng(0), 6000))
    return {
        "model": {
            "vocab_size": 64, "d_model": 32, "d_ff": 48, "n_layers": 2, "n_q_heads": 4, "n_kv_heads": 2, "head_dim": 8,
            "seq_length": 32, "routing_scope": "causal",
        },
        "data": {"sources": {"a": {"path": str(tmp_path / "data"), "mix": 1.0, "mix_end": 1.0}}},
        "training": {
            "total_steps": STEPS,
            "micro_batch_size": 2,
            "grad_accum_steps": 1,
            "learning_rate": 3e-3,
            "warmup_steps": 3,
            "precision": "fp32",
            "log_every": 1,
            "checkpoint_every": STEPS,
            "checkpoint_dir": str(tmp_path / "checkpoints"),
            "run_dir": str(tmp_path / "run"),
            "resume_from": "auto",
            "deepspeed_config": str(ROOT / "configs/ds_config.json"),
        },
        "wandb": {"mode": "disabled"},
    }  # fmt: skip


def metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.mark.timeout(600)
def test_a_signal_to_one_machine_stops_both_and_one_goes_on(
    values: dict[str, Any], tmp_path: Path, machines: tuple[list[Machine], str]
) -> None:
    alone = {"checkpoint_dir": str(tmp_path / "alone"), "run_dir": str(tmp_path / "alone_run"), "grad_accum_steps": 2}
    train(validate(TrainConfig, {**values, "training": {**values["training"], **alone}}, "test"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "hostfile").write_text("first slots=1\nsecond slots=1\n")
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    trainer = ["-m", "src.training.train", "--config", str(tmp_path / "config.yaml")]

    nodes, address = machines
    port = free_port()  # others may train on this machine, on the usual one
    meeting = [f"--hostfile={tmp_path / 'hostfile'}", "--no_ssh", f"--master_addr={address}", f"--master_port={port}"]
    running = [node.start([deepspeed, *meeting, f"--node_rank={rank}", *trainer]) for rank, node in enumerate(nodes)]
    deadline = time.monotonic() + 600
    while len(metrics(tmp_path / "run")) < 3:
        assert time.monotonic() < deadline and all(node.poll() is None for node in running)
        time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    assert [node.wait(120) for node in running] == [EXIT_INTERRUPTED] * 2
    done = len(metrics(tmp_path / "run"))
    assert 3 <= done < STEPS

    on_one = {**values["training"], "grad_accum_steps": 2}
    train(validate(TrainConfig, {**values, "training": on_one}, "test"))
    rows, expected = metrics(tmp_path / "run"), metrics(tmp_path / "alone_run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, wanted in zip(rows, expected, strict=True):
        assert row["train/loss"] == pytest.approx(wanted["train/loss"], abs=LOSS_TOLERANCE)
