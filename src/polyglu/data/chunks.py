"""The token format on disk: chunks of little-endian uint32 and a manifest that says what is in them.

    data/tokenized/math/
    ├── chunk_00000.bin   doc EOS doc EOS doc ...     exactly ``chunk_tokens`` tokens; a document may span chunks
    ├── chunk_00001.bin   ... doc EOS                 the last one may be shorter
    └── manifest.json     tokenizer, source, chunks (tokens, documents, SHA-256, cursor), totals, complete

A chunk is written whole (temporary name, flush, rename) and only then enters the manifest, with the cursor from which
tokenising continues: whatever the manifest lists is on disk and final. The manifest holds no times and no machine's
name, so that equal input gives equal bytes.
"""

import bisect
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polyglu.config_file import validate
from polyglu.data.manifest import Manifest
from polyglu.errors import PolygluError
from polyglu.files import read_json, sha256, write_atomically, write_json

Tokens = npt.NDArray[np.uint32]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKEN = np.dtype("<u4")


@dataclass(frozen=True)
class TokenSource:
    """A folder of token chunks, read as one long row of tokens."""

    name: str
    folder: Path
    manifest: Mapping[str, Any]

    @cached_property
    def n_tokens(self) -> int:
        """Tokens in all chunks, end-of-document tokens included."""
        return int(self.manifest["tokens"])

    @property
    def eos_id(self) -> int:
        """Token that ends each document."""
        return int(self.manifest["tokenizer"]["eos_id"])

    @property
    def vocab_size(self) -> int:
        """Every token is smaller than this."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) that identifies the tokens: their order, their bytes and their tokenizer."""
        content = [[chunk["sha256"] for chunk in self.manifest["chunks"]], self.manifest["tokenizer"]["fingerprint"]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens ``start`` to ``stop`` (exclusive) `[stop - start]`, across chunk borders.

        Raises:
            PolygluError: the range is not within the source.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise PolygluError(
                f"{self.folder} holds {self.n_tokens:,} tokens; tokens {start:,} to {stop:,} are not in it."
            )
        tokens = np.empty(stop - start, dtype=np.uint32)
        index = bisect.bisect_right(self._starts, start) - 1
        position = start
        while position < stop:
            offset = position - self._starts[index]
            part = self._chunks[index][offset : offset + stop - position]
            tokens[position - start : position - start + len(part)] = part
            position += len(part)
            index += 1
        return tokens

    def chunk(self, index: int) -> Tokens:
        """All tokens of one chunk, memory-mapped."""
        return self._chunks[index]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(chunk["tokens"] for chunk in self.manifest["chunks"])][:-1]

    @cached_property
    def _chunks(self) -> list[Tokens]:
        return [np.memmap(self.folder / chunk["file"], dtype=TOKEN, mode="r") for chunk in self.manifest["chunks"]]


def open_source(folder: Path, name: str | None = None) -> TokenSource:
    """Open tokenised data for reading; ``name`` defaults to the folder's.

    Raises:
        PolygluError: no such data, tokenising not finished, no tokens, or a chunk missing or of another size.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise PolygluError(
            f"{folder} holds no tokenised data ({MANIFEST} is missing); make it with "
            f"python -m src.data.tokenize_dataset --output {folder}."
        )
    if not manifest["complete"]:
        raise PolygluError(
            f"tokenising into {folder} was interrupted; run the same tokenize_dataset command again to finish."
        )
    if not manifest["tokens"]:
        raise PolygluError(f"{folder} holds no tokens; remove it and tokenise a source that has text.")
    check_chunk_sizes(folder, manifest)
    return TokenSource(name or folder.name, folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Manifest of a folder of tokenised data; None if there is none.

    Raises:
        PolygluError: the manifest is not of this format, or its numbers contradict each other.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise PolygluError(f"{path} is not a manifest of format version {FORMAT_VERSION}; tokenise the source again.")
    missing = Manifest.model_fields.keys() - manifest.keys()
    if missing:
        raise PolygluError(f"{path} lacks '{min(missing)}'; tokenise the source again.")
    validate(Manifest, manifest, source=str(path))
    return manifest


def check_chunk_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare each chunk's size with the manifest.

    Raises:
        PolygluError: a chunk is missing or has another size.
    """
    mend = f"restore the file, or remove {folder} and tokenise the source again"
    for chunk in manifest["chunks"]:
        path, expected = folder / chunk["file"], chunk["tokens"] * TOKEN.itemsize
        if not path.is_file():
            raise PolygluError(f"chunk {path} is missing; {mend}.")
        found = path.stat().st_size
        if found != expected:
            raise PolygluError(
                f"chunk {path} has {found:,} bytes, expected {expected:,} ({chunk['tokens']:,} tokens); {mend}."
            )


def check_chunk_hashes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare each chunk's bytes with the SHA-256 of the manifest; reads all of it.

    Raises:
        PolygluError: a chunk is missing or has other bytes.
    """
    check_chunk_sizes(folder, manifest)
    for chunk in manifest["chunks"]:
        if sha256(folder / chunk["file"]) != chunk["sha256"]:
            raise PolygluError(
                f"chunk {folder / chunk['file']} has other bytes than were written (SHA-256 differs); restore it."
            )


class ChunkWriter:
    """Writes documents as chunks; the bytes do not depend on where a run was interrupted and continued.

    Each chunk's entry ends with the cursor to continue from: ``rows`` of the source that are used up, and how many
    tokens of the row after them are already in the chunk. Nothing is on disk before the first document is added.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.skipped: dict[str, int] = dict(manifest["skipped"])
        self.rows, self._written_of_document = end_cursor(manifest)
        self.tokens = int(manifest["tokens"]) - self._written_of_document
        self._buffer = np.empty(manifest["chunk_tokens"], dtype=TOKEN)
        self._filled = 0
        self._documents_in_buffer = 0

    def skip_row(self, kind: str) -> None:
        """Count a row of the source that holds no document."""
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        self.rows += 1

    def add_document(self, tokens: Tokens) -> None:
        """Append the document of the next row, its end-of-document token included `[N]`."""
        if not (self.folder / MANIFEST).exists():
            self._save_manifest()
        start, self._written_of_document = self._written_of_document, 0
        while start < len(tokens):
            part = tokens[start : start + len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            start += len(part)
            if start == len(tokens):
                self.rows += 1
                self._documents_in_buffer += 1
            if self._filled == len(self._buffer):
                self._write_chunk(start % len(tokens))
                self._save_manifest()
        self.tokens += len(tokens)

    def finish(self) -> None:
        """Write the last, shorter chunk and mark the manifest complete, in one step."""
        if self._filled:
            self._write_chunk(written_of_document=0)
        self.manifest["complete"] = True
        self._save_manifest()

    def _write_chunk(self, written_of_document: int) -> None:
        file = f"chunk_{len(self.manifest['chunks']):05d}.bin"
        tokens = self._buffer[: self._filled]
        digest = write_atomically(self.folder / file, lambda handle: handle.write(tokens.data))
        chunk = {
            "file": file,
            "tokens": self._filled,
            "documents": self._documents_in_buffer,
            "sha256": digest,
            "end": {"rows": self.rows, "tokens_of_next_row": written_of_document},
        }
        self.manifest["chunks"].append(chunk)
        self.manifest["tokens"] += self._filled
        self.manifest["documents"] += self._documents_in_buffer
        self._filled = self._documents_in_buffer = 0

    def _save_manifest(self) -> None:
        self.manifest["skipped"] = dict(self.skipped)
        write_json(self.folder / MANIFEST, self.manifest)


def new_manifest(tokenizer: Mapping[str, Any], source: Mapping[str, Any], chunk_tokens: int) -> dict[str, Any]:
    """Manifest of a folder into which nothing is written yet.

    ``tokenizer`` needs ``name``, ``fingerprint``, ``vocab_size`` and ``eos_id``.
    """
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": dict(tokenizer),
        "source": dict(source),
        "chunk_tokens": chunk_tokens,
        "chunks": [],
        "tokens": 0,
        "documents": 0,
        "skipped": {},
        "complete": False,
    }


def end_cursor(manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Rows of the source that the chunks use up, and how many tokens of the next row they already hold."""
    if not manifest["chunks"]:
        return 0, 0
    end = manifest["chunks"][-1]["end"]
    return end["rows"], end["tokens_of_next_row"]
