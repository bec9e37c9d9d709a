"""Where text comes from: a sources file, and the rows of local files or hub datasets.

configs/sources.yaml ─► SourcesConfig ─► TextSource ─► rows(source, skip) ─► {"text": ..., ...}
                                          ├── files:   .jsonl  .parquet  .txt, and .gz or .zst of the text ones
                                          └── dataset: hub, streamed at a pinned commit
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Annotated, Any

import zstandard
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from polyglu.data.hub import stream_rows
from polyglu.data.tokenizer import QWEN3
from polyglu.errors import PolygluError

FILE_KINDS = ".jsonl, .txt (each also with .gz or .zst) or .parquet"
PARQUET_ROWS = 1024
"""Rows decoded at a time."""

Row = dict[str, Any]


class Section(BaseModel):
    """A config or a part of one: frozen, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(Section):
    """One source of documents, how much of it to take, and where its tokens go: a hub dataset or local files."""

    output: Annotated[str, Field(min_length=1)]
    """Folder for the token chunks."""
    dataset: str | None = None
    """Hub dataset, read only through data files: no code from the hub is run."""
    config: str | None = None
    """Hub dataset's configuration."""
    split: str = "train"
    """Hub dataset's split."""
    revision: str | None = None
    """Commit of the hub dataset; absent: the newest one, resolved at the start and recorded in the manifest."""
    files: tuple[str, ...] = ()
    """Local files, read in this order; a .txt file is one document, the others have a document a row."""
    text_field: str = "text"
    """Column that holds the text."""
    max_tokens: PositiveInt | None = None
    """Token budget, end-of-document tokens included; met at a document's end, never exceeded. Absent: everything."""

    @model_validator(mode="after")
    def _check(self) -> "TextSource":
        if (self.dataset is None) == (not self.files):
            raise ValueError("give either 'dataset' (a hub dataset) or 'files' (local ones)")
        of_hub = [key for key in ("config", "split", "revision") if key in self.model_fields_set]
        if self.files and of_hub:
            raise ValueError(f"'{of_hub[0]}' belongs to a hub dataset; leave it out with 'files'")
        return self


class SourcesConfig(Section):
    """A sources file: what to tokenise, with which tokenizer, in chunks of which size."""

    tokenizer: str = QWEN3
    """Hub name, folder or tokenizer.json."""
    chunk_tokens: PositiveInt = 100_000_000
    """Tokens a chunk; the last of a source may be shorter."""
    sources: Annotated[dict[str, TextSource], Field(min_length=1)]
    """Name -> source."""


def describe(source: TextSource, revision: str | None) -> Row:
    """Identity of a source for the manifest; a run with another one cannot continue there."""
    if source.files:
        origin: Row = {"files": [{"path": file, "bytes": _size(Path(file))} for file in source.files]}
    else:
        origin = {"dataset": source.dataset, "config": source.config, "split": source.split, "revision": revision}
    return {**origin, "text_field": source.text_field, "max_tokens": source.max_tokens}


def rows(source: TextSource, revision: str | None, skip: int = 0) -> Iterator[Row]:
    """Rows of a source in their order, from row ``skip`` on; hub access and the first row are checked on the call.

    Raises:
        PolygluError: a file or the hub cannot be read.
    """
    if source.dataset is not None and revision is not None:
        return stream_rows(source.dataset, source.config, source.split, revision, skip)
    return islice(file_rows([Path(file) for file in source.files]), skip, None)


def file_rows(files: Sequence[Path]) -> Iterator[Row]:
    """Rows of local files, one file after the other; the files are checked on the call.

    Raises:
        PolygluError: a file does not exist, is of an unknown kind, or cannot be read.
    """
    for file in files:
        _size(file)
        _kind(file)
    return chain.from_iterable(_read(file) for file in files)


def _size(file: Path) -> int:
    if not file.is_file():
        raise PolygluError(f"input file {file} does not exist; give an existing {FILE_KINDS} file.")
    return file.stat().st_size


def _kind(file: Path) -> str:
    suffixes = file.suffixes
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in (".gz", ".zst") else file.suffix
    if kind not in (".jsonl", ".txt", ".parquet") or (kind == ".parquet" and kind != file.suffix):
        raise PolygluError(f"input file {file} is of an unknown kind; give a {FILE_KINDS} file.")
    return kind


def _read(file: Path) -> Iterator[Row]:
    kind = _kind(file)
    try:
        if kind == ".parquet":
            yield from _parquet_rows(file)
            return
        with _open_text(file) as handle:
            if kind == ".txt":
                yield {"text": handle.read()}
            else:
                yield from _jsonl_rows(file, handle)
    except (UnicodeDecodeError, EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise PolygluError(
            f"input file {file} cannot be read as UTF-8 text ({error}); repair or replace it."
        ) from error


def _open_text(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    if file.suffix == ".zst":
        return io.TextIOWrapper(zstandard.open(file, "rb"), encoding="utf-8")
    return open(file, encoding="utf-8")


def _jsonl_rows(file: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PolygluError(f"{file}, line {number} is not JSON ({error}); repair or remove the line.") from None
        if not isinstance(row, dict):
            raise PolygluError(
                f"{file}, line {number} is not a JSON object with a text field, but {line.strip()[:40]}."
            )
        yield row


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow  # slow to import, and only parquet files need it
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise PolygluError(f"input file {file} is not a parquet file ({error}); repair or replace it.") from error
