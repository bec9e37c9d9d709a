"""A file of a source, wherever it lies: what readers need of it, and no more."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from polyglu.errors import PolygluError

COMPRESSED = (".gz", ".zst")
KINDS = {".jsonl": ".jsonl", ".json": ".jsonl", ".txt": ".txt", ".parquet": ".parquet"}
KINDS_IN_WORDS = ".jsonl, .txt (each also with .gz or .zst) or .parquet"


@dataclass(frozen=True)
class DataFile:
    """One file of a source, local or on the hub."""

    path: str
    """Its name in manifests and messages; its suffixes tell its kind."""
    bytes: int
    """Its size."""
    open: Callable[[], BinaryIO]
    """Opens it for reading, seekable, its bytes as they are."""

    @property
    def kind(self) -> str:
        """``.jsonl``, ``.txt`` or ``.parquet``, a compression apart.

        Raises:
            PolygluError: another kind of file.
        """
        suffixes = Path(self.path).suffixes
        suffix = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in COMPRESSED else Path(self.path).suffix
        if suffix not in KINDS or (suffix == ".parquet" and self.path.endswith(COMPRESSED)):
            raise PolygluError(f"input file {self.path} is of an unknown kind; give a {KINDS_IN_WORDS} file.")
        return KINDS[suffix]


def local_file(path: Path) -> DataFile:
    """A file of this machine.

    Raises:
        PolygluError: it does not exist, is of an unknown kind, or has a name that is no text.
    """
    if not path.is_file():
        raise PolygluError(f"input file {path} does not exist; give an existing {KINDS_IN_WORDS} file.")
    if not str(path).isprintable():
        raise PolygluError(f"the name of input file {str(path)!r} cannot be written into a manifest; rename it.")
    file = DataFile(str(path), path.stat().st_size, lambda: path.open("rb"))
    _ = file.kind
    return file


@contextmanager
def open_decompressed(file: DataFile) -> Iterator[BinaryIO]:
    """Open a .jsonl or .txt file for reading its bytes, decompressed.

    Raises:
        PolygluError: while it is read, the file is not of its compression, or ends too early.
    """
    try:
        with file.open() as raw:
            if file.path.endswith(".gz"):
                with gzip.open(raw) as unzipped:
                    yield cast(BinaryIO, unzipped)
            elif file.path.endswith(".zst"):
                frames = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                with io.BufferedReader(frames) as plain:
                    yield plain
            else:
                yield raw
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise PolygluError(f"input file {file.path} cannot be read ({error}); repair or replace it.") from error
