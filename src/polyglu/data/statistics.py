"""Numbers about tokenised documents: how long they are, which are repeated, how windows cut them.

    TokenSource ──(blocks)──► Documents: lengths, digests ─┬─► length_statistics, length_histogram
                                                           ├─► cut_statistics(seq_length)
                             digests of all sources ───────┴─► find_repeats

A document takes 24 bytes of memory, whatever its length. Lengths are in tokens, the end-of-document token included.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyglu.data.chunks import TOKEN, TokenSource
from polyglu.data.tokenizer import Tokenizer

Integers = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

BLOCK_TOKENS = 1 << 22
"""Tokens read at a time."""
PERCENTILES = (5, 25, 50, 75, 95, 99)
SHOWN_TOKENS = 256
"""Tokens of a sample that are decoded."""


@dataclass(frozen=True)
class Documents:
    """All documents of a source, in their order."""

    lengths: Integers
    """``[documents]``, tokens."""
    digests: Digests
    """``[documents, 2]``: the first 128 bits of the SHA-256 of each document's tokens, salted by the tokenizer."""


@dataclass(frozen=True)
class Sample:
    """The beginning of a document."""

    document: int
    """Its index in the source."""
    length: int
    """All its tokens."""
    shown: int
    """Tokens that are decoded."""
    text: str


def scan_documents(
    source: TokenSource, advance: Callable[[int], object] = lambda _: None, block_tokens: int = BLOCK_TOKENS
) -> Documents:
    """Read a source once, in blocks; a last document without its end-of-document token is passed over.

    Equal documents have equal digests if they were made with the same tokenizer. That any two different ones among n
    documents share a digest has a probability below n² / 2^129: for 10^9 documents, 1.5e-21.

    Args:
        source: opened for reading.
        advance: told how many more bytes are read, for a progress bar.
        block_tokens: read at a time.
    """
    lengths, digests = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.uint64)]
    begun, behind = hashlib.sha256(), 0  # the document that spans into the next block, and its tokens so far
    for start in range(0, source.n_tokens, block_tokens):
        tokens = source.read(start, min(start + block_tokens, source.n_tokens)).astype(TOKEN, copy=False)
        ends = np.flatnonzero(tokens == source.eos_id) + 1
        view = tokens.view(np.uint8).data
        found, place = [], 0
        for end in (ends * TOKEN.itemsize).tolist():
            begun.update(view[place:end])
            found.append(begun.digest())
            begun, place = hashlib.sha256(), end
        begun.update(view[place:])
        lengths.append(np.diff(ends, prepend=-behind))
        digests.append(np.frombuffer(b"".join(found), np.uint64).reshape(-1, 4)[:, :2].copy())
        behind = len(tokens) - int(ends[-1]) if len(ends) else behind + len(tokens)
        advance(len(view))
    salt = hashlib.sha256(source.manifest["tokenizer"]["fingerprint"].encode()).digest()
    return Documents(np.concatenate(lengths), np.concatenate(digests) ^ np.frombuffer(salt, np.uint64)[:2])


def find_repeats(digests: Sequence[Digests]) -> list[tuple[Flags, Flags]]:
    """Find the documents that repeat an earlier one, of the same source or of a source before it.

    Args:
        digests: of each source ``[documents, 2]``.

    Returns:
        For each source two flags a document ``[documents]``, never both set: an earlier document of the source itself
        is the same; only one of a source before it is.
    """
    lengths = [len(each) for each in digests]
    joined = np.concatenate([np.zeros((0, 2), np.uint64), *digests])
    source = np.repeat(np.arange(len(lengths)), lengths)
    twins = _twins(np.ascontiguousarray(joined[:, 0]))
    order = twins[np.lexsort((joined[twins, 1], joined[twins, 0]))]  # stable: equal ones stay in their order
    same = (joined[order[1:]] == joined[order[:-1]]).all(1)
    same_source = source[order[1:]] == source[order[:-1]]
    within, across = np.zeros(len(joined), bool), np.zeros(len(joined), bool)
    within[order[1:]], across[order[1:]] = same & same_source, same & ~same_source
    cuts = np.cumsum(lengths)[:-1]
    return list(zip(np.split(within, cuts), np.split(across, cuts), strict=True))


def _twins(values: npt.NDArray[np.uint64]) -> Integers:
    """Indices, rising, of the values that occur more than once: few of many, and found by one fast sort."""
    order = np.argsort(values)
    equal = values[order[1:]] == values[order[:-1]]
    twin = np.append(equal, False) | np.append(False, equal)
    return np.sort(order[twin[: len(values)]])


def length_statistics(lengths: Integers) -> dict[str, float]:
    """Mean, least, greatest and percentiles of ``[documents]`` lengths, tokens; nothing of no documents."""
    if not len(lengths):
        return {}
    percentiles = zip(PERCENTILES, np.percentile(lengths, PERCENTILES), strict=True)
    return {
        "mean": float(lengths.mean()),
        "min": int(lengths.min()),
        **{f"p{percent}": float(value) for percent, value in percentiles},
        "max": int(lengths.max()),
    }


def length_edges(longest: int) -> Integers:
    """Edges of length bins up to ``longest``, two bins an octave: 1, 2, 3, 4, 6, 8, 12, 16, 23 and so on."""
    exponents = np.arange(2, max(3.0, 2 * np.log2(max(1, longest)) + 2))
    return np.concatenate([[1], np.ceil(2 ** (exponents / 2)).astype(np.int64)])


def length_histogram(lengths: Integers, edges: Integers) -> tuple[Integers, Integers]:
    """Documents, and their tokens, with ``edges[i] <= length < edges[i + 1]``: ``[bins]`` each."""
    documents, _ = np.histogram(lengths, edges)
    tokens, _ = np.histogram(lengths, edges, weights=lengths)
    return documents, tokens


def cut_statistics(lengths: Integers, n_tokens: int, seq_length: int) -> dict[str, int]:
    """Count what training windows of ``seq_length`` inputs cut.

    Window w has the tokens from w * seq_length on; there are (n_tokens - 1) // seq_length of them. It cuts a document
    if its last input is not the document's last token.

    Args:
        lengths: of all documents ``[documents]``, which are the first tokens of the source.
        n_tokens: of the source.
        seq_length: tokens of a window.

    Returns:
        ``windows``, ``cutting``: windows that cut a document, ``documents_cut``, and ``documents_longer``: documents
        longer than a window, so that a cut cannot be avoided.
    """
    windows = max(0, n_tokens - 1) // seq_length
    ends = np.cumsum(lengths)
    borders = np.arange(1, windows + 1) * seq_length
    documents = np.searchsorted(ends, borders)  # the one that a border is in, or at the end of
    inside = np.append(ends, -1)[documents] != borders
    return {
        "windows": windows,
        "cutting": int(inside.sum()),
        "documents_cut": len(np.unique(documents[inside & (documents < len(ends))])),
        "documents_longer": int((lengths > seq_length).sum()),
    }


def take_samples(source: TokenSource, tokenizer: Tokenizer, lengths: Integers, count: int) -> list[Sample]:
    """Decode the beginnings of documents, evenly spread over the source.

    Args:
        source: opened for reading.
        tokenizer: the one that made it.
        lengths: of all documents ``[documents]``.
        count: how many, if there are so many.
    """
    ends, samples = np.cumsum(lengths), []
    for index in np.linspace(0, len(lengths) - 1, num=min(count, len(lengths)), dtype=np.int64):
        start, shown = int(ends[index] - lengths[index]), min(int(lengths[index]), SHOWN_TOKENS)
        text = tokenizer.decode(source.read(start, start + shown).tolist())
        samples.append(Sample(int(index), int(lengths[index]), shown, text))
    return samples
