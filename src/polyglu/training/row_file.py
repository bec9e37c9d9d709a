"""Files of JSON rows, one a line, that grow while a run lives: a kill, a full disk or a return leaves whole rows."""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from polyglu.files import append_rows, flush, read_rows, write_text

logger = logging.getLogger(__name__)


class RowFile:
    """A file of rows that is only appended to and cut. Its faults are told and never raised: training goes on.

    Rows that cannot be written, as on a full disk, are kept and written before the next ones.

    Args:
        path: the file. What an earlier process left unfinished at its end is dropped.

    Raises:
        OSError: the file cannot be read or mended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unwritten: list[dict[str, Any]] = []
        self.failing = False
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            write_rows(path, read_rows(path))

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows by one call of the system; they outlive the process, and after ``sync`` a power cut."""
        self.unwritten += rows
        try:
            append_rows(self.path, self.unwritten)
        except OSError as error:
            self._tell(error)
        else:
            self.unwritten, self.failing = [], False

    def cut(self, step: int) -> None:
        """Remove all rows after the last of ``step`` or before it. Needs no space on the disk."""
        self.unwritten = [row for row in self.unwritten if row["step"] <= step]
        try:
            os.truncate(self.path, _length(self.path, step))
        except FileNotFoundError:
            pass  # nothing was written yet
        except OSError as error:
            self._tell(error)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, those included that could not be written yet."""
        try:
            return read_rows(self.path) + self.unwritten
        except OSError as error:
            self._tell(error)
            return self.unwritten

    def sync(self) -> None:
        """Flush the file to disk."""
        try:
            if self.path.exists():
                flush(self.path)
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self.failing:  # once, until it works again
            logger.warning(
                "%s cannot be used (%s): training goes on; new rows are kept until it can", self.path, error.strerror
            )
        self.failing = True


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Create or replace a file of rows, atomically."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _length(path: Path, step: int) -> int:
    """Bytes before the first row whose step is later than ``step``."""
    length = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if json.loads(line)["step"] > step:
            break
        length += len(line)
    return length
