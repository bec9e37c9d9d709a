import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.data import readers
from polyglu.data.chunk_writer import START
from polyglu.data.data_file import local_file
from polyglu.data.quarantine import LONE_SURROGATE, NOT_JSON, NOT_TEXT, NOT_UTF8, TOO_LONG
from polyglu.data.readers import RowBlock, join_blocks, read_blocks
from polyglu.errors import PolygluError

MAX_BYTES = 1000


def read(paths: list[Path], start: tuple[int, int, int] = (0, 0, 0), field: str = "text") -> RowBlock:
    cursor = dict(zip(("file", "row_group", "row"), start, strict=True))
    blocks = list(read_blocks([local_file(path) for path in paths], field, cursor, MAX_BYTES))
    assert all(len(block.values) == len(block.positions) > 0 for block in blocks)
    return join_blocks(blocks)


def rows_of(block: RowBlock) -> list[tuple[tuple[int, ...], Any]]:
    """Position and text of each row, or what is wrong with it."""
    found = []
    for index, (position, value) in enumerate(zip(block.positions.tolist(), block.values.to_pylist(), strict=True)):
        assert (index in block.bad) <= (value is None)
        found.append((tuple(position), block.bad[index].kind if index in block.bad else value))
    return found


def test_every_kind_of_file_from_every_row(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo", "id": 1}, {"text": None, "id": 2}, {"text": "é🙂", "id": 3}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n", 1) + b"\n  \n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines) + gzip.compress(lines))
    (tmp_path / "c.v2.json.zst").write_bytes(zstandard.compress(lines) + zstandard.compress(lines.rstrip()))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=2)
    (tmp_path / "e.txt").write_text("one\n\ntwo", encoding="utf-8")
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"three"))
    paths = sorted(tmp_path.iterdir())
    texts = [b"one\ntwo", None, "é🙂".encode()]
    expected = [((0, 0, row), text) for row, text in enumerate(texts)]
    expected += [((file, 0, row), text) for file in (1, 2) for row, text in enumerate(texts * 2)]
    expected += [((3, 0, 0), texts[0]), ((3, 0, 1), texts[1]), ((3, 1, 0), texts[2])]
    expected += [((4, 0, 0), b"one\n\ntwo"), ((5, 0, 0), b"three")]
    assert rows_of(read(paths)) == expected
    for index, (position, _) in enumerate(expected):
        assert rows_of(read(paths, position)) == expected[index:]
        file, group, row = position  # behind a row, which may be the last of its group or file
        if index + 1 < len(expected):
            assert rows_of(read(paths, (file, group, row + 1))) == expected[index + 1 :]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()])
@pytest.mark.parametrize("dictionary", [False, True])
def test_columns_of_text_whatever_their_type(tmp_path: Path, kind: pa.DataType, dictionary: bool) -> None:
    values = ["a", "b" * 500, None, "a"] * 40
    column = pa.array(values, kind)
    if dictionary:
        if kind == pa.string_view():
            pytest.skip("Arrow has no dictionary of views")
        column = column.dictionary_encode()
    pa.parquet.write_table(pa.table({"n": range(160), "text": column}), tmp_path / "a.parquet", row_group_size=100)
    found = read([tmp_path / "a.parquet"])
    assert found.values.to_pylist() == [value and value.encode() for value in values]
    assert found.positions[:, 1:].tolist() == [[row // 100, row % 100] for row in range(160)]


LINES = {
    b'{"text": "x"}': b"x",
    b' {"a": {"text": "no"}, "text": "y\\n\\u00e9"} ': "y\né".encode(),
    b'{"text": "raw \xc3\xa9 \xf0\x9f\x99\x82"}': "raw é 🙂".encode(),
    b'{"text": ""}': b"",
    b'{"text": null}': NOT_TEXT,
    b'{"text": 7}': NOT_TEXT,
    b'{"text": ["x"]}': NOT_TEXT,
    b'{"body": "x"}': NOT_TEXT,
    b'{"text": "\\ud800"}': LONE_SURROGATE,
    b'{"text": "\xff"}': NOT_UTF8,
    b'{"text": "x", "other": "\xff"}': NOT_UTF8,
    b'{"text": "x", "text": "twice"}': b"twice",
    b'{"text": "x", "other": "\\udc00"}': b"x",
    b"{oops}": NOT_JSON,
    b'"x"': NOT_JSON,
    b"[1]": NOT_JSON,
    b'{"text": "a"} {"text": "b"}': NOT_JSON,
    b'{"text":': NOT_JSON,
    b'"cut"}': NOT_JSON,
    b"[" * 300: NOT_JSON,
    b"": "blank",
    b"  ": "blank",
    b'{"text": "' + b"z" * 300 + b'"}': b"z" * 300,
    b'{"text": "' + b"z" * 900 + b'"}': TOO_LONG,
}
"""A line -> its text, or what is wrong with it."""
GOOD = [line for line, found in LINES.items() if isinstance(found, bytes)]


@settings(deadline=None, max_examples=200)
@given(
    lines=st.lists(st.sampled_from([*LINES, *GOOD * 3]), min_size=1, max_size=30),
    block_bytes=st.sampled_from([7, 50, 400, 10_000]),
    newline=st.booleans(),
    data=st.data(),
)
def test_lines_are_the_same_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block_bytes: int, newline: bool, data: st.DataObject
) -> None:
    """Good ones, bad ones, long ones: each line's fate is its own, wherever blocks end and reading starts."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + b"\n".join(lines) + b"\n" * newline)
    expected = [((0, 0, 0), b"first")]
    for row, line in enumerate(lines, start=1):
        if LINES[line] != "blank":
            expected.append(((0, 0, row), LINES[line]))
    start = data.draw(st.sampled_from([position for position, _ in expected]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block_bytes)
        patch.setattr(readers, "LINE_BYTES", 400)
        cursor = {"file": 0, "row_group": 0, "row": start[2]}
        blocks = list(read_blocks([local_file(path)], "text", cursor, 50))
    found = rows_of(join_blocks(blocks)) if blocks else []
    expected = [row for row in expected if row[0] >= start]
    assert [position for position, _ in found] == [position for position, _ in expected]
    for (_, text), (_, wanted) in zip(found, expected, strict=True):
        assert text == wanted or (wanted == NOT_TEXT and text is None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 50, mtime=0)[:-20], "cannot be read"),
        ("a.txt.zst", b"not zstandard", "cannot be read"),
        ("a.parquet", b"not parquet", "cannot be read as Parquet"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "no field 'text'; its fields are body, id"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PolygluError, match=message) as error:
        list(read_blocks([local_file(tmp_path / name)], "text", START, MAX_BYTES))
    assert str(tmp_path / name) in str(error.value)


def test_columns_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), path)
    with pytest.raises(PolygluError, match=r"a\.parquet: column 'text' holds int64, not text"):
        read([path])
    with pytest.raises(PolygluError, match=r"no field 'content'; its fields are text, body"):
        read([path], field="content")
    assert read([path], field="body").values.to_pylist() == [b"a", b"b"]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": [f"{n} words" * 9 for n in range(2000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(PolygluError, match=r"a\.parquet cannot be read as Parquet"):
        read([path])


@pytest.mark.parametrize("name", ["a.csv", "a.parquet.gz", "a.jsonl.bz2", "a"])
def test_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(PolygluError, match="of an unknown kind"):
        local_file(tmp_path / name)
    with pytest.raises(PolygluError, match="does not exist"):
        local_file(tmp_path / "none.jsonl")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"a\xff.jsonl")
    path.write_text('{"text": "x"}')
    with pytest.raises(PolygluError, match="rename it"):
        local_file(path)
