from pathlib import Path

import pytest
import torch
from models import write_folder

from polyglu.data.tokenizer import train_bpe
from polyglu.errors import PolygluError
from polyglu.files import sha256
from polyglu.inference import PUBLISHED_TOKENIZER, open_for_inference
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model, load_checkpoint, read_checkpoint, save_portable

TEXTS = ["one two three", "three two one", "1 + 2 = 3"]


def make_checkpoint(
    folder: Path, scope: str = "causal", vocab_size: int = 300, tokenizer_name: str | None = None
) -> Path:
    tokenizer = train_bpe(TEXTS, 270, folder / "tokenizer")
    config = ModelConfig(
        vocab_size=vocab_size, d_model=16, d_ff=24, n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=8, seq_length=32,
        routing_scope=scope,
    )  # fmt: skip
    identity = tokenizer.identity() | ({"name": tokenizer_name} if tokenizer_name else {})
    save_portable(folder / "model.pt", create_model(config).state_dict(), config, 11, 0.25, identity)
    return folder / "model.pt"


def test_opens_model_and_tokenizer(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    model, tokenizer, step, tau, digest, scope = open_for_inference(path)
    assert (step, tau, digest, scope) == (11, 0.25, sha256(path), "causal")
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("two three")) == "two three"


def test_a_moved_run_finds_the_tokenizer_beside_its_checkpoint(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    opened = open_for_inference(tmp_path / "new" / path.name)
    assert opened.tokenizer.name == str(tmp_path / "new" / "tokenizer")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    other = train_bpe(["quite another text, quite another text"], 265, tmp_path / "other")
    with pytest.raises(PolygluError, match=r"other' is not the one .*--tokenizer"):
        open_for_inference(path, other.name)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match="has 2[67][0-9] tokens, .* only 40"):
        open_for_inference(make_checkpoint(tmp_path, vocab_size=40))


def test_sequence_scope_is_opened_so_that_inputs_can_be_packed(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, scope="sequence")
    opened = open_for_inference(path)
    assert (opened.model.config.routing_scope, opened.routing_scope) == ("document", "sequence")
    original, _, _ = load_checkpoint(path)
    rows = [torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10]])]
    packed = opened.model(torch.cat(rows, 1), cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32), tau=opened.tau)
    for row, logits in zip(rows, packed.split([4, 2], dim=1), strict=True):
        assert torch.allclose(original(row, tau=opened.tau), logits, atol=1e-5)


def test_a_folder_is_known_by_its_weights(tmp_path: Path) -> None:
    write_folder(tmp_path / "export", read_checkpoint(make_checkpoint(tmp_path)))
    assert open_for_inference(tmp_path / "export").sha256 == sha256(tmp_path / "export" / "model.safetensors")


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    checkpoint = read_checkpoint(path)
    save_portable(path, checkpoint.weights, checkpoint.config, 11, 0.25, {})
    with pytest.raises(PolygluError, match="--tokenizer"):
        open_for_inference(path)
    assert open_for_inference(path, str(tmp_path / "tokenizer")).step == 11


def test_a_published_checkpoint_uses_qwen3s_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = read_checkpoint(make_checkpoint(tmp_path, vocab_size=ModelConfig().vocab_size))
    save_portable(tmp_path / "model.pt", checkpoint.weights, checkpoint.config, 11, 0.25, {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked: list[str] = []
    small = train_bpe(TEXTS, 270, tmp_path / "tokenizer")
    monkeypatch.setattr("polyglu.inference.load_tokenizer", lambda name: asked.append(name) or small)
    open_for_inference(tmp_path / "model.pt")
    assert asked == [PUBLISHED_TOKENIZER]
