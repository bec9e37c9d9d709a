"""Files that are whole or not there: written under a temporary name, flushed to disk, then renamed."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from polyglu.errors import PolygluError

TEMPORARY_SUFFIX = ".tmp"


class NewFile:
    """A file that is written piece by piece under a temporary name, and gets its own with ``commit``."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.temporary = path, path.with_name(path.name + TEMPORARY_SUFFIX)
        self.file: BinaryIO = open(self.temporary, "wb")  # noqa: SIM115  # closed by commit or discard

    def commit(self) -> None:
        """Flush the file to disk and give it its name, in place of a file that has it."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        flush(self.path.parent)

    def discard(self) -> None:
        """Remove what was written."""
        with suppress(OSError):  # what cannot be flushed, for the disk is full, is removed all the same
            self.file.close()
        with suppress(OSError):  # what went wrong before is told, not that its trace stays
            self.temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> str:
    """Create or replace ``path`` with what ``write`` puts into an open binary file; return its SHA-256 (hex).

    Raises:
        OSError: the system refused; it names ``path`` if it named nothing.
    """
    new = NewFile(path)
    try:
        write(new.file)
        new.file.flush()
        digest = sha256(new.temporary)
        new.commit()
    except BaseException as error:
        new.discard()
        refusal = _refusal(error)
        if refusal is None:
            raise
        if refusal.errno is not None and refusal.filename is None:
            refusal.filename = str(path)
        raise refusal from None
    return digest


def _refusal(error: BaseException | None) -> OSError | None:
    """What the system refused; ``torch.save`` hides that behind a RuntimeError of its own."""
    while isinstance(error, RuntimeError):
        error = error.__context__
    return error if isinstance(error, OSError) else None


def write_text(path: Path, text: str) -> str:
    """Create or replace a UTF-8 text file atomically; return its SHA-256 (hex).

    Half of a surrogate pair, as in a file's name that is not UTF-8, is written as the escape that JSON reads back.
    """
    return write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, value: Any) -> str:
    """Create or replace a JSON file atomically (sorted keys, readable); return its SHA-256 (hex)."""
    return write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text that ``write_json`` writes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def plain(value: Any) -> Any:
    """A JSON value as it is read back: tuples are lists."""
    return json.loads(json.dumps(value))


def append_rows(path: Path, rows: Iterable[Any]) -> None:
    """Add JSON values, one a line, to the end of a file, by one call of the system.

    Raises:
        OSError: they cannot be written, as on a full disk; the file is as before.
    """
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)  # no half of a row stays before the next one
            raise


def read_rows(path: Path) -> list[Any]:
    """JSON values of a file, one a line; none if there is no file. A line that was cut off is passed over."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def seal(content: Any) -> str:
    """SHA-256 (hex) of a JSON value, however it is laid out: kept beside it, it shows any change."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_writable(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be made or written to: before hours of work, not after.

    Raises:
        PolygluError: a file is in the way, or the permission is missing; the message calls the folder ``name``.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise PolygluError(f"{name} {folder} cannot be written to: {existing} is a file; give a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PolygluError(f"{name} {folder} cannot be written to: no permission in {existing}; give another folder.")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold an output folder against a second process; what is made here is removed again if nothing was written.

    Raises:
        PolygluError: another process holds it, or it cannot be written to.
    """
    check_writable(folder, "output")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise PolygluError(f"another process is writing to {folder}; wait for it to end.") from None
    finally:
        with suppress(OSError):
            for place in made:
                place.rmdir()
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        PolygluError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolygluError(f"{path} does not exist.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number beyond Python's limit
        raise PolygluError(
            f"{path} is not valid JSON ({error}); make it again with the command that wrote it."
        ) from None


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk: what was written or renamed survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
