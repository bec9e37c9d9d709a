"""Whole rows of files, as dictionaries: for conversations, whose columns are nested and few enough for Python."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from polyglu.data.data_file import DataFile, open_decompressed
from polyglu.data.readers import PARQUET_BUFFER, PARQUET_ROWS
from polyglu.errors import PolygluError

Row = dict[str, Any]


def file_rows(files: Sequence[DataFile]) -> Iterator[Row]:
    """Rows of files, one file after the other.

    Raises:
        PolygluError: a file cannot be read, is no .jsonl or .parquet file, or has a line that is no JSON object.
    """
    return chain.from_iterable(_parquet_rows(file) if file.kind == ".parquet" else _json_rows(file) for file in files)


def _json_rows(file: DataFile) -> Iterator[Row]:
    if file.kind != ".jsonl":
        raise PolygluError(f"input file {file.path} has no rows; give a .jsonl (also .gz, .zst) or .parquet file.")
    with open_decompressed(file) as handle, io.TextIOWrapper(handle, encoding="utf-8") as lines:
        try:
            yield from _parsed(file.path, lines)
        except UnicodeDecodeError as error:
            raise PolygluError(f"input file {file.path} is not UTF-8 text ({error}); repair or replace it.") from None


def _parsed(path: str, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PolygluError(f"{path}, line {number} is not JSON ({error}); repair or remove the line.") from None
        if not isinstance(row, dict):
            raise PolygluError(f"{path}, line {number} is not a JSON object, but {line.strip()[:40]}.")
        yield row


def _parquet_rows(file: DataFile) -> Iterator[Row]:
    try:
        with file.open() as handle, pa.parquet.ParquetFile(handle, buffer_size=PARQUET_BUFFER) as parquet:
            for batch in parquet.iter_batches(PARQUET_ROWS):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise PolygluError(
            f"input file {file.path} cannot be read as Parquet ({error}); repair or replace it."
        ) from error
