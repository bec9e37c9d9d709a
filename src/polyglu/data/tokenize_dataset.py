"""Tokenise text into chunks: ``python -m src.data.tokenize_dataset``.

    files of a source ─► read_blocks ─► text_batches ─► Encoder ─► ChunkWriter ─► chunks, quarantine, manifest
                         └─ a thread, ahead ──────┘    └ ahead ┘   └ hashes and writes meanwhile

Interrupted at any moment, the same command continues and ends with the same bytes as an uninterrupted run.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from polyglu.config_file import load_config, validate
from polyglu.data.chunk_writer import ChunkWriter, DocumentBatch, end_cursor
from polyglu.data.chunks import check_chunk_sizes
from polyglu.data.data_file import DataFile, local_file
from polyglu.data.documents import text_batches
from polyglu.data.encoding import Encoder
from polyglu.data.hub import dataset_files, resolve_revision
from polyglu.data.manifest import QUARANTINE, new_manifest, read_manifest
from polyglu.data.prefetch import prefetch
from polyglu.data.quarantine import in_words
from polyglu.data.readers import read_blocks
from polyglu.data.sources import Shard, SourcesConfig, TextSource, describe, parse_shard
from polyglu.data.tokenizer import Tokenizer, load_tokenizer
from polyglu.errors import PolygluError, run_command
from polyglu.files import exclusive
from polyglu.logs import configure_logging, progress

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2
"""Batches that wait between reading and encoding, and between encoding and writing."""
JUDGED_ROWS = 1000
"""Rows from which on the share of bad ones is judged while running; it always is at the end."""
COMMIT_DIGITS = 40


def tokenize_source(
    source: TextSource, tokenizer: Tokenizer, chunk_tokens: int, *, shard: Shard | None = None, fast: bool = True
) -> dict[str, Any]:
    """Write the chunks of one source to ``source.output``, or continue there; return the manifest.

    Args:
        source: what to read.
        tokenizer: encodes it.
        chunk_tokens: tokens a chunk.
        shard: take only this part of the source's files, and its part of the budget, into a folder of its own.
        fast: whether the fast encoder may be used.

    Raises:
        PolygluError: the source cannot be read, holds no text or no such field, or too many bad records; its first
            document exceeds the budget; the folder holds other data or is in use; the disk is full.
    """
    folder = Path(source.output) / shard.folder if shard else Path(source.output)
    if shard and source.max_tokens:
        source = source.model_copy(update={"max_tokens": max(1, source.max_tokens // shard.of)})
    with exclusive(folder):
        recorded = read_manifest(folder)
        revision = _revision(source, recorded)
        if recorded is not None and recorded["complete"] and revision is not None:
            files, listing = [], recorded["source"]["files"]  # what is complete needs no hub
        else:
            files = _files(source, revision, shard)
            listing = [{"path": file.path, "bytes": file.bytes} for file in files]
        identity = {**tokenizer.identity(), "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
        manifest = new_manifest(identity, describe(source, revision, listing, shard), chunk_tokens)
        if recorded is not None:
            _check_same_settings(folder, recorded, manifest)
            check_chunk_sizes(folder, recorded)
            manifest = recorded
        if manifest["complete"]:
            log.info("%s is complete: %s tokens; nothing to do", folder, f"{manifest['tokens']:,}")
            return manifest
        with closing(ChunkWriter(folder, manifest, [file.path for file in files])) as writer:
            encoder = Encoder(tokenizer, fast, writer.files)
            with closing(prefetch(_encoded(source, files, end_cursor(manifest), encoder), BATCHES_AHEAD)) as batches:
                _write(writer, batches, source)
            if not writer.tokens and not shard:
                writer.close()
                (folder / QUARANTINE).unlink(missing_ok=True)
                kinds = in_words(writer.bad_records)
                raise PolygluError(f"{_name(source)} holds no text in '{source.text_field}' (bad records: {kinds}).")
            _judge(writer, source)
            writer.finish()
        return writer.manifest


def _encoded(
    source: TextSource, files: Sequence[DataFile], start: Mapping[str, int], encoder: Encoder
) -> Iterator[DocumentBatch]:
    blocks = read_blocks(files, source.text_field, start, source.max_document_bytes)
    for batch in prefetch(text_batches(blocks, source.max_document_bytes), BATCHES_AHEAD):
        yield encoder.encode(batch)


def _write(writer: ChunkWriter, batches: Iterator[DocumentBatch], source: TextSource) -> None:
    """Hand batches to the writer until the source or its budget ends."""
    within_budget = True
    with _progress() as progress:
        task = progress.add_task(f"tokenise {_name(source)}", total=source.max_tokens, completed=writer.tokens, rate="")
        for batch in batches:
            within_budget = writer.add(batch, source.max_tokens)
            if writer.rows >= JUDGED_ROWS:
                _judge(writer, source)
            speed = progress.tasks[task].speed
            progress.update(task, completed=writer.tokens, rate=f"{speed:,.0f} tokens/s" if speed else "")
            if not within_budget:
                break
    if not within_budget and not writer.tokens:
        raise PolygluError(
            f"the first document of {_name(source)} has more tokens than max_tokens {source.max_tokens}; raise it."
        )


def _judge(writer: ChunkWriter, source: TextSource) -> None:
    if writer.dropped > math.ceil(source.max_bad_share * writer.rows):
        raise PolygluError(
            f"{writer.dropped:,} of the first {writer.rows:,} rows of {_name(source)} are bad records "
            f"({in_words(writer.bad_records)}), more than max_bad_share {source.max_bad_share:g}; see "
            f"{writer.folder / QUARANTINE}, and mend the source or raise max_bad_share and run the command again."
        )


def _name(source: TextSource) -> str:
    more = f" and {len(source.files) - 1} more files" if len(source.files) > 1 else ""
    return source.dataset or source.files[0] + more


def _files(source: TextSource, revision: str | None, shard: Shard | None) -> list[DataFile]:
    if source.dataset is not None and revision is not None:
        files = dataset_files(source.dataset, source.config, source.split, revision)
    else:
        files = [local_file(Path(file)) for file in source.files]
    return files[shard.index :: shard.of] if shard else files


def _revision(source: TextSource, recorded: dict[str, Any] | None) -> str | None:
    """Commit to read a hub dataset at: the given one, else the one that the folder was begun with, else the newest."""
    if source.dataset is None:
        return None
    if source.revision is None and recorded is not None and recorded["source"].get("dataset") == source.dataset:
        return str(recorded["source"]["revision"])
    if source.revision is not None and len(source.revision) == COMMIT_DIGITS:
        return source.revision
    return resolve_revision(source.dataset, source.revision)


def _check_same_settings(folder: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    def settings(manifest: dict[str, Any]) -> dict[str, Any]:
        fingerprint = manifest["tokenizer"]["fingerprint"]
        return {"tokenizer fingerprint": fingerprint, "chunk_tokens": manifest["chunk_tokens"], **manifest["source"]}

    before, now = settings(recorded), settings(wanted)
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise PolygluError(
                f"{folder} was made with {key} {before.get(key)}, not {now.get(key)}; use the same settings, another "
                f"--output, or remove the folder."
            )


def _progress() -> Progress:
    counts = (TextColumn("{task.completed:,} tokens"), TextColumn("{task.fields[rate]}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return progress(BarColumn(), *counts, *times)


def main(
    dataset: Annotated[str | None, typer.Option(help="Hub dataset, for example nvidia/Nemotron-CC-Math-v1.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of the hub dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the hub dataset; default: train.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the hub dataset; default: the newest.")] = None,
    files: Annotated[list[Path] | None, typer.Option(help="Local file (.jsonl, .txt, .parquet); repeatable.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Column that holds the text; default: text.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the chunks.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Token budget; default: everything.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Hub name, folder or tokenizer.json; default: Qwen3's.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Tokens a chunk; default: 100,000,000.")] = None,
    sources: Annotated[Path | None, typer.Option(help="Sources file; then --source or --all.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="Name in the sources file; repeatable.")] = None,
    all_sources: Annotated[bool, typer.Option("--all", help="Every source of the sources file.")] = False,
    shard: Annotated[
        str | None, typer.Option(help="i/N: the i-th (from 0) of N workers; then polyglu data merge.")
    ] = None,
    max_bad_share: Annotated[float | None, typer.Option(help="Share of bad records that stops; default: 0.05.")] = None,
    encoder: Annotated[str | None, typer.Option(help="fast (default) or reference; the same tokens.")] = None,
) -> None:
    """Turn a hub dataset, local files or the sources of a config file into token chunks; continues if interrupted."""
    configure_logging()
    origin = dict(dataset=dataset, config=config, split=split, revision=revision, text_field=text_field,
                  files=[str(file) for file in files] if files else None, max_tokens=max_tokens,
                  max_bad_share=max_bad_share, output=str(output) if output else None)  # fmt: skip
    encoding = {"tokenizer": tokenizer, "chunk_tokens": chunk_tokens, "encoder": encoder}
    part = parse_shard(shard) if shard else None
    if sources is not None:
        plan = _plan_of_file(sources, source or [], all_sources, given={**origin, **encoding})
    elif output is None or source or all_sources:
        raise PolygluError("give --output, the folder for the chunks, or --sources with --all or --source.")
    else:
        values = {**_given(encoding), "sources": {output.name: _given(origin)}}
        plan = validate(SourcesConfig, values, source="command line")
    loaded = load_tokenizer(plan.tokenizer)
    for name, chosen in plan.sources.items():
        manifest = tokenize_source(chosen, loaded, plan.chunk_tokens, shard=part, fast=plan.encoder == "fast")
        counts = f"{manifest['tokens']:,} tokens, {manifest['documents']:,} documents, {len(manifest['chunks'])} chunks"
        bad = in_words(manifest["bad_records"])
        log.info("%s: %s in %s; bad records: %s", name, counts, chosen.output, bad)


def _plan_of_file(path: Path, names: list[str], all_sources: bool, given: dict[str, Any]) -> SourcesConfig:
    """Read a sources file and keep the chosen sources."""
    plan = load_config(SourcesConfig, path)
    if flags := [f"--{key.replace('_', '-')}" for key in _given(given)]:
        raise PolygluError(f"--sources takes all settings from {path}; set {', '.join(flags)} there.")
    if all_sources == bool(names):
        raise PolygluError(f"with --sources give either --all or --source NAME; {path} has {', '.join(plan.sources)}.")
    for name in names:
        if name not in plan.sources:
            raise PolygluError(f"{path} has no source '{name}'; it has {', '.join(plan.sources)}.")
    return plan.model_copy(update={"sources": {name: plan.sources[name] for name in names or plan.sources}})


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flags.items() if value is not None}


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
