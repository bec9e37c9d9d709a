"""The manifest of token chunks: what is in them, where it came from, where tokenising goes on, and a seal on all that.

``manifest.json`` is written whole, after the chunk that it newly names, and carries the SHA-256 of its own content: a
changed digit in it is found as surely as a changed token. It holds no times and no machine's name, so that equal input
gives equal bytes.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from polyglu.config_file import validate
from polyglu.errors import PolygluError
from polyglu.files import json_text, read_json, seal, write_json

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
FORMAT_VERSION = 2
SEAL = "sha256"

Count = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(strict=True)]


class Cursor(BaseModel):
    """The next document to write, and how much of it is written."""

    file: Count
    """Index in the source's list of files."""
    row_group: Count
    """Row group of a Parquet file; 0 in other files."""
    row: Count
    """Row of the row group (Parquet), or line (JSON lines); counted from 0."""
    tokens: Count
    """Tokens of that document that the chunks already hold."""


class Chunk(BaseModel):
    """One chunk file."""

    file: Annotated[str, Field(strict=True, pattern=r"^chunk_\d+\.bin$")]
    tokens: Annotated[int, Field(strict=True, gt=0)]
    documents: Count
    """Documents that end in it."""
    sha256: Text
    end: Cursor | None = None
    """Where tokenising goes on after it; needed as long as it is not complete."""


class TokenizerEntry(BaseModel):
    """The tokenizer that made the tokens."""

    name: Text
    fingerprint: Text
    vocab_size: Annotated[int, Field(strict=True, gt=0)]
    eos_id: Count


class QuarantineEntry(BaseModel):
    """The part of ``quarantine.jsonl`` that belongs to the chunks."""

    records: Count
    bytes: Count
    sha256: Text


class Manifest(BaseModel):
    """All of it but the format's version and the seal."""

    tokenizer: TokenizerEntry
    source: dict[str, Any]
    """Dataset, config, split, revision (hub), files with their bytes, shard, settings that decide the tokens."""
    chunk_tokens: Annotated[int, Field(strict=True, gt=0)]
    chunks: list[Chunk]
    tokens: Count
    documents: Count
    rows: Count
    """Rows of the source that were read, bad ones included."""
    bad_records: dict[str, Count]
    """Kind -> rows of that kind."""
    quarantine: QuarantineEntry
    complete: Annotated[bool, Field(strict=True)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("tokens", "documents"):
            total = sum(getattr(chunk, key) for chunk in self.chunks)
            if getattr(self, key) != total:
                raise ValueError(f"'{key}' is {getattr(self, key)}, its chunks have {total}")
        if self.tokenizer.eos_id >= self.tokenizer.vocab_size:
            raise ValueError(f"eos_id {self.tokenizer.eos_id} is outside vocab_size {self.tokenizer.vocab_size}")
        if not self.complete and any(chunk.end is None for chunk in self.chunks):
            raise ValueError("a chunk of unfinished data has no 'end'")
        return self


def chunk_name(index: int) -> str:
    """File name of the chunk at ``index``."""
    return f"chunk_{index:05d}.bin"


def new_manifest(tokenizer: Mapping[str, Any], source: Mapping[str, Any], chunk_tokens: int) -> dict[str, Any]:
    """Manifest of a folder into which nothing is written yet.

    ``tokenizer`` needs ``name``, ``fingerprint``, ``vocab_size`` and ``eos_id``.
    """
    return {
        "tokenizer": dict(tokenizer),
        "source": dict(source),
        "chunk_tokens": chunk_tokens,
        "chunks": [],
        "tokens": 0,
        "documents": 0,
        "rows": 0,
        "bad_records": {},
        "quarantine": {"records": 0, "bytes": 0, "sha256": hashlib.sha256().hexdigest()},
        "complete": False,
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``manifest.json``, sealed, in one step."""
    write_json(folder / MANIFEST, _sealed(manifest))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Manifest of a folder of tokenised data; None if there is none.

    Raises:
        PolygluError: the manifest is not of this format, was changed, or its numbers contradict each other.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.pop("format_version", None) != FORMAT_VERSION:
        raise PolygluError(f"{path} is not a manifest of format version {FORMAT_VERSION}; tokenise the source again.")
    if manifest.pop(SEAL, None) != seal(manifest):
        raise PolygluError(
            f"{path} was changed after it was written (its SHA-256 differs); restore it, or tokenise the source again."
        )
    missing = Manifest.model_fields.keys() - manifest.keys()
    if missing:
        raise PolygluError(f"{path} lacks '{min(missing)}'; tokenise the source again.")
    validate(Manifest, manifest, source=str(path))
    return manifest


def is_as_written(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the bytes of ``manifest.json`` are the very ones that ``write_manifest`` writes."""
    return (folder / MANIFEST).read_bytes() == json_text(_sealed(manifest)).encode()


def _sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, SEAL: seal(manifest), **manifest}
