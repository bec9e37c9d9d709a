import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.data.dataloader import IGNORED
from polyglu.data.sft_dataset import Conversations, collate_pack, load_conversations, pack
from polyglu.data.tokenizer import Tokenizer, train_bpe
from polyglu.errors import PolygluError

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
GOOD = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, {"role": "user", "content": "why?"}, ANSWER]}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(["user\nassistant\n2 + 2 is 4"] * 9, 280, tmp_path_factory.mktemp("bpe"))


def load(file: Path, tokenizer: Tokenizer, seq_length: int = 100, limit: int | None = None) -> Conversations:
    return load_conversations(
        files=[file], dataset=None, config=None, splits=(), revision=None,
        tokenizer=tokenizer, seq_length=seq_length, max_conversations=limit,
    )  # fmt: skip


def write(folder: Path, rows: Sequence[Any]) -> Path:
    path = folder / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_unusable_rows_are_counted_by_kind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tools = [
        {**GOOD[0], "tools": [{"name": "calculator"}]},
        {"messages": [USER, {**ANSWER, "tool_calls": [{"id": 1}]}]},
    ]
    tools.append({"messages": [USER, {"role": "tool", "content": "4"}, ANSWER]})
    malformed = [{}, {"messages": None}, {"messages": []}, {"messages": "hi"}, {"messages": [USER]}, {"messages": [3]}]
    malformed += [
        {"messages": [{"role": "alien", "content": "x"}, ANSWER]},
        {"messages": [USER, {"role": "assistant"}]},
    ]
    malformed += [
        {"messages": [USER, {**ANSWER, "content": "\ud800"}]},
        {"messages": [{**USER, "content": ["x"]}, ANSWER]},
    ]
    long = [{"messages": [USER, {**ANSWER, "content": "4" * 200}]}]
    empty_tools = [{**GOOD[0], "tools": []}, {**GOOD[0], "tools": None}, {**GOOD[0], "tools": "[]"}]
    conversations = load(write(tmp_path, [*GOOD, *tools, *malformed, *long, *empty_tools]), tokenizer)
    assert conversations.counts == {"used": 5, "tools": 3, "malformed": len(malformed), "too_long": 1}
    assert len(conversations.lengths) == 5


def test_conversation_of_exactly_the_limit_is_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path, GOOD[:1])
    length = int(load(file, tokenizer).lengths[0])
    assert load(file, tokenizer, seq_length=length).counts["used"] == 1
    with pytest.raises(PolygluError, match="no usable conversation.*1 too_long"):
        load(file, tokenizer, seq_length=length - 1)


def test_without_an_assistant_turn_there_is_nothing_to_learn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match="no usable conversation with an assistant turn"):
        load(write(tmp_path, [{"messages": [USER]}]), tokenizer)
    with pytest.raises(PolygluError, match="give the conversations"):
        load_conversations(
            files=[], dataset=None, config=None, splits=(), revision=None,
            tokenizer=tokenizer, seq_length=9, max_conversations=None,
        )  # fmt: skip


def test_parquet_equals_jsonl_and_the_limit_holds(tokenizer: Tokenizer, tmp_path: Path) -> None:
    jsonl = load(write(tmp_path, GOOD), tokenizer)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "sft.parquet")
    parquet = load(tmp_path / "sft.parquet", tokenizer)
    assert parquet.digest == jsonl.digest
    first = load(tmp_path / "sft.parquet", tokenizer, limit=1)
    assert len(first.lengths) == 1 and first.digest != jsonl.digest


def test_collated_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    conversations = load(write(tmp_path, GOOD), tokenizer)
    input_ids, targets, cu_seqlens = collate_pack(conversations, [1, 0])
    assert input_ids.shape == targets.shape == (1, int(conversations.lengths.sum()))
    assert cu_seqlens.tolist() == [0, int(conversations.lengths[1]), int(conversations.lengths.sum())]
    taught = [int(token) for token in targets[0] if token != IGNORED]
    assert tokenizer.decode(taught) == "4<|im_end|>" * 3
    header = tokenizer.encode("assistant\n")
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        ids, aims = input_ids[0, start:stop].tolist(), targets[0, start:stop].tolist()
        assert aims[-1] == IGNORED  # nothing is learned across conversations
        assert all(aim in (IGNORED, following) for aim, following in zip(aims[:-1], ids[1:], strict=True))
        first = next(place for place, aim in enumerate(aims) if aim != IGNORED)
        assert ids[first + 1 - len(header) : first + 1] == header  # the answer's first token is predicted at its header


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 50), max_size=200), capacity=st.integers(50, 120), seed=st.integers(0, 9))
def test_each_conversation_is_in_one_pack(lengths: list[int], capacity: int, seed: int) -> None:
    packs = pack(lengths, capacity, seed, epoch=0)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert all(members and sum(lengths[index] for index in members) <= capacity for members in packs)
    assert packs == pack(lengths, capacity, seed, epoch=0)


def test_packs_are_well_filled_and_differ_between_epochs_and_seeds() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, size=2000)
    packs = pack(lengths, 1024, seed=1, epoch=0)
    assert lengths.sum() / (len(packs) * 1024) > 0.95
    assert packs != pack(lengths, 1024, seed=1, epoch=1) != pack(lengths, 1024, seed=2, epoch=1)


def test_conversation_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(PolygluError, match="does not fit"):
        pack([5, 11], 10, seed=0, epoch=0)
