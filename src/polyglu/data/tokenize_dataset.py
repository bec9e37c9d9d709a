"""Tokenise text into chunks: ``python -m src.data.tokenize_dataset``.

    rows of a source ─► text (or a counted skip) ─► batches ─► token ids + EOS ─► budget ─► ChunkWriter

Interrupted at any moment, the same command continues and ends with the same bytes as an uninterrupted run.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from polyglu.config_file import load_config, validate
from polyglu.data.chunks import ChunkWriter, check_chunk_sizes, end_cursor, new_manifest, read_manifest
from polyglu.data.hub import resolve_revision
from polyglu.data.sources import Row, SourcesConfig, TextSource, describe, rows
from polyglu.data.tokenizer import Tokenizer, is_text, load_tokenizer
from polyglu.errors import PolygluError, run_command
from polyglu.files import check_writable
from polyglu.logs import configure_logging

log = logging.getLogger(__name__)

BATCH_ROWS = 512
"""Documents encoded together."""
COMMIT_DIGITS = 40

Batch = list[tuple[str, str | None]]
"""(text, None), or ("", why the row is skipped)."""


def tokenize_source(source: TextSource, tokenizer: Tokenizer, chunk_tokens: int) -> dict[str, Any]:
    """Write the chunks of one source to ``source.output``, or continue there; return the manifest.

    Raises:
        PolygluError: the source cannot be read, holds no text or no such field; its first document exceeds the
            budget; the folder holds other data or is in use.
    """
    folder = Path(source.output)
    with _exclusive(folder):
        recorded = read_manifest(folder)
        revision = _revision(source, recorded)
        identity = {**tokenizer.identity(), "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
        manifest = new_manifest(identity, describe(source, revision), chunk_tokens)
        if recorded is not None:
            _check_same_settings(folder, recorded, manifest)
            check_chunk_sizes(folder, recorded)
            manifest = recorded
        if manifest["complete"]:
            log.info("%s is complete: %s tokens; nothing to do", folder, f"{manifest['tokens']:,}")
            return manifest
        writer = ChunkWriter(folder, manifest)
        _write_documents(writer, rows(source, revision, skip=end_cursor(manifest)[0]), source, tokenizer)
        writer.finish()
        return writer.manifest


def _write_documents(writer: ChunkWriter, stream: Iterator[Row], source: TextSource, tokenizer: Tokenizer) -> None:
    """Encode rows in batches and hand them to the writer until the source or its budget ends."""
    what = source.dataset or ", ".join(source.files)
    with _progress() as progress:
        task = progress.add_task(f"tokenise {what}", total=source.max_tokens, completed=writer.tokens, rate="")
        if not writer.rows:
            stream = _check_field(stream, source.text_field, what)
        for batch in _batches(stream, source.text_field):
            within_budget = _write_batch(writer, batch, source.max_tokens, tokenizer)
            speed = progress.tasks[task].speed
            progress.update(task, completed=writer.tokens, rate=f"{speed:,.0f} tokens/s" if speed else "")
            if not within_budget:
                break
    if not writer.tokens:
        raise PolygluError(f"{what} holds no text in '{source.text_field}' (skipped rows: {writer.skipped or 'none'}).")


def _write_batch(writer: ChunkWriter, batch: Batch, budget: int | None, tokenizer: Tokenizer) -> bool:
    """Write a batch up to the first document that would exceed the budget; return whether all of it fitted."""
    encoded = iter(tokenizer.encode_batch([text for text, skip in batch if skip is None]))
    for _, skip in batch:
        if skip is not None:
            writer.skip_row(skip)
            continue
        document = np.array([*next(encoded), tokenizer.eos_id], dtype=np.uint32)
        if budget is not None and writer.tokens + len(document) > budget:
            if not writer.tokens:
                raise PolygluError(
                    f"the first document has {len(document):,} tokens, more than max_tokens {budget:,}; raise it."
                )
            return False
        writer.add_document(document)
    return True


def _check_field(stream: Iterator[Row], text_field: str, what: str) -> Iterator[Row]:
    """Return the same rows after a look at the first one, which must have the field."""
    first = next(stream, None)
    if first is None:
        return stream
    if text_field not in first:
        raise PolygluError(f"{what} has no field '{text_field}'; its fields are {', '.join(first)}: set text_field.")
    return chain([first], stream)


def _batches(stream: Iterator[Row], text_field: str) -> Iterator[Batch]:
    while batch := list(islice(stream, BATCH_ROWS)):
        yield [_text_or_skip(row.get(text_field)) for row in batch]


def _text_or_skip(value: object) -> tuple[str, str | None]:
    if not isinstance(value, str):
        return "", "not_text"
    if not value.strip():
        return "", "empty"
    if not is_text(value):
        return "", "lone_surrogate"
    return value, None


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


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder against a second process; what is made here is removed again if nothing was written."""
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


def _progress() -> Progress:
    counts = (TextColumn("{task.completed:,} tokens"), TextColumn("{task.fields[rate]}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), BarColumn(), *counts, *times, console=Console(stderr=True))


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
) -> None:
    """Turn a hub dataset, local files or the sources of a config file into token chunks; continues if interrupted."""
    configure_logging()
    origin = dict(dataset=dataset, config=config, split=split, revision=revision, text_field=text_field,
                  files=[str(file) for file in files] if files else None, max_tokens=max_tokens,
                  output=str(output) if output else None)  # fmt: skip
    encoding = {"tokenizer": tokenizer, "chunk_tokens": chunk_tokens}
    if sources is not None:
        plan = _plan_of_file(sources, source or [], all_sources, given={**origin, **encoding})
    elif output is None or source or all_sources:
        raise PolygluError("give --output, the folder for the chunks, or --sources with --all or --source.")
    else:
        values = {**_given(encoding), "sources": {output.name: _given(origin)}}
        plan = validate(SourcesConfig, values, source="command line")
    loaded = load_tokenizer(plan.tokenizer)
    for name, chosen in plan.sources.items():
        manifest = tokenize_source(chosen, loaded, plan.chunk_tokens)
        counts = f"{manifest['tokens']:,} tokens, {manifest['documents']:,} documents, {len(manifest['chunks'])} chunks"
        log.info("%s: %s in %s; skipped rows: %s", name, counts, chosen.output, manifest["skipped"] or "none")


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
