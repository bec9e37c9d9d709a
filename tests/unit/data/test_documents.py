import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.data import documents
from polyglu.data.documents import sort_out, text_batches
from polyglu.data.quarantine import EMPTY, NOT_JSON, NOT_TEXT, NOT_UTF8, TOO_LONG, BadRecord
from polyglu.data.readers import RowBlock

MAX_BYTES = 12
VALUES: dict[bytes, str | None] = {
    b"words": None,
    "é🙂 ".encode(): None,
    b"x" * 12: None,
    b"\x00": None,
    b"x" * 13: TOO_LONG,
    b"\xff" * 13: TOO_LONG,
    b"": EMPTY,
    b" \n\t\r": EMPTY,
    "\u3000\u00a0\u2003".encode(): EMPTY,
    b"\xff": NOT_UTF8,
    b"\xed\xa0\x80": NOT_UTF8,  # a surrogate, as if it were a character
    "é".encode()[:1]: NOT_UTF8,
    "é".encode()[1:]: NOT_UTF8,
}
"""A value -> what is wrong with it."""


def block_of(values: list[bytes | None], bad: dict[int, BadRecord], start: int = 0) -> RowBlock:
    positions = np.array([[0, 0, start + row] for row in range(len(values))], np.int64)
    return RowBlock(positions, pa.array(values, pa.large_binary()), bad)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*VALUES, None, "bad"]), min_size=1, max_size=40), st.integers(1, 200), st.data())
def test_every_row_is_a_document_or_set_aside(
    rows: list[bytes | str | None], batch_bytes: int, data: st.DataObject
) -> None:
    blocks, start = [], 0
    while start < len(rows):
        size = data.draw(st.integers(1, 10))
        part = rows[start : start + size]
        bad = {index: BadRecord(index, NOT_JSON, 5) for index, row in enumerate(part) if row == "bad"}
        blocks.append(block_of([row if isinstance(row, bytes) else None for row in part], bad, start))
        start += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BATCH_BYTES", batch_bytes)
        batches = list(text_batches(blocks, MAX_BYTES))
    fates: list[bytes | BadRecord] = []
    for batch in batches:
        assert batch.texts.null_count == 0
        texts = dict(zip(batch.row_of.tolist(), batch.texts.to_pylist(), strict=True))
        bad = {record.row: record for record in batch.bad}
        assert list(texts) == sorted(texts) and [record.row for record in batch.bad] == sorted(bad)
        assert texts.keys() | bad.keys() == set(range(len(batch.positions))) and not texts.keys() & bad.keys()
        fates += [bad[row] if row in bad else texts[row].encode() for row in range(len(batch.positions))]
    assert [row for batch in batches for row in batch.positions[:, 2].tolist()] == list(range(len(rows)))
    for row, fate in zip(rows, fates, strict=True):
        if row == "bad":
            assert isinstance(fate, BadRecord) and (fate.kind, fate.bytes) == (NOT_JSON, 5)
        elif row is None:
            assert isinstance(fate, BadRecord) and (fate.kind, fate.bytes) == (NOT_TEXT, None)
        elif isinstance(row, bytes) and VALUES[row] is None:
            assert fate == row
        else:
            assert isinstance(fate, BadRecord) and (fate.kind, fate.bytes) == (VALUES[row], len(row))


def test_a_document_that_begins_in_the_middle_of_a_character_does_not_complete_the_one_before() -> None:
    whole = "aé".encode()
    batch = sort_out(block_of([whole[:2], whole[2:]], {}))
    assert [record.kind for record in batch.bad] == [NOT_UTF8, NOT_UTF8]
