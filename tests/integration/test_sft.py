"""Fine-tuning from a portable checkpoint on local conversations."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from polyglu.config_file import validate
from polyglu.data.dataloader import IGNORED
from polyglu.data.sft_dataset import load_conversations
from polyglu.data.tokenizer import Tokenizer, train_bpe
from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig, SFTConfig
from polyglu.model.model import create_model, load_checkpoint, read_checkpoint, save_portable
from polyglu.sft.sft import PackLoader, finetune

SMALL = {"d_model": 32, "d_ff": 48, "n_layers": 2, "n_q_heads": 4, "n_kv_heads": 2, "head_dim": 8, "seq_length": 64}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_bpe(["what is 1 + 2 ? the answer is 3 . user assistant"] * 20, 300, tmp_path / "tokenizer")


@pytest.fixture
def values(tmp_path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {a} + {b} ?"},
                {"role": "assistant", "content": str(a + b)},
            ]
        }
        for a in range(10)
        for b in range(6)
    ]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_base(tmp_path, tokenizer)
    return {
        "data": {"files": [str(tmp_path / "sft.jsonl")], "tokenizer": str(tmp_path / "tokenizer")},
        "training": {
            "init_from": str(tmp_path / "base.pt"),
            "checkpoint_dir": str(tmp_path / "checkpoints_sft"),
            "run_dir": str(tmp_path / "run"),
            "epochs": 3,
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "micro_batch_size": 2,
            "grad_accum_steps": 2,
            "checkpoint_every": 5,
            "log_every": 1,
            "precision": "fp32",
        },
        "wandb": {"mode": "disabled"},
    }


def make_base(folder: Path, tokenizer: Tokenizer, scope: str = "causal") -> None:
    config = ModelConfig(vocab_size=tokenizer.vocab_size, routing_scope=scope, **SMALL)
    save_portable(folder / "base.pt", create_model(config).state_dict(), config, 7, 0.3, tokenizer.identity())


def changed(values: dict[str, Any], **training: Any) -> SFTConfig:
    return validate(SFTConfig, {**values, "training": {**values["training"], **training}}, source="test")


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_fine_tuning_learns_and_keeps_shape_and_tokenizer(
    values: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    final = finetune(changed(values))
    rows = metrics(tmp_path / "run")
    assert rows[-1]["train/loss"] < 0.7 * rows[0]["train/loss"]
    assert {row["train/tau"] for row in rows} == {0.1}
    tuned, base = read_checkpoint(final), read_checkpoint(tmp_path / "base.pt")
    assert (tuned.config, tuned.tau, tuned.tokenizer) == (base.config, 0.1, tokenizer.identity())
    assert final.name == "sft_final.pt"


def test_resume_is_bit_exact(values: dict[str, Any], tmp_path: Path) -> None:
    final = finetune(changed(values))
    whole, rows = load_checkpoint(final)[0].state_dict(), metrics(tmp_path / "run")
    folders = sorted((tmp_path / "checkpoints_sft/ds_checkpoint").iterdir())
    shutil.rmtree(folders[-1])
    final.unlink()
    finetune(changed(values, resume_from="auto"))
    resumed = load_checkpoint(final)[0].state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert [row["train/loss"] for row in metrics(tmp_path / "run")] == [row["train/loss"] for row in rows]


def loader(values: dict[str, Any], tokenizer: Tokenizer, rank: int, world_size: int, accumulation: int) -> PackLoader:
    conversations = load_conversations(
        files=[Path(file) for file in values["data"]["files"]],
        dataset=None,
        config=None,
        splits=(),
        revision=None,
        tokenizer=tokenizer,
        seq_length=64,
        max_conversations=None,
    )
    return PackLoader(
        conversations, capacity=96, accumulation=accumulation, epochs=2, seed=0, rank=rank, world_size=world_size
    )


def test_any_number_of_ranks_trains_the_same_tokens_once_an_epoch(values: dict[str, Any], tokenizer: Tokenizer) -> None:
    def trained(loaders: list[PackLoader], step: int) -> list[int]:
        batches = [batch for one in loaders for batch in one.step(step)]
        return sorted(int(target) for batch in batches for target in batch.targets.flatten() if target != IGNORED)

    alone = [loader(values, tokenizer, 0, 1, 4)]
    ranks = [loader(values, tokenizer, rank, 2, 2) for rank in range(2)]
    assert alone[0].total_steps == ranks[0].total_steps
    everything = []
    for step in range(alone[0].total_steps):
        assert trained(alone, step) == trained(ranks, step)
        everything += trained(alone, step)
    learned = alone[0].conversations
    assert len(everything) == 2 * int(learned.learned.sum())


def test_sequence_scope_is_pooled_per_conversation_and_says_so(
    values: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer, caplog: Any
) -> None:
    make_base(tmp_path, tokenizer, scope="sequence")
    final = finetune(changed(values, epochs=1))
    assert caplog.text.count("each conversation is pooled as a row of its own") == 1
    assert read_checkpoint(final).config.routing_scope == "sequence"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": [{"role": "user", "content": "hello"}]}], "assistant"),
        ([{"text": "no messages"}], "messages"),
        ([], "sft.jsonl"),
    ],
)
def test_data_without_assistant_tokens_is_an_error(
    values: dict[str, Any], tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PolygluError, match=message):
        finetune(changed(values))
    assert not (tmp_path / "checkpoints_sft").exists() and not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    train_bpe(["entirely different words"] * 20, 290, tmp_path / "other")
    values["data"]["tokenizer"] = str(tmp_path / "other")
    with pytest.raises(PolygluError, match=r"data.tokenizer: .*other is not the tokenizer that .*base\.pt was trained"):
        finetune(changed(values))


def test_checkpoint_that_is_none_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match=r"nothing\.pt does not exist"):
        finetune(changed(values, init_from=str(tmp_path / "nothing.pt")))
