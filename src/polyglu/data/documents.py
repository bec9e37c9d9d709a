"""From blocks of rows to batches of documents: what is not a document is set aside, with its reason.

RowBlock ──(joined to BATCH_BYTES)──► null? too long? UTF-8? empty? ──► TextBatch
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from polyglu.data.quarantine import EMPTY, NOT_TEXT, NOT_UTF8, TOO_LONG, BadRecord
from polyglu.data.readers import RowBlock, join_blocks

BATCH_BYTES = 8 << 20
"""Text encoded together, at least, but for a source's last batch."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextBatch:
    """Consecutive rows of a source, and the documents in them."""

    texts: pa.LargeStringArray
    """``[documents]``: valid UTF-8, none null."""
    row_of: Integers
    """``[documents]``: the row of each document, as an index into ``positions``; rising."""
    positions: Integers
    """``[rows, 3]``: file, row group and row of each row of the source; rising."""
    bad: tuple[BadRecord, ...]
    """In the order of their rows."""


def text_batches(blocks: Iterable[RowBlock], max_bytes: int) -> Iterator[TextBatch]:
    """Join blocks to batches of about ``BATCH_BYTES`` and sort each out.

    Args:
        blocks: rows of a source.
        max_bytes: length of the longest document that is taken.
    """
    parts: list[RowBlock] = []
    size = 0
    for block in blocks:
        parts.append(without_long(block, max_bytes))
        # Rows without text count too, so that a source of nothing but bad rows does not fill the memory.
        size += parts[-1].values.nbytes + block.positions.nbytes
        if size >= BATCH_BYTES:
            yield sort_out(join_blocks(parts))
            parts, size = [], 0
    if parts:
        yield sort_out(join_blocks(parts))


def without_long(block: RowBlock, max_bytes: int) -> RowBlock:
    """Let go of texts longer than ``max_bytes``, before they are copied or wait."""
    lengths = np.asarray(pc.binary_length(block.values).fill_null(0))
    long = lengths > max_bytes
    if not long.any():
        return block
    bad = {row: BadRecord(row, TOO_LONG, int(lengths[row])) for row in np.flatnonzero(long).tolist()}
    return replace(block, values=pc.if_else(pa.array(long), None, block.values), bad={**block.bad, **bad})


def sort_out(block: RowBlock) -> TextBatch:
    """Take the documents of a block, and say of each other row what is wrong with it."""
    values = block.values
    usable = np.asarray(values.is_valid())
    lengths = np.asarray(pc.binary_length(values).fill_null(0))
    bad = dict(block.bad)
    for row in np.flatnonzero(~usable).tolist():
        bad.setdefault(row, BadRecord(row, NOT_TEXT, None))
    row_of = np.flatnonzero(usable)
    texts, encoded = _as_text(values.filter(pa.array(usable)))
    for row in row_of[~encoded].tolist():
        bad[row] = BadRecord(row, NOT_UTF8, int(lengths[row]))
    row_of = row_of[encoded]
    blank = np.asarray(pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts)))
    for row in row_of[blank].tolist():
        bad[row] = BadRecord(row, EMPTY, int(lengths[row]))
    if blank.any():
        texts, row_of = texts.filter(pa.array(~blank)), row_of[~blank]
    return TextBatch(texts, row_of, block.positions, tuple(bad[row] for row in sorted(bad)))


def _as_text(values: pa.LargeBinaryArray) -> tuple[pa.LargeStringArray, npt.NDArray[np.bool_]]:
    """Those of the values that are UTF-8, and which they are."""
    try:
        return values.cast(pa.large_string()), np.ones(len(values), bool)  # checks the encoding of all together
    except pa.ArrowInvalid:
        encoded = np.array([_is_utf8(value.as_py()) for value in values], bool)
        return values.filter(pa.array(encoded)).cast(pa.large_string()), encoded


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
