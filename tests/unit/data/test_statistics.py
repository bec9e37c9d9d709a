import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EOS, write_token_source

from polyglu.data.chunks import open_source
from polyglu.data.statistics import (
    Documents,
    cut_statistics,
    find_repeats,
    length_edges,
    length_histogram,
    length_statistics,
    scan_documents,
    take_samples,
)
from polyglu.data.tokenizer import train_bpe

Texts = st.lists(st.lists(st.integers(1, 3), max_size=6), min_size=1, max_size=25)
"""Documents so short and of so few tokens that many are alike."""


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in [*document, EOS]]


def scan(folder: Path, documents: list[list[int]], chunk_tokens: int = 5, block: int = 7, **other: str) -> Documents:
    return scan_documents(
        open_source(write_token_source(folder, flat(documents), chunk_tokens=chunk_tokens, **other)), block_tokens=block
    )


@settings(deadline=None, max_examples=60)
@given(documents=Texts, chunk_tokens=st.integers(1, 40), block=st.integers(1, 40))
def test_documents_are_whole_whatever_chunks_and_blocks_cut(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], chunk_tokens: int, block: int
) -> None:
    read: list[int] = []
    folder = write_token_source(tmp_path_factory.mktemp("data"), flat(documents), chunk_tokens=chunk_tokens)
    found = scan_documents(open_source(folder), read.append, block)
    assert found.lengths.tolist() == [len(document) + 1 for document in documents]
    assert sum(read) == 4 * len(flat(documents))
    salt = hashlib.sha256(b"f" * 64).digest()[:16]
    for document, digest in zip(documents, found.digests, strict=True):
        plain = hashlib.sha256(np.array([*document, EOS], "<u4").tobytes()).digest()[:16]
        assert digest.tobytes() == bytes(a ^ b for a, b in zip(plain, salt, strict=True))


def test_what_follows_the_last_end_is_no_document(tmp_path: Path) -> None:
    folder = write_token_source(tmp_path, [1, EOS, 2, 2], chunk_tokens=3)
    assert scan_documents(open_source(folder), block_tokens=1).lengths.tolist() == [2]


@settings(deadline=None, max_examples=60)
@given(sources=st.lists(Texts, min_size=1, max_size=4))
def test_repeats_are_those_that_a_set_finds(
    tmp_path_factory: pytest.TempPathFactory, sources: list[list[list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("data")
    scanned = [scan(folder / str(index), documents) for index, documents in enumerate(sources)]
    before: set[tuple[int, ...]] = set()
    for documents, (within, across) in zip(sources, find_repeats([each.digests for each in scanned]), strict=True):
        own: set[tuple[int, ...]] = set()
        for document, is_within, is_across in zip(map(tuple, documents), within, across, strict=True):
            assert is_within == (document in own)
            assert is_across == (document not in own and document in before)
            own.add(document)
        before |= own


def test_half_a_digest_in_common_is_no_repeat() -> None:
    digests = np.array([[1, 2], [1, 3], [4, 2], [1, 2], [1, 3]], dtype=np.uint64)
    ((within, across),) = find_repeats([digests])
    assert within.tolist() == [False, False, False, True, True] and not across.any()


def test_no_documents_no_repeats() -> None:
    none = np.zeros((0, 2), np.uint64)
    assert [flag.tolist() for pair in find_repeats([none, none]) for flag in pair] == [[], [], [], []]


def test_tokens_of_another_tokenizer_are_another_document(tmp_path: Path) -> None:
    one, other = scan(tmp_path / "a", [[1], [2]]), scan(tmp_path / "b", [[1], [2]], fingerprint="e" * 64)
    assert not any(flags.any() for flags in find_repeats([one.digests, other.digests])[1])


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 12), max_size=20), rest=st.integers(0, 9), seq_length=st.integers(1, 15))
def test_cuts_are_those_of_windows_laid_over_the_documents(lengths: list[int], rest: int, seq_length: int) -> None:
    owner = [index for index, length in enumerate(lengths) for _ in range(length)] + [-1] * rest
    windows, cutting, cut = 0, 0, set()
    while (windows + 1) * seq_length + 1 <= len(owner):  # a window needs its inputs and one target more
        last, following = owner[(windows + 1) * seq_length - 1 : (windows + 1) * seq_length + 1]
        if last == following:
            cutting += 1
            cut |= {last} - {-1}
        windows += 1
    assert cut_statistics(np.array(lengths, np.int64), len(owner), seq_length) == {
        "windows": windows,
        "cutting": cutting,
        "documents_cut": len(cut),
        "documents_longer": sum(length > seq_length for length in lengths),
    }


@given(lengths=st.lists(st.integers(1, 100_000), min_size=1, max_size=50))
def test_every_document_is_in_the_bin_of_its_length(lengths: list[int]) -> None:
    array = np.array(lengths)
    edges = length_edges(int(array.max()))
    assert edges[0] == 1 and (np.diff(edges) > 0).all() and edges[-1] > array.max()
    documents, tokens = length_histogram(array, edges)
    for low, high, count, total in zip(edges[:-1], edges[1:], documents, tokens, strict=True):
        inside = [length for length in lengths if low <= length < high]
        assert (count, total) == (len(inside), sum(inside))


def test_statistics_of_lengths() -> None:
    numbers = length_statistics(np.arange(1, 102))
    assert numbers == {
        "mean": 51, "min": 1, "p5": 6, "p25": 26, "p50": 51, "p75": 76, "p95": 96, "p99": 100, "max": 101,
    }  # fmt: skip
    assert length_statistics(np.zeros(0, np.int64)) == {}


def test_samples_are_spread_over_the_source_and_say_how_much_they_show(tmp_path: Path) -> None:
    texts = [f"text number {index} " * (1 + 60 * (index == 9)) for index in range(10)]
    tokenizer = train_bpe(["a b c"], 259, tmp_path / "bpe")
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    folder = write_token_source(tmp_path / "data", sum(ids, []), vocab_size=tokenizer.vocab_size, chunk_tokens=50)
    source = open_source(folder)
    lengths = np.array([len(each) for each in ids])
    first, middle, last = take_samples(source, tokenizer, lengths, 3)
    assert [sample.document for sample in (first, middle, last)] == [0, 4, 9]
    assert first.text.startswith(texts[0]) and first.shown == first.length == len(ids[0])
    assert texts[9].startswith(last.text) and last.shown == 256 < last.length == len(ids[9])
    assert len(take_samples(source, tokenizer, lengths, 99)) == 10 and not take_samples(source, tokenizer, lengths, 0)
