"""Pre-training as a person starts it: fresh, interrupted, resumed, on both engines."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from support import free_port, random_documents, retokenized, write_token_source

from polyglu.config_file import validate
from polyglu.errors import PolygluError
from polyglu.model.config import TrainConfig
from polyglu.model.model import load_checkpoint
from polyglu.training import fit
from polyglu.training.train import SEQUENCE_SCOPE_NOTE, train

ROOT = Path(__file__).parents[2]
MODEL = {
    "vocab_size": 64, "d_model": 32, "d_ff": 48, "n_layers": 2, "n_q_heads": 4, "n_kv_heads": 2, "head_dim": 8,
    "seq_length": 32, "routing_scope": "causal",
}  # fmt: skip
LOSS_TOLERANCE = 1e-4
"""Nats by which the engines' losses may differ: sums in another order, over 20 steps."""


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for name, size in (("a", 6000), ("b", 3000)):
        write_token_source(tmp_path / "data" / name, random_documents(rng, size))
    return {
        "model": dict(MODEL),
        "data": {
            "sources": {
                "a": {"path": str(tmp_path / "data/a"), "mix": 0.7, "mix_end": 0.9},
                "b": {"path": str(tmp_path / "data/b"), "mix": 0.3, "mix_end": 0.1},
            }
        },
        "training": {
            "total_steps": 20,
            "micro_batch_size": 2,
            "grad_accum_steps": 2,
            "learning_rate": 3e-3,
            "warmup_steps": 3,
            "precision": "fp32",
            "log_every": 1,
            "checkpoint_every": 5,
            "portable_checkpoint_every": 10,
            "checkpoint_dir": str(tmp_path / "checkpoints"),
            "run_dir": str(tmp_path / "run"),
            "deepspeed_config": str(ROOT / "configs/ds_config.json"),
        },
        "wandb": {"mode": "disabled"},
    }


def changed(values: dict[str, Any], **training: Any) -> TrainConfig:
    return validate(TrainConfig, {**values, "training": {**values["training"], **training}}, source="test")


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def bits(folder: Path) -> list[tuple[float, ...]]:
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in metrics(folder)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def test_run_learns_logs_and_saves(values: dict[str, Any], tmp_path: Path) -> None:
    final = train(changed(values))
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5
    expected = {"train/loss", "train/lr", "train/tau", "train/tokens_per_sec", "routing_entropy/mean"}
    expected |= {"routing_entropy/layer_1", "dynamic_routing_entropy/layer_0", "dynamic_routing_entropy/mean"}
    assert expected <= rows[0].keys()
    assert rows[0]["routing_entropy/mean"] == pytest.approx(np.log(4), abs=1e-3)
    model, step, tau = load_checkpoint(final)
    assert (step, model.config.model_dump()) == (20, validate(TrainConfig, values, "test").model.model_dump())
    assert tau == pytest.approx(0.1)
    checkpoints = tmp_path / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {
        "ds_checkpoint", "portable_step10.pt", "portable_step20.pt", "portable_final.pt",
    }  # fmt: skip
    assert sorted(path.name for path in (checkpoints / "ds_checkpoint").iterdir()) == ["step_00000015", "step_00000020"]
    assert load_checkpoint(checkpoints / "portable_step10.pt")[1:] == (10, pytest.approx(0.55))
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["training"]["total_steps"] == 20


def test_resume_is_bit_exact_three_times_in_a_row(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(changed(values))
    whole, final = bits(tmp_path / "run"), weights(tmp_path / "checkpoints/portable_final.pt")
    for name in ("checkpoints", "run"):
        shutil.rmtree(tmp_path / name)

    class Preempted(Exception):
        pass

    original = torch.optim.AdamW.step
    for limit in (7, 4, 6):  # steps until the machine dies: 7 -> resumed at 5, dies at 9 -> 5, dies at 11 -> 10
        count = iter(range(limit))

        def dying(self: torch.optim.AdamW, *args: Any, steps: Any = count) -> Any:
            if next(steps, None) is None:
                raise Preempted
            return original(self, *args)

        monkeypatch.setattr(torch.optim.AdamW, "step", dying)
        with pytest.raises(Preempted):
            train(changed(values, resume_from="auto"))
    monkeypatch.setattr(torch.optim.AdamW, "step", original)
    train(changed(values, resume_from=str(tmp_path / "checkpoints/ds_checkpoint")))
    assert bits(tmp_path / "run") == whole
    resumed = weights(tmp_path / "checkpoints/portable_final.pt")
    assert all(torch.equal(resumed[name], final[name]) for name in final)


def test_damaged_checkpoint_is_passed_over(values: dict[str, Any], tmp_path: Path, caplog: Any) -> None:
    train(changed(values))
    whole = weights(tmp_path / "checkpoints/portable_final.pt")
    folder = tmp_path / "checkpoints/ds_checkpoint/step_00000020"
    shard = folder / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    train(changed(values, resume_from="auto"))
    assert "step_00000020/shard_00000.safetensors has" in caplog.text
    assert "Set aside as damaged_step_00000020." in caplog.text
    assert {path.name for path in folder.parent.iterdir()} == {
        "step_00000015", "step_00000020", "damaged_step_00000020",
    }  # fmt: skip
    resumed = weights(tmp_path / "checkpoints/portable_final.pt")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_resume_from_portable_keeps_weights_and_step(values: dict[str, Any], tmp_path: Path) -> None:
    train(changed(values))
    portable = tmp_path / "checkpoints/portable_step10.pt"
    train(
        changed(values, resume_from=str(portable), checkpoint_dir=str(tmp_path / "other"), run_dir=str(tmp_path / "r2"))
    )
    assert [row["step"] for row in metrics(tmp_path / "r2")] == list(range(11, 21))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"seed": 1}, "whose seed differ"),
        ({"total_steps": 30}, "whose total_steps differ"),
        ({"grad_accum_steps": 4}, "whose samples_per_step differ"),
    ],
)
def test_resume_with_another_data_order_is_refused(
    values: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    train(changed(values))
    with pytest.raises(PolygluError, match=message):
        train(changed(values, resume_from="auto", **training))


def test_micro_batch_and_accumulation_do_not_change_the_loss(values: dict[str, Any], tmp_path: Path) -> None:
    train(changed(values))
    train(changed(values, micro_batch_size=4, grad_accum_steps=1, run_dir=str(tmp_path / "r2")))
    for first, second in zip(metrics(tmp_path / "run"), metrics(tmp_path / "r2"), strict=True):
        assert first["train/loss"] == pytest.approx(second["train/loss"], abs=LOSS_TOLERANCE)


@pytest.mark.parametrize(("scope", "said"), [("sequence", 1), ("causal", 0), ("document", 0)])
def test_sequence_scope_says_once_what_it_means(values: dict[str, Any], scope: str, said: int, caplog: Any) -> None:
    values["model"]["routing_scope"] = scope
    train(changed(values, total_steps=2))
    assert caplog.text.count(SEQUENCE_SCOPE_NOTE) == said


def test_fixed_activation_model_trains(values: dict[str, Any], tmp_path: Path) -> None:
    values["model"]["ffn"] = "swiglu"
    train(changed(values, total_steps=2))
    assert not any("entropy" in key for row in metrics(tmp_path / "run") for key in row)


def test_wandb_runs_offline_without_a_key(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = validate(TrainConfig, {**values, "wandb": {"mode": "auto"}}, "test")
    train(config.model_copy(update={"training": config.training.model_copy(update={"total_steps": 3})}))
    (run,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    for _ in range(100):  # another process writes it, and may be late
        content = run.read_bytes()
        if b"train/loss" in content and b"dynamic_routing_entropy/mean" in content:
            return
        time.sleep(0.1)
    raise AssertionError(content)


@pytest.fixture
def fault(values: dict[str, Any], tmp_path: Path) -> Any:
    def make(kind: str) -> str:
        chunk, manifest = tmp_path / "data/a/chunk_00001.bin", tmp_path / "data/a/manifest.json"
        if kind == "missing chunk":
            chunk.unlink()
        elif kind == "truncated chunk":
            chunk.write_bytes(chunk.read_bytes()[:-400])
        elif kind == "odd-sized chunk":
            chunk.write_bytes(chunk.read_bytes()[:-1])
        elif kind == "no data":
            shutil.rmtree(tmp_path / "data/a")
        elif kind == "other tokenizer":
            retokenized(tmp_path / "data/a", "e" * 64)
        elif kind == "changed manifest":
            manifest.write_text(manifest.read_text().replace('"chunk_tokens": 1000', '"chunk_tokens": 1001'))
        elif kind == "flipped bit":
            data = bytearray(chunk.read_bytes())
            data[100] ^= 1
            chunk.write_bytes(data)
            train(changed(values, total_steps=1))  # not looked for unless asked
            for folder in ("run", "checkpoints"):
                shutil.rmtree(tmp_path / folder)
            values["data"]["verify_hashes"] = True
        elif kind == "small vocabulary":
            values["model"]["vocab_size"] = 63
        elif kind == "short":
            shutil.rmtree(tmp_path / "data/a")
            write_token_source(tmp_path / "data/a", [1] * 32)
        elif kind == "other shape":
            train(changed(values, total_steps=1))
            values["model"]["d_ff"] = 56
            values["training"]["resume_from"] = str(tmp_path / "checkpoints/portable_final.pt")
            shutil.rmtree(tmp_path / "run")
        elif kind == "checkpoint of another tokenizer":
            train(changed(values, total_steps=1))
            for name in ("a", "b"):
                retokenized(tmp_path / f"data/{name}", "e" * 64)
            values["training"]["resume_from"] = str(tmp_path / "checkpoints/portable_final.pt")
            shutil.rmtree(tmp_path / "run")
        elif kind == "checkpoint_dir is a file":
            (tmp_path / "checkpoints").write_text("taken")
        elif kind == "resume from nothing":
            values["training"]["resume_from"] = "nowhere"
        return kind

    return make


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing chunk", r"chunk_00001\.bin is missing"),
        ("truncated chunk", r"chunk_00001\.bin has 3,600 bytes, expected 4,000"),
        ("odd-sized chunk", r"chunk_00001\.bin has 3,999 bytes, expected 4,000"),
        ("no data", r"data/a holds no tokenised data"),
        ("changed manifest", r"data/a/manifest\.json was changed after it was written"),
        ("flipped bit", r"data/a/chunk_00001\.bin .*SHA-256"),
        ("other tokenizer", r"tokenise all sources with one tokenizer"),
        ("small vocabulary", r"model.vocab_size is 63"),
        ("short", r"less than one window"),
        ("other shape", r"portable_final\.pt: weight 'layers.0.mlp.alpha' has shape \(48, 4\)"),
        ("resume from nothing", r"training.resume_from: nowhere does not exist"),
        ("checkpoint of another tokenizer", r"portable_final\.pt was trained with tokenizer test"),
        ("checkpoint_dir is a file", r"training.checkpoint_dir .*checkpoints cannot be written to"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(
    values: dict[str, Any], tmp_path: Path, fault: Any, kind: str, message: str
) -> None:
    fault(kind)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    done = run([sys.executable, "-m", "src.training.train", "--config", str(config)])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert_matches(message, line)
    assert not (tmp_path / "run").exists()


def test_deepspeed_config_with_an_optimizer_is_refused_with_the_reason(values: dict[str, Any], tmp_path: Path) -> None:
    from polyglu.training.engine import read_deepspeed_config

    base = json.loads((ROOT / "configs/ds_config.json").read_text())
    path = tmp_path / "ds.json"
    for key, message in [
        ("optimizer", "remove the 'optimizer' section: DeepSpeed would put it in place"),
        ("scheduler", "remove the 'scheduler' section"),
        ("train_micro_batch_size_per_gpu", "stated once, in the training config as training.micro_batch_size"),
        ("gradient_accumulation_steps", "training.grad_accum_steps"),
        ("gradient_clipping", "training.grad_clip"),
    ]:
        path.write_text(json.dumps({**base, key: {}}))
        with pytest.raises(PolygluError, match=message):
            read_deepspeed_config(path)
    for stage in (0, 3):  # without ZeRO, DeepSpeed does not look whether gradients are finite
        path.write_text(json.dumps({**base, "zero_optimization": {"stage": stage}}))
        with pytest.raises(PolygluError, match="stage must be 1 or 2"):
            read_deepspeed_config(path)


@pytest.mark.timeout(300)
def test_the_launchers_run_equals_the_plain_one(values: dict[str, Any], tmp_path: Path) -> None:
    """By the guide's command; engines, ranks and resumes are compared in ``test_survival``."""
    train(changed(values))
    folders = {"checkpoint_dir": str(tmp_path / "ds"), "run_dir": str(tmp_path / "ds_run")}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**values, "training": {**values["training"], **folders, "grad_accum_steps": 1}}))
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    port = f"--master_port={free_port()}"  # others may train on this machine, on the usual one
    done = run([launcher, "--num_gpus=2", port, "-m", "src.training.train", "--config", str(config)])
    assert done.returncode == 0, done.stderr
    plain, zero = metrics(tmp_path / "run"), metrics(tmp_path / "ds_run")
    assert len(plain) == len(zero) == 20
    for first, second in zip(plain, zero, strict=True):
        assert second["train/loss"] == pytest.approx(first["train/loss"], abs=LOSS_TOLERANCE)
        assert second["train/grad_norm"] == pytest.approx(first["train/grad_norm"], rel=1e-3)
    ours, theirs = (weights(folder / "portable_final.pt") for folder in (tmp_path / "checkpoints", tmp_path / "ds"))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-2, atol=1e-3)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(PolygluError, match=pattern):
        raise PolygluError(text)


def test_noise_can_be_left_out(values: dict[str, Any]) -> None:
    with patch.object(fit, "batch_noise", side_effect=AssertionError("noise was drawn")):
        train(changed(values, total_steps=2, gumbel=False))
        with pytest.raises(AssertionError, match="noise was drawn"):
            train(changed(values, total_steps=2))
