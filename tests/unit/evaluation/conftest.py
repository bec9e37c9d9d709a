"""A small model that has learned a few sums by heart, as a checkpoint with its tokenizer and test files."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from polyglu.data.chat import encode_conversations
from polyglu.data.tokenizer import Tokenizer, train_bpe
from polyglu.inference import Inference, open_for_inference
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model, save_portable
from polyglu.model.packing import pack_rows

SUMS = [(3, 4), (12, 9), (7, 7), (20, 15), (6, 31)]
TAU = 0.6


@dataclass(frozen=True)
class Run:
    """Files of a finished run."""

    folder: Path
    checkpoint: Path
    data: Path
    texts: tuple[str, ...]


def _texts() -> list[str]:
    return [f"Question: {a} + {b} =\nAnswer: {a + b}\n#### {a + b}" for a, b in SUMS]


def _documents(tokenizer: Tokenizer) -> list[list[int]]:
    conversations = [
        [{"role": "user", "content": f"{a} + {b} ="}, {"role": "assistant", "content": f"{a + b}\n#### {a + b}"}]
        for a, b in SUMS
    ]
    chats = [ids for ids, _ in encode_conversations(conversations, tokenizer)]
    return [[*ids, tokenizer.eos_id] for ids in (*map(tokenizer.encode, _texts()), *chats)]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(_texts(), 300, folder / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=48, d_ff=64, n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=24,
        seq_length=64, routing_scope="causal",
    )  # fmt: skip
    model = create_model(config, seed=5)
    documents = _documents(tokenizer)
    input_ids, cu_seqlens = pack_rows([document[:-1] for document in documents], torch.device("cpu"))
    targets = torch.tensor([token for document in documents for token in document[1:]])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(500):  # far past knowing them by heart, so that rounding decides nothing
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 500)
        loss = F.cross_entropy(model(input_ids, cu_seqlens=cu_seqlens, tau=TAU)[0], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_portable(folder / "model.pt", model.state_dict(), config, 500, TAU, tokenizer.identity())
    data = folder / "data"
    data.mkdir()
    # The last problem's answer is wrong on purpose: a score of 5/6 tells exact matching from luck.
    problems = [(f"{a} + {b} =", str(a + b)) for a, b in SUMS] + [("3 + 4 =", "8")]
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in problems]
    (data / "arithmetic_test.jsonl").write_text("\n".join(lines) + "\n")
    (data / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts()))
    return Run(folder, folder / "model.pt", data, tuple(_texts()))


@pytest.fixture(scope="session")
def opened(run: Run) -> Inference:
    return open_for_inference(run.checkpoint)
