"""What was wrong with whole runs of the published implementation, each seen from outside: docs/defects.md."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from support import random_documents, write_token_source

from polyglu.config_file import load_config
from polyglu.data.sft_dataset import load_conversations
from polyglu.data.tokenizer import train_bpe
from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig, SFTConfig, TrainConfig, TrainingSection
from polyglu.model.model import create_model, load_checkpoint, save_portable
from polyglu.model.routing import gumbel_noise
from polyglu.sft.sft import finetune
from polyglu.training import engine as engine_module
from polyglu.training.loss import LanguageModelLoss
from polyglu.training.ranks import Ranks
from polyglu.training.train import train

SHAPE = {"d_model": 16, "d_ff": 24, "n_layers": 1, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 8}
Outcome = tuple[list[dict[str, Any]], Path]
"""Rows of metrics and checkpoint folder of a run."""
DS_CONFIG = Path(__file__).parents[2] / "configs/ds_config.json"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of four steps of four rows, which have very different numbers of documents, and so of targets."""
    tmp_path = tmp_path_factory.mktemp("runs")
    tokens = random_documents(np.random.default_rng(0), 2000, mean_length=4)
    write_token_source(tmp_path / "data", tokens)
    values = {
        "model": {**SHAPE, "vocab_size": 64, "seq_length": 16, "routing_scope": "causal"},
        "data": {"sources": {"a": {"path": f"{tmp_path}/data", "mix": 1.0, "mix_end": 1.0}}},
        "training": {
            "total_steps": 4, "micro_batch_size": 4, "grad_accum_steps": 1, "learning_rate": 3e-3, "warmup_steps": 1,
            "precision": "fp32", "log_every": 1, "checkpoint_every": 2,
        },
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def trained(config: Path, name: str, *settings: str) -> Outcome:
    folder = config.parent / name
    places = [f"training.checkpoint_dir={folder}/checkpoints", f"training.run_dir={folder}/run"]
    train(load_config(TrainConfig, config, [*places, *(f"training.{setting}" for setting in settings)]))
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], folder / "checkpoints"


@pytest.fixture(scope="module")
def whole(config: Path) -> Outcome:
    """An uninterrupted run, to compare with."""
    return trained(config, "whole")


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in ("step", "train/loss", "train/grad_norm")) for row in rows]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)[0].state_dict()


def test_the_guides_folder_resumes_without_reading_again_or_skipping(config: Path, whole: Outcome) -> None:
    rows, checkpoints = whole
    shutil.copytree(checkpoints.parent, config.parent / "cut")
    cut = config.parent / "cut/checkpoints"
    shutil.rmtree(cut / "ds_checkpoint/step_00000004")
    (cut / "portable_final.pt").unlink()
    again, _ = trained(config, "cut", f"resume_from={cut}/ds_checkpoint")
    assert numbers(again) == numbers(rows) and len(rows) == 4
    expected, resumed = (weights(folder / "portable_final.pt") for folder in (checkpoints, cut))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_the_temperature_goes_from_tau_max_to_tau_min(config: Path, whole: Outcome) -> None:
    rows, checkpoints = trained(config, "cool", "tau_max=0.8", "tau_min=0.4")
    assert [row["train/tau"] for row in rows] == pytest.approx([0.8, 0.7, 0.6, 0.5])
    saved = [load_checkpoint(checkpoints / f"portable_{name}.pt")[2] for name in ("step2", "final")]
    assert saved == pytest.approx([0.6, 0.4])
    assert rows[0]["train/loss"] != whole[0][0]["train/loss"]  # the model is told


def test_portable_checkpoints_hold_no_optimiser_unless_asked(whole: Outcome) -> None:
    for name in ("step2", "final"):
        content = torch.load(whole[1] / f"portable_{name}.pt", weights_only=True)
        assert content.keys() == {"format", "model", "config", "step", "tau", "tokenizer"}


def test_the_gradient_is_clipped_as_configured(config: Path) -> None:
    (_, loose), (_, tight) = (trained(config, f"clip {clip}", f"grad_clip={clip}") for clip in (1e9, 1e-3))
    first, second = (weights(checkpoints / "portable_final.pt") for checkpoints in (loose, tight))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) > 1e-4


def test_deepspeed_is_told_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def initialize(config: dict[str, Any], **_: Any) -> None:
        told.append(config)
        raise KeyboardInterrupt

    library = SimpleNamespace(initialize=initialize, ops=SimpleNamespace(__compatible_ops__={}))
    monkeypatch.setitem(sys.modules, "deepspeed", library)
    loss = LanguageModelLoss(create_model(ModelConfig(vocab_size=9, **SHAPE)), torch.float32, False)
    settings = TrainingSection(grad_clip=0.37, deepspeed_config=str(DS_CONFIG))
    with pytest.raises(KeyboardInterrupt):
        engine_module.DeepSpeedEngine(loss, settings, Ranks(torch.device("cpu")))
    assert told[0]["gradient_clipping"] == 0.37


@pytest.mark.parametrize(
    "key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping"]
)
def test_nothing_is_stated_twice(tmp_path: Path, key: str) -> None:
    values = json.loads(DS_CONFIG.read_text())
    assert key not in values
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**values, key: 2}))
    with pytest.raises(PolygluError, match=f"remove '{key}'.* stated once, in the training config"):
        engine_module.read_deepspeed_config(path)


def test_the_loss_is_over_the_targets_of_the_global_batch(config: Path, whole: Outcome) -> None:
    """Rows of different numbers of targets: a mean of micro batches' means would have another gradient."""
    apart, _ = trained(config, "apart", "micro_batch_size=1", "grad_accum_steps=4")
    for one, other in zip(whole[0], apart, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
        assert other["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)


def test_fine_tuning_under_sequence_scope_keeps_conversations_apart(tmp_path: Path) -> None:
    """Its first loss is that of each conversation by itself, over the assistant's tokens of all of them."""
    answers = ["4", "six or seven", "9 and then some more words", "no"]
    turns = [[{"role": "user", "content": "2 + 2 ?"}, {"role": "assistant", "content": text}] for text in answers]
    file = tmp_path / "sft.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    tokenizer = train_bpe(["user assistant 2 + 2 is 4"] * 9, 280, tmp_path / "bpe")
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, seq_length=64, routing_scope="sequence", **SHAPE)
    model = create_model(shape)
    with torch.no_grad():  # at its initial scale routing hardly moves the loss
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
            elif parameter.ndim == 2:
                parameter.mul_(10)
    save_portable(tmp_path / "base.pt", model.state_dict(), shape, 3, 0.5, tokenizer.identity())
    training = {
        "init_from": f"{tmp_path}/base.pt", "checkpoint_dir": f"{tmp_path}/out", "run_dir": f"{tmp_path}/run",
        "micro_batch_size": 4, "grad_accum_steps": 1, "precision": "fp32", "tau": 0.5,
    }  # fmt: skip
    data = {"files": [str(file)], "tokenizer": str(tmp_path / "bpe")}
    finetune(SFTConfig.model_validate({"data": data, "training": training, "wandb": {"mode": "disabled"}}))
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]

    found = load_conversations(
        files=[file], dataset=None, config=None, splits=(), revision=None, tokenizer=tokenizer, seq_length=64,
        max_conversations=None,
    )  # fmt: skip
    noise = gumbel_noise(0, torch.tensor([0]), shape.n_layers, shape.d_ff, shape.n_activations)
    total, targets = 0.0, 0
    for start, end in zip(found.offsets, found.offsets[1:], strict=False):
        ids = torch.from_numpy(found.tokens[start:end].astype(np.int64))
        learned = torch.from_numpy(found.learned[start:end])[1:]
        with torch.no_grad():
            logits = model(ids[None], tau=0.5, gumbel=noise)[0, :-1]
        total += float(F.cross_entropy(logits[learned], ids[1:][learned], reduction="sum"))
        targets += int(learned.sum())
    assert row["train/loss"] == pytest.approx(total / targets, rel=1e-5)
