"""Kill training at seeded moments, resume it, and compare every bit with those of an uninterrupted run.

    python tests/integration/torture.py FOLDER --kills 200 --seed 0 --ranks 0        plain engine
    python tests/integration/torture.py FOLDER --kills 200 --seed 0 --ranks 2        DeepSpeed ZeRO-2

A scenario is one run, killed up to five times in a row and then left alone. Of every step that was ever trained,
whichever process did it, these are compared: loss, gradient norm, the batch's hash, the parameters' hash; at the end
the metrics, the final weights and the newest resume checkpoint.

Moments: before or after the update of a step; a number of bytes into a shard; a call into the system that touches a
file (open, write, flush, fsync, rename, removal ... of a save, of its pruning, of a resume); between a checkpoint's
rename and what follows; a time.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import numpy as np
import torch
from fork_ranks import start_ranks, wait_for  # puts the folder of support on the path
from support import random_documents, write_token_source

from polyglu.config_file import validate
from polyglu.data.dataloader import MicroBatch
from polyglu.logs import configure_logging
from polyglu.model.config import TrainConfig
from polyglu.training import checkpoint, saver
from polyglu.training import train as train_module
from polyglu.training.loss import LossParts

ROOT = Path(__file__).parents[2]
STEPS, ROWS = 18, 4
MODEL = {
    "vocab_size": 64, "d_model": 16, "d_ff": 24, "n_layers": 2, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 8,
    "seq_length": 16, "routing_scope": "causal",
}  # fmt: skip
CALLS = {
    "read", "write", "flush", "fsync", "replace", "rename", "unlink", "rmdir", "stat", "mkdir", "open", "scandir",
    "safe_open",
}  # fmt: skip
KINDS = ("before update", "after update", "byte", "call", "committed", "time")


def config_of(folder: Path, data: Path, ranks: int) -> TrainConfig:
    """A run of a few seconds that saves often."""
    values = {
        "model": MODEL,
        "data": {
            "sources": {
                "a": {"path": str(data / "a"), "mix": 0.7, "mix_end": 0.9},
                "b": {"path": str(data / "b"), "mix": 0.3, "mix_end": 0.1},
            }
        },
        "training": {
            "total_steps": STEPS, "micro_batch_size": 1, "grad_accum_steps": ROWS // max(1, ranks), "warmup_steps": 3,
            "learning_rate": 3e-3, "precision": "fp32", "log_every": 1, "checkpoint_every": 3,
            "portable_checkpoint_every": 6, "resume_from": "auto",
            "checkpoint_dir": str(folder / "checkpoints"), "run_dir": str(folder / "run"),
            "deepspeed_config": str(ROOT / "configs/ds_config.json"),
        },
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    return validate(TrainConfig, values, source="torture")


class Recorded:
    """Mixed into an engine: writes down each step's bits, and dies at a moment."""

    record: Path
    moment: dict[str, Any]
    dies: bool
    steps_left: int

    def forward(self, batch: MicroBatch, *rest: Any) -> LossParts:
        parts: LossParts = super().forward(batch, *rest)  # type: ignore[misc]
        self.batches.append(digest([batch.input_ids, batch.targets, batch.cu_seqlens, batch.sample_ids]))
        self.samples += batch.sample_ids.tolist()
        self.losses.append(float(parts.loss.detach()).hex())
        return parts

    def step(self, learning_rate: float) -> float:
        self.steps_left -= 1
        if self.steps_left == 0:
            self.die("before update")
        norm: float = super().step(learning_rate)  # type: ignore[misc]
        parameters = digest([parameter.detach() for parameter in self.loss.model.parameters()])  # type: ignore[attr-defined]
        row = {"samples": self.samples, "losses": self.losses, "norm": norm.hex(), "batches": self.batches}
        line = json.dumps({**row, "parameters": parameters}) + "\n"
        with open(self.record, "ab", buffering=0) as file:
            file.write(line.encode())
        self.clear()
        if self.steps_left == 0:
            self.die("after update")
        return norm

    def clear(self) -> None:
        self.batches: list[str] = []
        self.samples: list[int] = []
        self.losses: list[str] = []

    def die(self, kind: str) -> None:
        if self.moment["kind"] == kind and self.dies:
            os.kill(os.getpid(), signal.SIGKILL)


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:24]


class DyingFile:
    """A file that kills the process once a number of bytes is on its way to the disk."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.file.write(view[: max(0, self.left)])
        self.left -= len(view)
        if self.left <= 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return len(view)


def prepare_to_die(moment: dict[str, Any]) -> None:
    """Arm a moment that lies outside the engine."""
    if moment["kind"] == "byte":
        write_shard, saves = saver.write_shard, iter(range(moment["number"]))

        def write(file: BinaryIO, pieces: Any) -> None:
            last = next(saves, None) is None
            write_shard(DyingFile(file, moment["bytes"]) if last else file, pieces)  # type: ignore[arg-type]

        saver.write_shard = write
    elif moment["kind"] == "committed":
        commit, commits = checkpoint.commit, iter(range(moment["number"]))

        def committed(*arguments: Any) -> None:
            commit(*arguments)
            if next(commits, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        saver.commit = committed
    elif moment["kind"] == "call":
        counted = 0

        def watch(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal counted
            if event in ("c_call", "c_return") and getattr(argument, "__name__", "") in CALLS:
                counted += 1
                if counted == moment["number"]:
                    os.kill(os.getpid(), signal.SIGKILL)

        threading.setprofile(watch)
        sys.setprofile(watch)
    elif moment["kind"] == "time":

        def die_later() -> None:
            time.sleep(moment["seconds"])
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=die_later, daemon=True).start()


def draw_moment(generator: random.Random, ranks: int, seconds: float) -> dict[str, Any]:
    kind = generator.choice(KINDS)
    return {
        "kind": kind,
        "rank": generator.randrange(max(1, ranks)) if kind != "committed" else 0,
        "step": generator.randrange(1, STEPS),
        "number": generator.randrange(1, 700) if kind == "call" else generator.randrange(0, 4),
        "bytes": generator.choice([1, 8, 9, 1000, generator.randrange(1, 40_000)]),
        "seconds": generator.random() * seconds,
    }


def attempt(folder: Path, data: Path, ranks: int, moment: dict[str, Any] | None) -> list[int]:
    """Train in processes of their own, one of which may die; return their exit codes."""

    def work(rank: int) -> None:
        configure_logging(rank)
        dies = moment is not None and moment["rank"] == rank
        create_engine = train_module.create_engine

        def create(*arguments: Any) -> Any:
            engine = create_engine(*arguments)
            engine.__class__ = type("RecordedEngine", (Recorded, type(engine)), {})
            engine.record, engine.moment, engine.dies = folder / f"record_{rank}.jsonl", moment or {"kind": ""}, dies
            engine.steps_left = moment["step"] if moment else -1
            engine.clear()
            return engine

        train_module.create_engine = create
        if moment is not None and dies:
            prepare_to_die(moment)
        train_module.train(config_of(folder, data, ranks))

    return wait_for(start_ranks(ranks, work, folder / "log.txt"), grace=0.1 if moment and moment["step"] % 2 else 0.0)


def steps_of(folder: Path, rank: int) -> dict[int, set[str]]:
    """Step (by its first sample) -> what was recorded of it, each different record once; a torn line is no record."""
    found: dict[int, set[str]] = {}
    for row in rows_of(folder / f"record_{rank}.jsonl"):
        found.setdefault(row["samples"][0] // ROWS, set()).add(json.dumps(row))
    return found


def rows_of(record: Path) -> list[dict[str, Any]]:
    """Steps that a rank trained, in the order of time, those that came twice included; a torn line is no step."""
    return [json.loads(line) for line in record.read_text().splitlines() if line.endswith("}")]


def write_data(folder: Path) -> None:
    """Two sources of random documents."""
    rng = np.random.default_rng(0)
    for name, size in (("a", 3000), ("b", 1500)):
        write_token_source(folder / name, random_documents(rng, size))


def outcome(folder: Path) -> dict[str, Any]:
    """What a finished run leaves: numbers of all steps, final weights, newest resume checkpoint."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    newest = folder / f"checkpoints/ds_checkpoint/step_{STEPS:08d}"
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.iterdir()}
    folders = sorted(path.name for path in newest.parent.iterdir())
    return {
        "metrics": [(row["step"], row["train/loss"], row["train/grad_norm"], row["train/tau"]) for row in rows],
        "final": hashlib.sha256((folder / "checkpoints/portable_final.pt").read_bytes()).hexdigest(),
        "portable": sorted(path.name for path in (folder / "checkpoints").glob("*.pt")),
        "newest": files,
        "folders": folders,
    }


def scenario(
    folder: Path, data: Path, ranks: int, generator: random.Random, kills_left: int, seconds: float
) -> Counter:
    """Kill a run up to five times, let it end; return how often each kind of moment killed it."""
    folder.mkdir()
    killed: Counter[str] = Counter()
    for _ in range(min(kills_left, generator.choice([3, 4, 5]))):
        moment = draw_moment(generator, ranks, seconds)
        codes = attempt(folder, data, ranks, moment)
        if -signal.SIGKILL in codes:
            killed[moment["kind"]] += 1
        elif any(codes):
            raise SystemExit(f"{folder}: {moment} ended with {codes}; see {folder / 'log.txt'}")
        else:
            break  # it was over before the moment came
    codes = attempt(folder, data, ranks, None)
    if any(codes):
        raise SystemExit(f"{folder}: the last resume ended with {codes}; see {folder / 'log.txt'}")
    return killed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=0, help="0: plain engine; else DeepSpeed's ranks")
    arguments = parser.parse_args()
    folder, ranks = arguments.folder, arguments.ranks
    torch.optim.AdamW([torch.zeros(1)])  # imports much, once and not in every fork
    if ranks:
        import deepspeed  # noqa: F401
    generator = random.Random(arguments.seed)
    write_data(folder / "data")
    (folder / "whole").mkdir()
    begun = time.perf_counter()
    codes = attempt(folder / "whole", folder / "data", ranks, None)
    seconds = time.perf_counter() - begun
    if any(codes):
        raise SystemExit(f"the uninterrupted run ended with {codes}; see {folder / 'whole/log.txt'}")
    expected = outcome(folder / "whole")
    whole = [steps_of(folder / "whole", rank) for rank in range(max(1, ranks))]
    assert all(sorted(steps) == list(range(STEPS)) for steps in whole)
    killed: Counter[str] = Counter()
    number = 0
    while killed.total() < arguments.kills:
        place = folder / f"killed_{number}"
        killed += scenario(place, folder / "data", ranks, generator, arguments.kills - killed.total(), seconds)
        for rank, steps in enumerate(whole):
            assert steps_of(place, rank) == steps, f"{place}: rank {rank} trained other bits"
        assert outcome(place) == expected, f"{place}: another outcome"
        number += 1
    print(json.dumps({"ranks": ranks, "runs": number, "kills": killed.total(), **killed, "seconds_a_run": seconds}))


if __name__ == "__main__":
    main()
