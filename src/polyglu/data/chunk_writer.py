"""From encoded documents to chunks on disk; what is written does not depend on where a run was stopped and continued.

    DocumentBatch ──► tokens ──► chunk_00003.bin.tmp ──(full)──► flush, rename ──► quarantine flushed ──► manifest
                 └──► bad records ──► quarantine.jsonl

Tokens go to disk, and into the hash, as they come: memory does not depend on the size of a chunk. Killed at any moment,
what the manifest lists is whole; the rest is written again from the cursor of its last chunk.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polyglu.data.chunks import TOKEN, Tokens
from polyglu.data.manifest import MANIFEST, QUARANTINE, chunk_name, write_manifest
from polyglu.data.quarantine import KEPT, BadRecord, Quarantine
from polyglu.errors import PolygluError
from polyglu.files import NewFile

Integers = npt.NDArray[np.int64]

START = {"file": 0, "row_group": 0, "row": 0, "tokens": 0}
"""Cursor of a source of which nothing is written."""


@dataclass(frozen=True)
class DocumentBatch:
    """Consecutive rows of a source, encoded."""

    tokens: Tokens
    """``[N]``: the documents one after the other, each with its end-of-document token."""
    ends: Integers
    """``[documents]``: where each document ends in ``tokens``."""
    row_of: Integers
    """``[documents]``: the row of each document, as an index into ``positions``; rising."""
    positions: Integers
    """``[rows, 3]``: file, row group and row of each row of the source; rising."""
    bad: Sequence[BadRecord]
    """In the order of their rows."""


class ChunkWriter:
    """Writes the chunks of one folder, on from where its manifest ends; nothing is on disk before the first record.

    Args:
        folder: for the chunks.
        manifest: of ``new_manifest``, or read from the folder; changed as chunks are finished.
        files: names of the source's files, for the quarantine.

    Raises:
        PolygluError: the disk is full or failing, here and in all methods; finished chunks stay, and only those.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], files: Sequence[str]) -> None:
        self.folder, self.manifest, self.files = folder, manifest, files
        self.rows = int(manifest["rows"])
        """Rows of the source that are used up."""
        self.bad_records: Counter[str] = Counter(manifest["bad_records"])
        """Kind -> rows."""
        self._end = end_cursor(manifest)
        self.tokens = int(manifest["tokens"]) - self._end["tokens"]
        """Tokens of all whole documents."""
        self._chunk: NewFile | None = None
        self._hash = hashlib.sha256()
        self._filled = self._documents = 0
        with self._disk_errors():
            self._quarantine = Quarantine(folder / QUARANTINE, manifest["quarantine"])

    @property
    def dropped(self) -> int:
        """Rows of the source that were left out."""
        return sum(count for kind, count in self.bad_records.items() if kind not in KEPT)

    def add(self, batch: DocumentBatch, budget: int | None = None) -> bool:
        """Write a batch up to the first document with which the tokens would exceed ``budget``.

        Returns:
            Whether all of it was written.
        """
        n = len(batch.ends)
        if budget is not None:
            n = int(np.searchsorted(batch.ends, budget - self.tokens, side="right"))
        whole = n == len(batch.ends)
        stop = int(batch.ends[n - 1]) if n else 0
        start, rows = self._end["tokens"] if n else 0, 0
        if n and start >= batch.ends[0]:
            raise PolygluError(
                f"{self.folder} was begun with another text than is read now; remove it and start again."
            )
        with self._disk_errors():
            while start < stop:
                cut = min(stop, start + self.manifest["chunk_tokens"] - self._filled)
                used = self._write(batch, start, cut)
                if self._filled == self.manifest["chunk_tokens"]:
                    self._use_rows(batch, rows, used)
                    self._finish_chunk()
                    rows = used
                start = cut
            self._use_rows(batch, rows, len(batch.positions) if whole else int(batch.row_of[n]))
        self.tokens += stop
        return whole

    def finish(self) -> None:
        """Write the last, shorter chunk and mark the manifest complete, in one step."""
        with self._disk_errors():
            self.manifest["complete"] = True
            self._finish_chunk()

    def close(self) -> None:
        """Drop what is not part of a finished chunk; the quarantine stays for reading."""
        with suppress(OSError):
            self._quarantine.close()
        if self._chunk is not None:
            with suppress(OSError):
                self._chunk.discard()
            self._chunk = None

    def _write(self, batch: DocumentBatch, start: int, cut: int) -> int:
        """Write tokens of a batch and move the cursor behind them; return how many of its rows are then used up."""
        if self._chunk is None:
            if not (self.folder / MANIFEST).exists():
                write_manifest(self.folder, self.manifest)
            self._chunk = NewFile(self.folder / chunk_name(len(self.manifest["chunks"])))
        data = np.ascontiguousarray(batch.tokens[start:cut], dtype=TOKEN).data
        self._chunk.file.write(data)
        self._hash.update(data)
        before, done = (int(np.searchsorted(batch.ends, place, side="right")) for place in (start, cut))
        self._filled += cut - start
        self._documents += done - before
        begun = int(batch.ends[done - 1]) if done else 0
        # Behind a document the cursor is at the row after it, within one at its own row.
        at = int(batch.row_of[done - 1] if cut == begun else batch.row_of[done])
        file, group, row = batch.positions[at].tolist()
        behind = int(cut == begun)
        self._end = {"file": file, "row_group": group, "row": row + behind, "tokens": cut - begun}
        return at + behind

    def _use_rows(self, batch: DocumentBatch, start: int, stop: int) -> None:
        """Count rows ``start`` to ``stop`` of a batch as used, and list the bad ones."""
        for record in batch.bad:
            if start <= record.row < stop:
                file, group, row = batch.positions[record.row].tolist()
                self._quarantine.append(self.files[file], (group, row), record)
                self.bad_records[record.kind] += 1
        self.rows += stop - start

    def _finish_chunk(self) -> None:
        if self._chunk is not None:
            self._chunk.commit()
            chunk = {"file": self._chunk.path.name, "tokens": self._filled, "documents": self._documents}
            self.manifest["chunks"].append({**chunk, "sha256": self._hash.hexdigest(), "end": dict(self._end)})
            self.manifest["tokens"] += self._filled
            self.manifest["documents"] += self._documents
            self._chunk, self._hash, self._filled, self._documents = None, hashlib.sha256(), 0, 0
        self._save_manifest()

    def _save_manifest(self) -> None:
        self.manifest["rows"] = self.rows
        self.manifest["bad_records"] = dict(self.bad_records)
        self.manifest["quarantine"] = self._quarantine.flush()
        write_manifest(self.folder, self.manifest)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PolygluError(
                f"{error.filename or self.folder} cannot be written ({error.strerror}): mend that and run the same "
                f"command again; the {len(self.manifest['chunks'])} finished chunks are kept."
            ) from error


def end_cursor(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Where the chunks of a manifest end in the source."""
    return dict(manifest["chunks"][-1]["end"]) if manifest["chunks"] else dict(START)
