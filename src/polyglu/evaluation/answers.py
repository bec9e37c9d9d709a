"""Answers of a model, kept as they come: a run that was stopped, at any moment, goes on where it was.

``NAME.answers.jsonl`` beside the results, one JSON object a line, only appended to:

| line | holds |
|---|---|
| a model's | ``model``: all that its answers depend on (checkpoint, tokenizer, precision, ...); ``of``: hash of that |
| an answer's | ``of``; ``key``: hash of task, version and the request's own content; ``task``, ``doc``; ``answer`` |

Both have a ``seal``, a hash of the line. What was cut off at the end is removed; a damaged line is told, and its answer
computed again.
"""

import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from polyglu.errors import Interrupted, PolygluError
from polyglu.files import append_rows, check_writable, flush, seal
from polyglu.inference import Inference
from polyglu.model.cache import compute_dtype

SEAL = 16
"""Hexadecimal digits of a line's seal, and of the hash of a model."""
FLUSH_SECONDS = 10.0
"""The most that a power cut takes, of answers that came before the last one; a kill takes nothing."""

logger = logging.getLogger(__name__)


def answers_file(output: Path) -> Path:
    """Where the answers of a results file are kept."""
    return output.with_name(f"{output.stem}.answers.jsonl")


def identity(opened: Inference, chat: bool) -> dict[str, Any]:
    """All that an answer depends on beside the question. Not the batch, the number of examples or the device."""
    return {
        "checkpoint": opened.sha256,
        "config": opened.model.config.model_dump(mode="json"),
        "tau": opened.tau,
        "tokenizer": opened.tokenizer.fingerprint,
        "chat": chat,
        "dtype": str(compute_dtype(opened.model)),
        "routing": "exact",
        "polyglu": version("polyglu"),
    }


@contextmanager
def stoppable(kept: Path) -> Iterator[None]:
    """Let SIGTERM stop the work where it is, as Ctrl-C does: every answer so far is in the file ``kept``."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"the answers so far are in {kept}; the same command goes on from there.") from None
    finally:
        signal.signal(signal.SIGTERM, before)


class Asker(NamedTuple):
    """Whose request it is."""

    task: str
    version: str = ""
    doc: int | None = None
    """Number of the document, for people who read the file; the request's content says which it is."""


class Question(NamedTuple):
    """A request, as far as its answer depends on it."""

    asker: Asker
    content: Any
    """JSON value."""

    @property
    def key(self) -> str:
        """Equal for equal requests of the same version of a task."""
        return seal([self.asker.task, self.asker.version, self.content])


class Answers:
    """What is known already. This one knows and keeps nothing."""

    def known(self, questions: Sequence[Question], description: str) -> list[Any]:
        """The answer to each question, None where there is none yet."""
        return [None] * len(questions)

    def add(self, answered: Iterable[tuple[Question, Any]]) -> None:
        """Keep answers, each a JSON value, from now on."""

    def close(self) -> None:
        """End the keeping."""


class KeptAnswers(Answers):
    """Answers of one model in a file, which no other process may use meanwhile.

    Args:
        path: the file; made if it is missing.
        model: JSON object of all that an answer depends on beside the question.
        fresh: forget what the file holds.

    Raises:
        PolygluError: the file cannot be made, or another process uses it.
    """

    def __init__(self, path: Path, model: Mapping[str, Any], fresh: bool = False) -> None:
        check_writable(path.parent, "--output folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._lock = path, _locked(path)
        if fresh:
            os.truncate(path, 0)
        self._of, self._flushed = seal(model)[:SEAL], time.monotonic()
        rows = self._read()
        self._answers = {row["key"]: row["answer"] for row in rows if row["of"] == self._of and "key" in row}
        if not any(row["of"] == self._of for row in rows):
            self._append([{"of": self._of, "model": dict(model)}])

    def known(self, questions: Sequence[Question], description: str) -> list[Any]:
        """The answer to each question, None where there is none yet; told how many there are."""
        found = [self._answers.get(question.key) for question in questions]
        n = sum(answer is not None for answer in found)
        if n:
            logger.info(
                "%s: %s of %s answers are taken over from %s", description, f"{n:,}", f"{len(found):,}", self.path
            )
        return found

    def add(self, answered: Iterable[tuple[Question, Any]]) -> None:
        """Append answers by one call of the system: they outlive the process from now on, and soon a power cut.

        Raises:
            OSError: the file cannot be written to, as on a full disk; what it holds is as before.
        """
        new = {question.key: (question.asker, answer) for question, answer in answered}
        rows = [
            {"of": self._of, "key": key, "task": asker.task, "doc": asker.doc, "answer": answer}
            for key, (asker, answer) in new.items()
            if key not in self._answers
        ]
        self._append(rows)
        self._answers |= {row["key"]: row["answer"] for row in rows}
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            flush(self.path)
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush the file to disk, and let other processes use it."""
        flush(self.path)
        os.close(self._lock)

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        append_rows(self.path, [{**row, "seal": seal(row)[:SEAL]} for row in rows])

    def _read(self) -> list[dict[str, Any]]:
        """Rows whose seal is right. A last line without an end is cut off."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        os.truncate(self.path, whole)
        rows, damaged = [], 0
        for line in data[:whole].splitlines():
            row = _sealed(line)
            if row is None:
                damaged += 1
            else:
                rows.append(row)
        if damaged:
            logger.warning("%s: %d damaged lines are passed over; their answers are computed again", self.path, damaged)
        return rows


def _locked(path: Path) -> int:
    """Descriptor of a file, made if it is missing, that holds it against other processes until it is closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise PolygluError(
            f"another process is evaluating into {path}; wait for it to end, or give another --output."
        ) from None
    return descriptor


def _sealed(line: bytes) -> dict[str, Any] | None:
    """Row of a line; None if the line is not as it was written."""
    try:
        row = json.loads(line)
        written = row.pop("seal")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None
    return row if written == seal(row)[:SEAL] else None
