"""Check tokenised data to the last bit: ``polyglu data verify DIR``.

    manifest.json (sealed) ──► what should be there ─┬─► each chunk, one pass: SHA-256, documents, largest token
                                                     ├─► quarantine.jsonl: SHA-256, records
                                                     └─► what else lies in the folder

Chunks are read in blocks on all cores: memory depends neither on their size nor on their number.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from polyglu.data.chunks import TOKEN
from polyglu.data.manifest import MANIFEST, QUARANTINE, chunk_name, is_as_written, read_manifest
from polyglu.errors import PolygluError, run_command
from polyglu.files import TEMPORARY_SUFFIX
from polyglu.logs import progress

BLOCK_TOKENS = 1 << 18
"""Tokens read at a time; they stay in the cache between hash and count."""
DATA_NAMES = ("chunk", "manifest", "quarantine")
DATA_SUFFIXES = (".bin", ".jsonl", ".npy", ".parquet", TEMPORARY_SUFFIX)
"""A name that starts or ends so looks like data; other names (notes, reports, folders of shards) are let be."""

Advance = Callable[[int], object]
"""Told how many more bytes are read."""


@dataclass(frozen=True)
class Fault:
    """A file that is not as it should be."""

    file: str
    """Its name in the folder."""
    text: str
    """What is wrong with it, and what to do."""


@dataclass(frozen=True)
class Verification:
    """What was checked and found; the counts are the manifest's, and true if there is no fault."""

    tokens: int
    documents: int
    chunks: int
    bytes: int
    """Of all files that belong to the data."""
    faults: tuple[Fault, ...]


def verify(folder: Path, advance: Advance = lambda _: None) -> Verification:
    """Compare every file of a folder of tokenised data with what its manifest says of it.

    Args:
        folder: of one source. Of unfinished data all finished chunks are checked, and that it is unfinished is a fault.
        advance: for a progress bar; called from several threads.

    Raises:
        PolygluError: there is no such folder.
    """
    if not folder.is_dir():
        raise PolygluError(f"{folder} is no folder; give a folder of tokenised data.")
    try:
        manifest = read_manifest(folder)
    except PolygluError as error:
        text = str(error).removeprefix(str(folder / MANIFEST)).lstrip(": ").rstrip(".")
        return _without_manifest(f"{text}; nothing else can be checked without it.")
    except OSError as error:
        return _without_manifest(_unreadable(error))
    if manifest is None:
        hint = "its shards are not merged yet: polyglu data merge" if any(folder.glob("shard_*_of_*")) else "restore it"
        return _without_manifest(f"is missing, and nothing can be checked without it; {hint}.")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = list(pool.map(lambda index: _check_chunk(folder, manifest, index, advance), range(_count(manifest))))
    faults = [*_check_manifest(folder, manifest), *chunks, _check_quarantine(folder, manifest)]
    stated = manifest["tokens"] * TOKEN.itemsize + manifest["quarantine"]["bytes"] + (folder / MANIFEST).stat().st_size
    return Verification(
        tokens=manifest["tokens"],
        documents=manifest["documents"],
        chunks=_count(manifest),
        bytes=stated,
        faults=(*filter(None, faults), *_extra_files(folder, manifest)),
    )


def verify_with_progress(folder: Path) -> Verification:
    """Verify a folder, with a progress bar on stderr.

    Raises:
        PolygluError: there is no such folder.
    """
    total = sum(path.stat().st_size for path in folder.glob("chunk_*.bin"))
    with byte_progress() as progress:
        return verify(folder, partial(progress.advance, progress.add_task(f"verify {folder}", total=total)))


def require_intact(folder: Path) -> Verification:
    """Verify a folder that must be free of faults, with a progress bar on stderr.

    Raises:
        PolygluError: it is not; names the first fault.
    """
    result = verify_with_progress(folder)
    if result.faults:
        first, more = result.faults[0], len(result.faults) - 1
        others = f" ({more} more: polyglu data verify {folder} lists them)" if more else ""
        raise PolygluError(f"{folder / first.file} {first.text}{others}")
    return result


def byte_progress() -> Progress:
    """Make a progress bar on stderr for work that is counted in bytes."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("left"), TimeRemainingColumn())
    return progress(*columns)


def _without_manifest(text: str) -> Verification:
    return Verification(0, 0, 0, 0, (Fault(MANIFEST, text),))


def _count(manifest: Mapping[str, Any]) -> int:
    return len(manifest["chunks"])


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror}); mend that, or restore the file."


def _check_manifest(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Fault]:
    """Find what is wrong with a manifest whose content has the right seal."""
    if not is_as_written(folder, manifest):
        yield Fault(MANIFEST, "was reformatted after it was written, its content is the same; restore it.")
    for index, chunk in enumerate(manifest["chunks"]):
        if chunk["file"] != chunk_name(index):
            yield Fault(
                MANIFEST, f"names {chunk['file']} where {chunk_name(index)} belongs; tokenise the source again."
            )
            break
    if sum(manifest["bad_records"].values()) != manifest["quarantine"]["records"]:
        yield Fault(MANIFEST, "counts other bad records than its quarantine has; tokenise the source again.")
    if not manifest["complete"]:
        yield Fault(
            MANIFEST,
            f"says that tokenising is not finished; the {_count(manifest)} chunks that it lists were checked: run the "
            f"same tokenize command again to finish.",
        )


def _check_chunk(folder: Path, manifest: Mapping[str, Any], index: int, advance: Advance) -> Fault | None:
    chunk = manifest["chunks"][index]
    try:
        text = _chunk_fault(folder / chunk["file"], manifest, index, advance)
    except OSError as error:
        text = _unreadable(error)
    return text and Fault(chunk["file"], text) or None


def _chunk_fault(path: Path, manifest: Mapping[str, Any], index: int, advance: Advance) -> str | None:
    """What is wrong with a chunk, the plainest thing first; None if nothing is."""
    chunk, tokenizer = manifest["chunks"][index], manifest["tokenizer"]
    mend = f"restore it, or remove {path.parent} and tokenise the source again."
    if not path.is_file():
        return f"is missing; {mend}"
    size, expected = path.stat().st_size, chunk["tokens"] * TOKEN.itemsize
    if size != expected:
        return f"has {size:,} bytes, expected {expected:,} ({chunk['tokens']:,} tokens); {mend}"
    digest, documents, largest, last = _scan(path, tokenizer["eos_id"], advance)
    if digest != chunk["sha256"]:
        for other in manifest["chunks"]:
            if digest == other["sha256"]:
                return f"has the content of {other['file']}; give both their right names, or restore them."
        return f"has other bytes than were written (SHA-256 differs); {mend}"
    again = "the manifest or its writer is at fault: tokenise the source again."
    if documents != chunk["documents"]:
        return f"holds the ends of {documents:,} documents, its manifest says {chunk['documents']:,}; {again}"
    if largest >= tokenizer["vocab_size"]:
        return f"holds token {largest}, outside the tokenizer's vocab_size {tokenizer['vocab_size']}; {again}"
    if manifest["complete"] and index == _count(manifest) - 1 and last != tokenizer["eos_id"]:
        return f"ends with token {last}, not with an end-of-document token {tokenizer['eos_id']}; {again}"
    return None


def _scan(path: Path, eos_id: int, advance: Advance) -> tuple[str, int, int, int]:
    """SHA-256 (hex) of a chunk, its number of end-of-document tokens, its largest and its last token."""
    digest, documents, largest, last = hashlib.sha256(), 0, 0, 0
    buffer = np.empty(BLOCK_TOKENS, dtype=TOKEN)
    view = buffer.view(np.uint8).data
    with open(path, "rb") as file:
        while size := file.readinto(view):
            digest.update(view[:size])
            tokens = buffer[: size // TOKEN.itemsize]
            if len(tokens):  # a file that is being cut off right now may end in a part of one
                documents += int(np.count_nonzero(tokens == eos_id))
                largest, last = max(largest, int(tokens.max())), int(tokens[-1])
            advance(size)
    return digest.hexdigest(), documents, largest, last


def _check_quarantine(folder: Path, manifest: Mapping[str, Any]) -> Fault | None:
    """Compare ``quarantine.jsonl`` with the manifest; lines beyond it are a fault of complete data only."""
    path, recorded = folder / QUARANTINE, manifest["quarantine"]
    mend = f"restore it, or remove {folder} and tokenise the source again."
    if not path.is_file():
        return Fault(QUARANTINE, f"is missing; {mend}") if recorded["bytes"] else None
    try:
        size = path.stat().st_size
        if size < recorded["bytes"] or (size > recorded["bytes"] and manifest["complete"]):
            return Fault(QUARANTINE, f"has {size:,} bytes, expected {recorded['bytes']:,}; {mend}")
        digest, lines, left = hashlib.sha256(), 0, recorded["bytes"]
        with open(path, "rb") as file:
            while block := file.read(min(left, BLOCK_TOKENS)):
                digest.update(block)
                lines, left = lines + block.count(b"\n"), left - len(block)
    except OSError as error:
        return Fault(QUARANTINE, _unreadable(error))
    if digest.hexdigest() != recorded["sha256"]:
        return Fault(QUARANTINE, f"has other bytes than were written (SHA-256 differs); {mend}")
    if lines != recorded["records"]:
        return Fault(QUARANTINE, f"has {lines:,} lines, its manifest says {recorded['records']:,}; {mend}")
    return None


def _extra_files(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Fault]:
    """Find what looks like data and is none of this data.

    Unfinished data may have the file that was being written, and the chunk that is to be listed next: the run that
    continues writes them again.
    """
    known = {MANIFEST, *(chunk["file"] for chunk in manifest["chunks"])}
    if manifest["quarantine"]["bytes"] or not manifest["complete"]:
        known.add(QUARANTINE)
    for name in sorted(entry.name for entry in folder.iterdir()):
        looks_like_data = name.lower().startswith(DATA_NAMES) or name.lower().endswith(DATA_SUFFIXES)
        if name in known or not looks_like_data:
            continue
        if manifest["complete"]:
            temporary = name.endswith(TEMPORARY_SUFFIX)
            what = "was left by an interrupted run" if temporary else "is not in the manifest"
            yield Fault(name, f"{what}; remove it.")
        elif not name.endswith(TEMPORARY_SUFFIX) and name != chunk_name(_count(manifest)):
            yield Fault(name, "is not in the manifest; remove it.")


def main(folders: Annotated[list[Path], typer.Argument(help="Folders of token chunks.")]) -> None:
    """Check every bit of tokenised data against its manifest; exit code 2 if anything is wrong."""
    wrong = []
    for folder in folders:
        result = verify_with_progress(folder)
        for fault in result.faults:
            typer.echo(f"{folder / fault.file} {fault.text}")
        if result.faults:
            wrong.append(folder)
        else:
            typer.echo(
                f"{folder}: intact; {result.tokens:,} tokens, {result.documents:,} documents, {result.chunks:,} "
                f"chunks, {result.bytes:,} bytes checked."
            )
    if wrong:
        raise PolygluError(f"not intact: {', '.join(map(str, wrong))}; what is wrong and what to do is listed above.")


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
