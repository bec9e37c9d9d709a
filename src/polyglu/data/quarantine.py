"""Bad records: what counts as one, and the file in which they are listed.

| kind | the row | what happens |
|---|---|---|
| ``not_json`` | a line that is no JSON object | left out |
| ``not_text`` | the text's field is missing, null, or no string | left out |
| ``not_utf8`` | bytes that are not UTF-8 | left out |
| ``lone_surrogate`` | half of a surrogate pair, which no UTF-8 text can hold | left out |
| ``empty`` | nothing but white space | left out |
| ``too_long`` | more than ``max_document_bytes`` | left out |
| ``special_token_text`` | spells a special token of the tokenizer | kept; the spelling is encoded as any other text |
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from polyglu.errors import PolygluError

NOT_JSON, NOT_TEXT, NOT_UTF8 = "not_json", "not_text", "not_utf8"
LONE_SURROGATE, EMPTY, TOO_LONG = "lone_surrogate", "empty", "too_long"
SPECIAL_TOKEN_TEXT = "special_token_text"
KEPT = frozenset({SPECIAL_TOKEN_TEXT})
"""Kinds of rows that are documents all the same."""


def in_words(bad_records: Mapping[str, int]) -> str:
    """Rows of each kind, for a sentence."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(bad_records.items())) or "none"


@dataclass(frozen=True)
class BadRecord:
    """A row that holds no usable document, or one that is odd."""

    row: int
    """Index among the rows of its batch."""
    kind: str
    bytes: int | None
    """Length of its text (of its line, for ``not_json``), where it has one."""


class Quarantine:
    """``quarantine.jsonl``: a line for each bad record, in the order of the source.

    Lines beyond the recorded ones are those of a run that was interrupted: they are cut off and come again.

    Args:
        path: the file; it exists only if there are records.
        recorded: the manifest's entry.

    Raises:
        PolygluError: the file is not the one that the manifest tells of.
    """

    def __init__(self, path: Path, recorded: dict[str, Any]) -> None:
        self.path = path
        self._records, self._bytes = int(recorded["records"]), int(recorded["bytes"])
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None
        if not self._bytes:
            path.unlink(missing_ok=True)
            return
        content = path.read_bytes()[: self._bytes] if path.is_file() else b""
        self._hash.update(content)
        if self._hash.hexdigest() != recorded["sha256"]:
            raise PolygluError(f"{path} was changed or removed; restore it, or remove {path.parent} and start again.")
        os.truncate(path, self._bytes)

    def append(self, file: str, position: tuple[int, int], record: BadRecord) -> None:
        """Add a record; ``position`` is its row group and row in ``file``."""
        line = {"file": file, "row_group": position[0], "row": position[1], "kind": record.kind, "bytes": record.bytes}
        text = json.dumps({**line, "kept": record.kind in KEPT}, ensure_ascii=False).encode(errors="backslashreplace")
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")  # noqa: SIM115  # closed by close
        self._file.write(text + b"\n")
        self._hash.update(text + b"\n")
        self._records += 1
        self._bytes += len(text) + 1

    def flush(self) -> dict[str, Any]:
        """Bring all records to disk; return the manifest's entry."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"records": self._records, "bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        """Close the file; what it holds stays for reading."""
        if self._file is not None:
            self._file.close()
            self._file = None
