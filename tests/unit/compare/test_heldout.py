"""Losses of packed rows, by document: against a plain computation, and what honest routing cannot see."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import SHAPE, sharp_model
from support import EOS, random_documents, write_token_source

from polyglu.compare.heldout import check_heldout, document_losses, last_rows, measure, sees_ahead, validation_rows
from polyglu.config_file import validate
from polyglu.data.chunks import TokenSource, open_source
from polyglu.data.dataloader import IGNORED, MicroBatch, pack_windows
from polyglu.errors import PolygluError
from polyglu.estimates import ratio_estimate
from polyglu.model.config import ModelConfig, RoutingScope, TrainConfig
from polyglu.model.model import create_model, save_portable
from polyglu.training.loss import LanguageModelLoss

T = 16


@pytest.fixture
def source(tmp_path: Path) -> TokenSource:
    rng = np.random.default_rng(0)
    folder = write_token_source(tmp_path / "heldout", random_documents(rng, 500, vocab_size=50), vocab_size=50)
    return open_source(folder)


def batches(source: TokenSource) -> list[MicroBatch]:
    return list(validation_rows(source, T, 200, rows=5))


def test_rows_are_the_sources_first_windows(source: TokenSource) -> None:
    found = batches(source)
    tokens = torch.from_numpy(source.read(0, 12 * T).astype(np.int64))  # 12 whole windows are in 200 tokens
    assert torch.equal(torch.cat([batch.input_ids for batch in found]).flatten(), tokens)
    ends = torch.cat([batch.input_ids for batch in found]) == EOS
    assert torch.equal(ends, torch.cat([batch.targets for batch in found]) == IGNORED)
    with pytest.raises(PolygluError, match="less than one window of seq_length \\+ 1 = 501"):
        list(validation_rows(source, 500, 200, rows=5))


@pytest.mark.parametrize("scope", ["causal", "document", "sequence"])
def test_losses_are_those_of_each_document(source: TokenSource, scope: RoutingScope) -> None:
    model = sharp_model(routing_scope=scope, seq_length=T)
    found = document_losses(model, batches(source), tau=0.5)
    nats, targets = [], []
    for batch in batches(source):
        logits = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, tau=0.5).flatten(0, 1)
        for start, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
            wanted = batch.targets.flatten()[start:end]
            if (wanted != IGNORED).any():
                nats.append(F.cross_entropy(logits[start:end], wanted, reduction="sum", ignore_index=IGNORED).item())
                targets.append(int((wanted != IGNORED).sum()))
    assert found.targets == targets and found.nats == pytest.approx(nats, rel=1e-5)
    assert found.mean == pytest.approx(sum(nats) / sum(targets), rel=1e-5)


def training_config(tmp_path: Path, scope: RoutingScope) -> TrainConfig:
    rng = np.random.default_rng(1)
    write_token_source(tmp_path / "train", random_documents(rng, 900, vocab_size=50), vocab_size=50)
    values = {
        "model": {**SHAPE, "seq_length": T, "routing_scope": scope},
        "data": {"sources": {"a": {"path": str(tmp_path / "train"), "mix": 1, "mix_end": 1}}},
        "training": {"total_steps": 6, "micro_batch_size": 2, "grad_accum_steps": 2, "precision": "fp32"},
    }
    return validate(TrainConfig, values, source="test")


@pytest.mark.parametrize("scope", ["causal", "document", "sequence"])
def test_honest_losses_are_those_of_causal_routing(source: TokenSource, tmp_path: Path, scope: RoutingScope) -> None:
    config = training_config(tmp_path, scope)
    trained, honest = (sharp_model(routing_scope=one, seq_length=T) for one in (scope, "causal"))
    save_portable(tmp_path / "final.pt", trained.state_dict(), config.model, 6, 0.5, {})
    found = measure(tmp_path / "final.pt", config, {"h": str(source.folder)}, 200)
    expected = document_losses(honest, validation_rows(source, T, 200, 2), 0.5)
    assert found["heldout"]["h"]["nats"] == pytest.approx(expected.nats, rel=1e-5)
    if scope == "causal":
        assert set(found) == {"heldout"}
        return
    expected = document_losses(trained, validation_rows(source, T, 200, 2), 0.5)
    assert found["heldout_as_trained"]["h"]["nats"] == pytest.approx(expected.nats, rel=1e-5)
    assert found["heldout"] != found["heldout_as_trained"]
    rows = list(last_rows(config, 200))
    assert [batch.sample_ids.tolist()[0] for batch in rows] == [20, 22, 16, 18, 12, 14, 8, 10]
    assert found["training"]["all"]["nats"] == pytest.approx(document_losses(honest, rows, 0.5).nats, rel=1e-5)
    as_trained = document_losses(trained, rows, 0.5)
    assert found["training_as_trained"]["all"]["nats"] == pytest.approx(as_trained.nats, rel=1e-5)


def riddles(rng: np.random.Generator, rows: int) -> MicroBatch:
    """Rows of 5 random tokens and then one of 32 tokens again and again: only what comes later tells which."""
    prefix, answer = rng.integers(33, 41, (rows, 5)), rng.integers(1, 33, (rows, 1))
    tokens = np.concatenate([prefix, answer.repeat(8, 1)], 1).astype(np.uint32)
    return pack_windows(tokens[None], np.zeros((1, rows), dtype=np.int64), np.arange(rows)[None])[0]


def test_a_leak_is_found_where_there_is_one() -> None:
    """A model that learns to look ahead has a lower loss as trained; honest routing does not have it."""
    rng = np.random.default_rng(0)
    shape = {**SHAPE, "d_model": 32, "d_ff": 64, "n_layers": 1, "seq_length": 12}
    trained = create_model(ModelConfig(**shape, routing_scope="sequence"))
    loss, optimizer = (
        LanguageModelLoss(trained, torch.float32, "none"),
        torch.optim.AdamW(trained.parameters(), lr=1e-2),
    )
    for _ in range(200):
        batch = riddles(rng, 64)
        (loss(batch, 1.0, None).loss / batch.n_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    honest = create_model(ModelConfig(**shape, routing_scope="causal"))
    honest.load_state_dict(trained.state_dict())
    batch = riddles(rng, 200)
    ahead, behind = (document_losses(model, [batch], 1.0) for model in (trained, honest))
    leak = ratio_estimate((np.array(behind.nats) - np.array(ahead.nats)).tolist(), ahead.targets)
    assert leak.low is not None and leak.low > 0.1


def test_who_sees_ahead() -> None:
    ahead = {
        (scope, routing): sees_ahead(ModelConfig(routing_scope=scope, routing=routing))
        for scope in ("causal", "document", "sequence")
        for routing in ("both", "static", "dynamic")
    }
    assert {pair for pair, sees in ahead.items() if sees} == {
        (scope, routing) for scope in ("document", "sequence") for routing in ("both", "dynamic")
    }
    assert not sees_ahead(ModelConfig(ffn="swiglu"))


def test_data_that_training_sees_are_refused(source: TokenSource, tmp_path: Path) -> None:
    check_heldout([source], [open_source(write_token_source(tmp_path / "other", [3, 4, 0]), "other")])
    copy = open_source(write_token_source(tmp_path / "copy", source.read(0, source.n_tokens).tolist(), vocab_size=50))
    with pytest.raises(PolygluError, match="which is trained on; give data that training never sees"):
        check_heldout([source], [copy])
    foreign = open_source(write_token_source(tmp_path / "foreign", [3, 4, 0], fingerprint="a" * 64))
    with pytest.raises(PolygluError, match="another tokenizer"):
        check_heldout([foreign], [source])
