"""``polyglu train --dry-run``: every fault of the input before the first step, nothing written, bits compared."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from commands import call, contents
from support import free_port, random_documents, retokenized, write_token_source

from polyglu import cli
from polyglu.training import dry_run, preflight, saver, trial

ROOT = Path(__file__).parents[2]


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for seed, (name, size) in enumerate({"a": 6000, "b": 3000}.items()):
        write_token_source(tmp_path / "data" / name, random_documents(np.random.default_rng(seed), size))
    shutil.copy(ROOT / "configs/ds_config.json", tmp_path)
    shares = {"a": (0.7, 0.9), "b": (0.3, 0.1)}
    return {
        "model": {
            "vocab_size": 64, "d_model": 32, "d_ff": 48, "n_layers": 2, "n_q_heads": 4, "n_kv_heads": 2, "head_dim": 8,
            "seq_length": 32, "routing_scope": "causal",
        },
        "data": {
            "sources": {
                name: {"path": f"{tmp_path}/data/{name}", "mix": mix, "mix_end": end}
                for name, (mix, end) in shares.items()
            }
        },
        "training": {
            "total_steps": 20, "micro_batch_size": 2, "grad_accum_steps": 2, "learning_rate": 3e-3, "warmup_steps": 3,
            "precision": "fp32", "checkpoint_every": 5, "portable_checkpoint_every": 10,
            "checkpoint_dir": f"{tmp_path}/checkpoints", "run_dir": f"{tmp_path}/run",
            "deepspeed_config": f"{tmp_path}/ds_config.json",
        },
        "wandb": {"mode": "disabled"},
    }  # fmt: skip


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def said(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run ``polyglu`` in this process: exit code, standard output, the sentence of the error."""
    capsys.readouterr()
    with mock.patch("contextlib.redirect_stdout"):  # call() throws it away
        code, sentence = call(line)
    return code, capsys.readouterr().out, sentence


def tree(folder: Path) -> tuple[dict[str, bytes], set[str]]:
    """All that lies in a folder: files with their content, and the names of folders."""
    return contents(folder), {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}


@pytest.mark.parametrize(
    "line", ["train --dry-run {}", "train {} --dry-run", "train --config {} --dry-run --price-per-hour 2.5"]
)
def test_a_good_run_prints_its_plan_and_leaves_no_trace(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    path = write(tmp_path, values)
    before = tree(tmp_path)
    code, out, sentence = said(line.format(path), capsys)
    assert code == 0, sentence
    plan = {}
    for row in out.splitlines()[:-1]:
        what, text = row.split("  ", 1)
        plan.setdefault(what, text.strip())
    assert plan["model"] == "20,368 parameters, 2,048 of them the embedding"
    assert plan["run"] == "20 steps of 128 tokens: 2,560 tokens"
    assert plan["data"] == "a: 1,856 of 5,984 tokens, 0.31 epochs"
    assert "244.42 kB to resume" in plan["checkpoints"] and "portable 81.47 kB" in plan["checkpoints"]
    assert plan["disk"].startswith("977.66 kB to come")  # three to resume, two portable ones, the final one
    assert plan["tried"] == "two steps of the run, in micro batches of 2 row(s)"
    assert "has the same bits" in plan["resumed"] and "measured" in plan["speed"]
    assert ("price" in plan["time"]) == ("price" in line)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("train --dry-run", "give one training config"),
        ("train", "give one training config"),
        ("train --dry-run {0} --config {0}", "give one training config"),
        ("train {0} --price-per-hour 1", "--price-per-hour is for the plan that --dry-run prints"),
        ("train --dry-run {0} --set model.d_modell=3", "unknown key 'model.d_modell'; did you mean 'd_model'?"),
        ("train --dry-run {0} --set data.sources.a.mix=0.9", "the 'mix' of all sources must sum to 1"),
    ],
)
def test_a_command_that_says_no_one_run_is_refused(
    values: dict[str, Any], tmp_path: Path, line: str, sentence: str
) -> None:
    path = write(tmp_path, values)
    before = tree(tmp_path)
    code, error = call(line.format(path))
    assert code == 2 and sentence in error
    assert tree(tmp_path) == before


def _chunk(here: Path, change: Callable[[bytearray], Any]) -> None:
    path = here / "data/a/chunk_00001.bin"
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def _swap(here: Path, first: str, second: str) -> None:
    one, other = here / f"data/a/{first}", here / f"data/a/{second}"
    one.rename(here / "aside")
    other.rename(one)
    (here / "aside").rename(other)


def _reformat(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 1}))


def _deepspeed(here: Path, **section: Any) -> None:
    path = here / "ds_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | section))


Spoil = Callable[[Path, dict[str, Any]], Any]
FAULTS: dict[str, tuple[Spoil, str]] = {
    "missing chunk": (lambda here, v: (here / "data/a/chunk_00001.bin").unlink(), "chunk_00001.bin is missing"),
    "truncated chunk": (
        lambda here, v: _chunk(here, lambda data: data.__delitem__(slice(-400, None))),
        "chunk_00001.bin has 3,600 bytes, expected 4,000",
    ),
    "flipped bit": (
        lambda here, v: _chunk(here, lambda data: data.__setitem__(100, data[100] ^ 1)),
        "chunk_00001.bin has other bytes than were written",
    ),
    "swapped chunks": (
        lambda here, v: _swap(here, "chunk_00001.bin", "chunk_00002.bin"),
        "chunk_00001.bin has the content of chunk_00002.bin",
    ),
    "extra chunk": (
        lambda here, v: (here / "data/a/chunk_00009.bin").write_bytes(bytes(40)),
        "chunk_00009.bin is not in the manifest",
    ),
    "no data": (lambda here, v: shutil.rmtree(here / "data/a"), "data/a holds no tokenised data"),
    "changed manifest": (
        lambda here, v: _reformat(here / "data/a/manifest.json"),
        "manifest.json was changed after it was written",
    ),
    "other tokenizer": (
        lambda here, v: retokenized(here / "data/a", "e" * 64),
        "tokenise all sources with one tokenizer",
    ),
    "small vocabulary": (lambda here, v: v["model"].update(vocab_size=63), "model.vocab_size is 63"),
    "source too short": (
        lambda here, v: (shutil.rmtree(here / "data/a"), write_token_source(here / "data/a", [1] * 31 + [0])),
        "less than one window",
    ),
    "checkpoint_dir is a file": (
        lambda here, v: (here / "checkpoints").write_text("taken"),
        "training.checkpoint_dir",
    ),
    "run_dir is a file": (lambda here, v: (here / "run").write_text("taken"), "training.run_dir"),
    "resume from nothing": (lambda here, v: v["training"].update(resume_from="nowhere"), "nowhere does not exist"),
    "resume from no checkpoint": (
        lambda here, v: v["training"].update(resume_from=str(here / "ds_config.json")),
        "ds_config.json is not a checkpoint",
    ),
    "deepspeed with an optimizer": (
        lambda here, v: _deepspeed(here, optimizer={"type": "Adam"}),
        "remove the 'optimizer' section",
    ),
    "W&B without a key": (lambda here, v: v["wandb"].update(mode="online"), "no key is there"),
    "too little disk": (
        lambda here, v: v["training"].update(keep_checkpoints=10**9),
        "the whole run needs",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_named_before_any_step(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    spoil, message = FAULTS[kind]
    spoil(tmp_path, values)
    path = write(tmp_path, values)
    before = tree(tmp_path)
    with mock.patch.object(dry_run, "try_out", side_effect=AssertionError("a step was tried")):
        code, out, sentence = said(f"train --dry-run {path}", capsys)
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert code == 2 and any(message in problem for problem in problems), (problems, sentence)
    assert sentence.startswith(f"error: {len(problems)} problem(s) found")
    assert tree(tmp_path) == before


def test_all_faults_are_listed_at_once(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["flipped bit", "extra chunk", "small vocabulary", "run_dir is a file", "resume from nothing"]
    kinds += ["deepspeed with an optimizer", "W&B without a key"]
    for kind in kinds:
        FAULTS[kind][0](tmp_path, values)
    code, out, sentence = said(f"train --dry-run {write(tmp_path, values)}", capsys)
    for kind in kinds:
        assert FAULTS[kind][1] in out, kind
    assert (code, out.count("problem: ")) == (2, len(kinds)) and f"{len(kinds)} problem(s)" in sentence


def test_a_run_to_resume_is_looked_at_and_left_alone(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, values)
    assert call(f"train {path} --set training.total_steps=20 --set training.checkpoint_every=10")[0] == 0
    newest = tmp_path / "checkpoints/ds_checkpoint/step_00000020/shard_00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    before = tree(tmp_path)

    code, out, sentence = said(f"train --dry-run {path} --set training.resume_from=auto", capsys)
    assert code == 0 and "step 10, from" in out and "10 steps, 1,280 tokens" in out, sentence
    assert "has the same bits" in out
    with mock.patch.object(preflight, "find_resume_point", return_value=None):  # as when none of them verifies
        code, out, sentence = said(f"train --dry-run {path} --set training.resume_from=auto", capsys)
    assert code == 2 and "auto finds 2 checkpoint(s)" in out and "none of them whole" in out
    code, out, sentence = said(f"train --dry-run {path}", capsys)
    assert code == 0 and "sets aside 2 checkpoint(s)" in out
    final = tmp_path / "checkpoints/portable_final.pt"
    code, out, sentence = said(f"train --dry-run {path} --set training.resume_from={final}", capsys)
    assert code == 0 and "nothing is left to do" in out
    for setting, message in {
        "training.seed=1": "whose seed differ",
        "training.grad_accum_steps=3": "whose samples_per_step differ",
        "model.d_ff=56": "whose model differ",
        f"training.resume_from={newest.parent}": "shard_00000.safetensors has",
        f"training.resume_from={final} --set model.d_ff=56": "the config expects (56, 4)",
    }.items():
        code, out, _ = said(f"train --dry-run {path} --set training.resume_from=auto --set {setting}", capsys)
        assert code == 2 and message in out, out
    for name in ("a", "b"):
        retokenized(tmp_path / "data" / name, "e" * 64)
    code, out, _ = said(f"train --dry-run {path} --set training.resume_from={final}", capsys)
    assert code == 2 and "was trained with tokenizer test" in out
    after = tree(tmp_path)
    assert {name for name in before[0] if after[0].get(name) != before[0][name]} == {
        "data/a/manifest.json", "data/b/manifest.json",
    }  # fmt: skip
    assert after[0].keys() == before[0].keys() and after[1] == before[1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [("disk", "No space left on device"), ("load", "is not what was saved"), ("step", "has other bits than before")],
)
def test_a_machine_that_cannot_save_load_or_repeat_is_refused(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    path = write(tmp_path, values)
    before, restore = tree(tmp_path), trial.restore

    def faulty(engine: Any, point: Any) -> None:
        restore(engine, point)
        engine.pieces()[0].tensors["exp_avg_sq"][0] += 1

    if fault == "disk":
        monkeypatch.setattr(saver, "write_atomically", mock.Mock(side_effect=OSError(28, "No space left on device")))
    elif fault == "load":
        monkeypatch.setattr(trial, "restore", faulty)
    else:  # a kernel that adds up in another order each time
        calls = iter(range(99))
        step = torch.optim.AdamW.step

        def unlike(self: torch.optim.AdamW) -> None:
            step(self)
            self.param_groups[0]["params"][0].data.flatten()[0] += 1e-7 * next(calls)

        monkeypatch.setattr(torch.optim.AdamW, "step", unlike)
    code, sentence = call(f"train --dry-run {path}")
    assert code == 2 and message in sentence
    assert tree(tmp_path) == before


def test_ctrl_c_removes_what_was_tried(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = write(tmp_path, values), []
    before = tree(tmp_path)

    def interrupted(*_: Any) -> None:
        seen.extend(tmp_path.glob(f"{trial.PREFIX}*/ds_checkpoint/step_*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "restore", interrupted)
    monkeypatch.setattr(sys, "argv", ["polyglu", "train", "--dry-run", str(path)])
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        cli.main()
    assert seen and tree(tmp_path) == before


@pytest.mark.parametrize(
    ("limit", "tried"), [("time", "two steps of one row with a model of"), ("memory", "two steps of one row")]
)
def test_a_run_too_large_for_the_machine_is_tried_small(
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: str,
    tried: str,
) -> None:
    if limit == "time":
        monkeypatch.setattr(dry_run, "TRIAL_SECONDS", 0.0)
    else:
        monkeypatch.setattr(dry_run, "memory_limit", lambda: 10)
    values["training"]["total_steps"] = 1000
    code, out, sentence = said(f"train --dry-run {write(tmp_path, values)} --price-per-hour 2", capsys)
    assert code == 0 and tried in out, sentence
    assert "a is read more than 4 times" in out
    assert "assumed: 13.5% of a GPU's peak" in out and "A100: " in out and "price" in out


@pytest.mark.timeout(600)
def test_two_deepspeed_ranks_try_the_run_too(values: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, values)
    before = tree(tmp_path)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [
        "deepspeed",
        "--num_gpus=2",
        f"--master_port={free_port()}",
        "-m",
        "src.training.train",
        "--config",
        str(path),
        "--dry-run",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tried on     deepspeed engine" in done.stdout and "4 rows of 32 tokens on each of 2 rank(s)" in done.stdout
    assert "has the same bits" in done.stdout and done.stdout.count("All is well") == 1
    assert tree(tmp_path) == before
