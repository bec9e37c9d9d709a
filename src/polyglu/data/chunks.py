"""The token format on disk: chunks of little-endian uint32 and a manifest that says what is in them.

    data/tokenized/math/
    ├── chunk_00000.bin    doc EOS doc EOS doc ...     exactly ``chunk_tokens`` tokens; a document may span chunks
    ├── chunk_00001.bin    ... doc EOS                 the last one may be shorter (merged data: the last of each part)
    ├── quarantine.jsonl   rows that were left out or are odd: file, row group, row, kind
    └── manifest.json      tokenizer, source, chunks (tokens, documents, SHA-256, cursor), totals, complete

A chunk is written whole (temporary name, flush, rename) and only then enters the manifest, with the cursor from which
tokenising continues: whatever the manifest lists is on disk and final.
"""

import bisect
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polyglu.data.manifest import MANIFEST, read_manifest
from polyglu.errors import PolygluError

Tokens = npt.NDArray[np.uint32]

TOKEN = np.dtype("<u4")
TOKEN_BYTES = TOKEN.itemsize
OPEN_CHUNKS = 64
"""Chunks of a source that are open at the same time: a process may have 1,024 files open, by default."""


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
        self.read_into(tokens, start)
        return tokens

    def read_into(self, tokens: Tokens, start: int) -> None:
        """Fill ``tokens`` `[n]` with the source's from ``start`` on, which must lie within it.

        Files are read, not mapped: other threads run while a disk is waited for, no more is read than asked for, and
        a disk that fails is an exception and not the end of the process.

        Raises:
            PolygluError: a chunk is shorter than when it was opened.
        """
        starts = self._starts
        while True:
            index = bisect.bisect_right(starts, start) - 1
            offset = (start - starts[index]) * TOKEN_BYTES
            count = os.preadv(self._descriptor(index).number, [tokens.data], offset)
            if count == tokens.nbytes:
                return
            if count < TOKEN_BYTES:
                raise PolygluError(
                    f"chunk {self.folder / self.manifest['chunks'][index]['file']} is shorter than when it was "
                    f"opened; restore the file, or remove {self.folder} and tokenise the source again."
                )
            tokens, start = tokens[count // TOKEN_BYTES :], start + count // TOKEN_BYTES  # the rest is in the next one

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(chunk["tokens"] for chunk in self.manifest["chunks"])][:-1]

    @cached_property
    def _descriptor(self) -> Callable[[int], "_Descriptor"]:
        """Opens a chunk when it is asked for, and keeps the latest few."""
        paths = [self.folder / chunk["file"] for chunk in self.manifest["chunks"]]
        return lru_cache(OPEN_CHUNKS)(lambda index: _Descriptor(os.open(paths[index], os.O_RDONLY)))


class _Descriptor:
    """An open file, closed when nobody refers to it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def open_source(folder: Path, name: str | None = None) -> TokenSource:
    """Open tokenised data for reading; ``name`` defaults to the folder's.

    Raises:
        PolygluError: no such data, tokenising not finished, no tokens, or a chunk missing or of another size.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        make = f"python -m src.data.tokenize_dataset --output {folder}"
        make = f"polyglu data merge {folder}" if any(folder.glob("shard_*_of_*")) else make
        raise PolygluError(f"{folder} holds no tokenised data ({MANIFEST} is missing); make it with {make}.")
    if not manifest["complete"]:
        raise PolygluError(
            f"tokenising into {folder} was interrupted; run the same tokenize_dataset command again to finish."
        )
    if not manifest["tokens"]:
        raise PolygluError(f"{folder} holds no tokens; remove it and tokenise a source that has text.")
    check_chunk_sizes(folder, manifest)
    return TokenSource(name or folder.name, folder, manifest)


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
