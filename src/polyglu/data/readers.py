"""The text column of files, in blocks of rows: Parquet and JSON lines without a Python loop per row.

    DataFile ──► .parquet  row groups, PARQUET_ROWS rows at a time       ┐
             ──► .jsonl    blocks of lines, parsed by Arrow together     ├──► RowBlock ──► documents (data/documents.py)
             ──► .txt      the file is one document                      ┘

A block of lines that Arrow refuses is halved until the bad line is alone. Which rows there are, and what becomes of
each, depends neither on the lines around it nor on where reading starts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from polyglu.data.data_file import DataFile, open_decompressed
from polyglu.data.quarantine import LONE_SURROGATE, NOT_JSON, NOT_TEXT, NOT_UTF8, TOO_LONG, BadRecord
from polyglu.errors import PolygluError

PARQUET_ROWS = 32
"""Rows decoded at a time, at most: few, for each may hold megabytes."""
PARQUET_BYTES = 1 << 20
"""Fewer, where so many of the row group's mean length are longer than this."""
PARQUET_BUFFER = 1 << 20
"""Bytes of a column chunk read at a time; without it the whole chunk would be."""
BLOCK_BYTES = 8 << 20
"""Bytes of lines parsed together."""
LINE_BYTES = 64 << 20
"""A longer line is not parsed, unless ``max_document_bytes`` asks for more."""
RENAME = "rename the one that holds the text, or set text_field."
NEWLINE, RETURN, OPEN, CLOSE = b"\n\r{}"

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a source."""

    positions: Integers
    """``[rows, 3]``: file, row group and row of each; rising."""
    values: pa.LargeBinaryArray
    """``[rows]``: the text of each row, as bytes; null where there is none."""
    bad: Mapping[int, BadRecord]
    """Index among the rows -> what the reader found wrong; ``values`` is null there."""


def join_blocks(blocks: Sequence[RowBlock]) -> RowBlock:
    """Blocks that follow one another, as one."""
    if len(blocks) == 1:
        return blocks[0]
    starts = np.cumsum([0, *(len(block.values) for block in blocks)]).tolist()
    bad = [record for block, start in zip(blocks, starts, strict=False) for record in _moved(block.bad, start)]
    return RowBlock(
        np.concatenate([block.positions for block in blocks]),
        pa.concat_arrays([block.values for block in blocks]),
        {record.row: record for record in bad},
    )


def _moved(bad: Mapping[int, BadRecord], start: int) -> list[BadRecord]:
    return [replace(record, row=record.row + start) for record in bad.values()]


def read_blocks(files: Sequence[DataFile], field: str, start: Mapping[str, int], max_bytes: int) -> Iterator[RowBlock]:
    """Rows of a source from a cursor on.

    Args:
        files: of the source, in order.
        field: column that holds the text.
        start: file, row group and row to begin at.
        max_bytes: length of the longest document that is wanted; what cannot hold a shorter one is not parsed.

    Raises:
        PolygluError: a file that cannot be read, or one without the column.
    """
    for index in range(start["file"], len(files)):
        file = files[index]
        group, row = (start["row_group"], start["row"]) if index == start["file"] else (0, 0)
        if file.kind == ".parquet":
            yield from _parquet(file, index, field, group, row)
        elif file.kind == ".jsonl":
            yield from _json_lines(file, index, field, row, max_bytes)
        elif row == 0:
            yield _text_file(file, index, max_bytes)


def _parquet(file: DataFile, index: int, field: str, group: int, row: int) -> Iterator[RowBlock]:
    try:
        with file.open() as handle, pa.parquet.ParquetFile(handle, buffer_size=PARQUET_BUFFER) as parquet:
            _check_column(parquet.schema_arrow, field, file.path)
            for current in range(group, parquet.num_row_groups):
                first = row if current == group else 0
                number = 0
                # One group at a time: its rows are counted from 0, and only its bytes are fetched.
                size = _batch_rows(parquet.metadata.row_group(current), field)
                for batch in parquet.iter_batches(size, [current], [field], use_threads=False):
                    number += len(batch)
                    wanted = min(len(batch), number - first)
                    if wanted > 0:
                        values = batch.column(0)[len(batch) - wanted :].cast(pa.large_binary())
                        yield RowBlock(_positions(index, current, np.arange(number - wanted, number)), values, {})
    except (pa.ArrowException, OSError) as error:
        raise PolygluError(
            f"input file {file.path} cannot be read as Parquet ({error}); repair or replace it."
        ) from error


def _batch_rows(group: Any, field: str) -> int:
    columns = (group.column(index) for index in range(group.num_columns))
    size: int = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
    return max(1, min(PARQUET_ROWS, int(group.num_rows) * PARQUET_BYTES // max(1, size)))


def _check_column(schema: pa.Schema, field: str, path: str) -> None:
    if field not in schema.names:
        raise PolygluError(f"{path} has no field '{field}'; its fields are {', '.join(schema.names)}: {RENAME}")
    kind = schema.field(field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(test(kind) for test in (*tests, pa.types.is_string_view, pa.types.is_binary_view, pa.types.is_null)):
        raise PolygluError(f"{path}: column '{field}' holds {kind}, not text; set text_field to a column of text.")


def _json_lines(file: DataFile, index: int, field: str, row: int, max_bytes: int) -> Iterator[RowBlock]:
    longest = max(LINE_BYTES, 8 * max_bytes)
    first = 0
    with open_decompressed(file) as handle:
        for lines in _line_blocks(handle, longest):
            if index == row == first == 0:
                _check_first(lines, field, file.path)
            skip = max(0, row - first)
            if isinstance(lines, int):
                if not skip:
                    yield _block_of_one(index, first, None, TOO_LONG, lines)
                first += 1
                continue
            data = np.frombuffer(lines, np.uint8)
            stops = np.flatnonzero(data == NEWLINE)
            if data[-1] != NEWLINE:
                stops = np.append(stops, len(data))
            starts = np.concatenate([[0], stops[:-1] + 1])
            wanted = np.flatnonzero(stops > starts)
            wanted = wanted[wanted >= skip]
            yield from _parse_lines(lines, starts[wanted], stops[wanted], wanted + first, index, field, longest)
            first += len(stops)


def _line_blocks(handle: BinaryIO, longest: int) -> Iterator[bytes | int]:
    """Whole lines together, or the length of a single line that is longer than ``longest`` and was not kept."""
    pending, passed, begun = b"", 0, False
    while data := handle.read(BLOCK_BYTES):
        if not begun:
            data, begun = data.removeprefix(b"\xef\xbb\xbf"), True
        if passed:
            end = data.find(b"\n")
            if end < 0:
                passed += len(data)
                continue
            yield passed + end
            data, passed = data[end + 1 :], 0
        cut = data.rfind(b"\n") + 1
        if cut:
            yield pending + data[:cut]
            pending = data[cut:]
        else:
            pending += data
        if len(pending) > longest:
            pending, passed = b"", len(pending)
    if passed:
        yield passed
    elif pending:
        yield pending


def _parse_lines(
    lines: bytes, starts: Integers, stops: Integers, rows: Integers, file: int, field: str, longest: int
) -> Iterator[RowBlock]:
    """Parse the lines at ``starts`` to ``stops`` together or, if Arrow refuses, in halves down to the bad ones."""
    if not len(rows):
        return
    data = np.frombuffer(lines, np.uint8)
    ends = stops - (data[stops - 1] == RETURN)
    objects = (data[starts] == OPEN) & (data[ends - 1] == CLOSE) & (ends - starts <= longest)
    values = _parse_together(lines[starts[0] : stops[-1]], field) if objects.all() else None
    if values is not None and len(values) == len(rows):  # each line held one object
        yield RowBlock(_positions(file, 0, rows), values, {})
    elif len(rows) > 1:
        half = len(rows) // 2
        yield from _parse_lines(lines, starts[:half], stops[:half], rows[:half], file, field, longest)
        yield from _parse_lines(lines, starts[half:], stops[half:], rows[half:], file, field, longest)
    elif line := lines[starts[0] : stops[0]].strip():
        text, kind = _parse_line(line, field) if len(line) <= longest else (None, TOO_LONG)
        yield _block_of_one(file, int(rows[0]), text, kind, len(line))


def _parse_together(lines: bytes, field: str) -> pa.LargeBinaryArray | None:
    parse = pa.json.ParseOptions(explicit_schema=pa.schema([(field, pa.string())]), unexpected_field_behavior="ignore")
    read = pa.json.ReadOptions(use_threads=False, block_size=len(lines) + 1)
    try:
        lines.decode()  # Arrow does not look
        column = pa.json.read_json(pa.BufferReader(lines), read, parse).column(field)
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    return pa.concat_arrays(column.chunks).cast(pa.large_binary()) if column.num_chunks else None


def _parse_line(line: bytes, field: str) -> tuple[bytes | None, str | None]:
    """Text of a line that Arrow refused, or why it has none."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return None, NOT_UTF8
    except (ValueError, RecursionError):
        return None, NOT_JSON
    if not isinstance(row, dict):
        return None, NOT_JSON
    value = row.get(field)
    if not isinstance(value, str):
        return None, NOT_TEXT
    try:
        return value.encode(), None
    except UnicodeEncodeError:
        return None, LONE_SURROGATE


def _check_first(lines: bytes | int, field: str, path: str) -> None:
    """Refuse a file whose first row has fields, but not the one that is asked for."""
    first = b"" if isinstance(lines, int) else next((line for line in lines.splitlines() if line.strip()), b"")
    try:
        row: Any = json.loads(first)
    except (ValueError, RecursionError):
        return
    if isinstance(row, dict) and field not in row:
        raise PolygluError(f"{path} has no field '{field}'; its fields are {', '.join(row)}: {RENAME}")


def _text_file(file: DataFile, index: int, max_bytes: int) -> RowBlock:
    with open_decompressed(file) as handle:
        text = handle.read(max_bytes + 1)
    return RowBlock(_positions(index, 0, np.zeros(1, np.int64)), _column([text]), {})


def _block_of_one(file: int, row: int, text: bytes | None, kind: str | None, size: int) -> RowBlock:
    bad = {} if kind is None else {0: BadRecord(0, kind, size)}
    return RowBlock(_positions(file, 0, np.array([row])), _column([text]), bad)


def _positions(file: int, row_group: int, rows: Integers) -> Integers:
    return np.stack([np.full_like(rows, file), np.full_like(rows, row_group), rows], axis=1)


def _column(texts: Sequence[bytes | None]) -> pa.LargeBinaryArray:
    return pa.array(texts, pa.large_binary())
