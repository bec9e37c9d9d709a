"""Small good files for tests of commands."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from commands import Place, call

from polyglu.data.tokenizer import train_bpe
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model, read_checkpoint, save_portable

SMALL = {"d_model": 16, "d_ff": 24, "n_layers": 1, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 8, "seq_length": 64}


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    texts = [f"{a} + {b} = {a + b}" for a in range(20) for b in range(20)]
    tokenizer = train_bpe(texts, 280, folder / "tokenizer")
    train_bpe(["other words entirely"] * 9, 270, folder / "other")
    config = ModelConfig(vocab_size=tokenizer.vocab_size, routing_scope="causal", **SMALL)
    save_portable(folder / "good.pt", create_model(config).state_dict(), config, 3, 0.5, tokenizer.identity())
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "arithmetic_test.jsonl").write_text(json.dumps({"question": "1 + 1 =", "answer": "2"}) + "\n")
    messages = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    (folder / "sft.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 4)
    code, said = call(
        f"data tokenize --files {folder}/text.jsonl --tokenizer {folder}/tokenizer --output {folder}/data"
    )
    assert code == 0, said
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Place:
    here, out = tmp_path / "here", tmp_path / "out"
    shutil.copytree(good, here)
    loop = {
        "checkpoint_dir": f"{out}/checkpoints", "run_dir": f"{out}/run", "micro_batch_size": 2, "grad_accum_steps": 1,
        "warmup_steps": 1, "precision": "fp32",
    }  # fmt: skip
    model = read_checkpoint(here / "good.pt").config.model_dump()
    train = {
        "model": model,
        "data": {"sources": {"a": {"path": f"{here}/data", "mix": 1.0, "mix_end": 1.0}}},
        "training": {**loop, "total_steps": 4, "checkpoint_every": 4},
        "wandb": {"mode": "disabled"},
    }
    sft = {
        "data": {"files": [f"{here}/sft.jsonl"], "tokenizer": f"{good}/tokenizer"},
        "training": {**loop, "init_from": f"{here}/good.pt"},
        "wandb": {"mode": "disabled"},
    }
    (here / "train.yaml").write_text(yaml.safe_dump(train))
    (here / "sft.yaml").write_text(yaml.safe_dump(sft))
    return Place(here, out)
