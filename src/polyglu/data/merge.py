"""Join the shards of a source into one folder: ``polyglu data merge OUTPUT``.

    shard_0_of_2/  chunk_00000.bin chunk_00001.bin ──┐  hard links   OUTPUT/  chunk_00000.bin … chunk_00002.bin
    shard_1_of_2/  chunk_00000.bin ──────────────────┴────────────►           quarantine.jsonl  manifest.json (last)

Shard i of N holds the files i, i + N, i + 2N, … of the source. Stopped at any moment and run again, it ends the same.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from polyglu.data.chunks import check_chunk_sizes
from polyglu.data.manifest import MANIFEST, QUARANTINE, chunk_name, read_manifest, write_manifest
from polyglu.data.verify import require_intact
from polyglu.errors import PolygluError, run_command
from polyglu.files import check_writable, flush, sha256, write_atomically

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FinishedShard:
    """What one worker made."""

    folder: Path
    index: int
    of: int
    manifest: Mapping[str, Any]

    @property
    def files(self) -> list[dict[str, Any]]:
        """Its files of the source: path and bytes."""
        return list(self.manifest["source"].get("files", []))


def merge(output: Path, folders: Sequence[Path]) -> tuple[dict[str, Any], bool]:
    """Join shards into ``output``; return its manifest, and whether there was anything to do.

    Args:
        output: folder for the joined data.
        folders: all shards, in any order; none if ``output`` is merged and they are removed.

    Raises:
        PolygluError: shards are missing, twice, unfinished, damaged, or not of one source; or ``output`` holds other
            data.
    """
    existing = read_manifest(output)
    if not folders:
        if existing is None or "shards" not in existing["source"]:
            raise PolygluError(f"{output} holds no shards (shard_0_of_N, …); name them, or run tokenize --shard first.")
        check_chunk_sizes(output, existing)
        return existing, False
    shards = _matching([_open(folder) for folder in folders])
    for shard in shards:
        check_chunk_sizes(shard.folder, shard.manifest)
    chunks = [shard.folder / chunk["file"] for shard in shards for chunk in shard.manifest["chunks"]]
    manifest = _joined(shards)
    if existing is not None:
        if existing != manifest:
            raise PolygluError(
                f"{output} holds other data than these shards; give another folder, or remove that data."
            )
        check_chunk_sizes(output, existing)
        return existing, False
    check_writable(output, "output")
    output.mkdir(parents=True, exist_ok=True)
    _check_free(output, manifest)
    for source, chunk in zip(chunks, manifest["chunks"], strict=True):
        _link_or_copy(source, output / chunk["file"], chunk["sha256"])
    if manifest["quarantine"]["bytes"]:
        write_atomically(output / QUARANTINE, lambda file: file.writelines(_quarantine(shards)))
    flush(output)
    write_manifest(output, manifest)
    return manifest, True


def find_shards(output: Path) -> list[Path]:
    """Folders of shards where ``tokenize --shard`` puts them."""
    return sorted(path for path in output.glob("shard_*_of_*") if path.is_dir())


def _open(folder: Path) -> FinishedShard:
    manifest = read_manifest(folder)
    if manifest is None:
        raise PolygluError(f"shard {folder} holds no tokenised data ({MANIFEST} is missing); tokenise it first.")
    place = manifest["source"].get("shard")
    if not isinstance(place, dict):
        raise PolygluError(f"{folder} is no shard: its manifest has no 'shard' (index, of); it needs no merging.")
    if not manifest["complete"]:
        raise PolygluError(
            f"shard {folder} is not finished; run its tokenize command (--shard {place['index']}/{place['of']}) again."
        )
    return FinishedShard(folder, place["index"], place["of"], manifest)


def _matching(shards: list[FinishedShard]) -> list[FinishedShard]:
    """The shards in their order, which must be the parts of one source, each once."""
    first, found = shards[0], dict[int, FinishedShard]()
    for shard in shards:
        if shard.of != first.of:
            raise PolygluError(
                f"{first.folder} is one of {first.of} shards, {shard.folder} one of {shard.of}; name those of one kind."
            )
        if shard.index in found:
            raise PolygluError(
                f"{found[shard.index].folder} and {shard.folder} are both shard {shard.index} of {shard.of}; name one."
            )
        found[shard.index] = shard
        _check_same_settings(first, shard)
    missing = [str(index) for index in range(first.of) if index not in found]
    if missing:
        names = f"{', '.join(missing[:8])}{', …' if len(missing) > 8 else ''}"
        raise PolygluError(f"of {first.of} shards, these are missing: {names}; tokenise them with --shard, then merge.")
    ordered = [found[index] for index in range(first.of)]
    _check_files(ordered)
    return ordered


def _check_same_settings(first: FinishedShard, shard: FinishedShard) -> None:
    def settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
        tokenizer = {f"tokenizer {key}": value for key, value in manifest["tokenizer"].items() if key != "name"}
        return {**tokenizer, "chunk_tokens": manifest["chunk_tokens"], **_source_settings(manifest)}

    before, now = settings(first.manifest), settings(shard.manifest)
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise PolygluError(
                f"{first.folder} was made with {key} {before.get(key)}, {shard.folder} with {now.get(key)}; tokenise "
                f"all shards with the same settings."
            )


def _source_settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest["source"].items() if key not in ("files", "shard")}


def _check_files(shards: Sequence[FinishedShard]) -> None:
    """No file may be in two shards, and each shard must have its share of one list of files."""
    total, home = sum(len(shard.files) for shard in shards), dict[str, FinishedShard]()
    for shard in shards:
        expected = len(range(shard.index, total, shard.of))
        if len(shard.files) != expected:
            raise PolygluError(
                f"{shard.folder} has {len(shard.files)} files where {expected} of all {total} are its share; tokenise "
                f"all shards from the same list of files."
            )
        for file in shard.files:
            other = home.setdefault(file["path"], shard)
            if other is not shard:
                raise PolygluError(
                    f"{file['path']} is in {other.folder} and in {shard.folder}; tokenise all shards from the same "
                    f"list of files."
                )


def _joined(shards: Sequence[FinishedShard]) -> dict[str, Any]:
    """The manifest of all shards together."""
    manifests = [shard.manifest for shard in shards]
    chunks = [chunk for manifest in manifests for chunk in manifest["chunks"]]
    in_order = chain.from_iterable(zip_longest(*(shard.files for shard in shards)))
    budget = manifests[0]["source"].get("max_tokens")
    kinds = sorted({kind for manifest in manifests for kind in manifest["bad_records"]})
    return {
        "tokenizer": dict(manifests[0]["tokenizer"]),
        "source": {
            **_source_settings(manifests[0]),
            **({"max_tokens": budget * len(shards)} if budget else {}),  # each had its part
            "files": [file for file in in_order if file is not None],
            "shards": len(shards),
        },
        "chunk_tokens": manifests[0]["chunk_tokens"],
        "chunks": [
            {"file": chunk_name(index), **{key: chunk[key] for key in ("tokens", "documents", "sha256")}}
            for index, chunk in enumerate(chunks)
        ],
        **{key: sum(manifest[key] for manifest in manifests) for key in ("tokens", "documents", "rows")},
        "bad_records": {kind: sum(manifest["bad_records"].get(kind, 0) for manifest in manifests) for kind in kinds},
        "quarantine": {
            **{key: sum(manifest["quarantine"][key] for manifest in manifests) for key in ("records", "bytes")},
            "sha256": _quarantine_hash(shards),
        },
        "complete": True,
    }


def _quarantine(shards: Sequence[FinishedShard]) -> Iterator[bytes]:
    """Lines of all quarantines, one after the other, in blocks; each must be the one of its manifest."""
    for shard in shards:
        recorded, path = shard.manifest["quarantine"], shard.folder / QUARANTINE
        digest = hashlib.sha256()
        for block in _blocks(path) if recorded["bytes"] and path.is_file() else ():
            digest.update(block)
            yield block
        if digest.hexdigest() != recorded["sha256"]:
            raise PolygluError(f"{path} was changed or removed; restore it, or tokenise shard {shard.index} again.")


def _quarantine_hash(shards: Sequence[FinishedShard]) -> str:
    digest = hashlib.sha256()
    for block in _quarantine(shards):
        digest.update(block)
    return digest.hexdigest()


def _check_free(output: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder without manifest that has data; what a stopped merge of these shards has brought is welcome."""
    planned = {chunk["file"]: chunk["sha256"] for chunk in manifest["chunks"]}
    planned[QUARANTINE] = manifest["quarantine"]["sha256"]
    for path in sorted([*output.glob("chunk_*.bin"), *output.glob(QUARANTINE)]):
        if sha256(path) != planned.get(path.name):
            raise PolygluError(f"{path} is of other data than these shards; give another folder, or remove it.")


def _link_or_copy(source: Path, target: Path, digest: str) -> None:
    """Give a finished chunk a second name; copy it where the file system has no hard links. Skip what is there."""

    def copy(file: BinaryIO) -> None:
        copied = hashlib.sha256()
        for block in _blocks(source):
            copied.update(block)
            file.write(block)
        if copied.hexdigest() != digest:
            raise PolygluError(f"{source} has other bytes than were written (SHA-256 differs); restore it.")

    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        write_atomically(target, copy)


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the joined data.")],
    shards: Annotated[list[Path] | None, typer.Argument(help="Shards; default: OUTPUT/shard_*_of_*.")] = None,
    verify: Annotated[bool, typer.Option(help="Check every bit of the shards first.")] = False,
) -> None:
    """Join the shards of a source into one folder, by hard links where the file system has them."""
    folders = shards or find_shards(output)
    for folder in folders if verify else ():
        require_intact(folder)
    manifest, done = merge(output, folders)
    counts = f"{manifest['tokens']:,} tokens, {manifest['documents']:,} documents, {len(manifest['chunks']):,} chunks"
    typer.echo(f"{output}: {manifest['source']['shards']} shards, {counts}; {'merged' if done else 'nothing to do'}.")


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
