"""Look at tokenised data: ``polyglu data inspect DIR``.

Shows where the tokens come from, the chunks, how long the documents are, and some of them decoded.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from polyglu.data.chunks import TokenSource, check_chunk_hashes, open_source
from polyglu.data.tokenizer import Tokenizer, load_tokenizer
from polyglu.errors import PolygluError, run_command

SHOWN_TOKENS = 256
"""Tokens of a document that are decoded."""
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


def document_lengths(source: TokenSource) -> npt.NDArray[np.int64]:
    """Tokens of each document `[documents]`, its end-of-document token included."""
    ends, start = [], 0
    for index in range(len(source.manifest["chunks"])):
        chunk = source.chunk(index)
        ends.append(np.flatnonzero(chunk == source.eos_id) + start + 1)
        start += len(chunk)
    return np.diff(np.concatenate([[0], *ends]))


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of token chunks.")],
    documents: Annotated[int, typer.Option(min=0, help="Documents to decode, evenly spread over the source.")] = 3,
    tokenizer: Annotated[str | None, typer.Option(help="Default: the one that the manifest names.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare every chunk with its SHA-256.")] = False,
) -> None:
    """Show tokenised data: documents decoded, lengths, counts."""
    source = open_source(folder)
    if verify:
        check_chunk_hashes(folder, source.manifest)
    loaded = load_tokenizer(tokenizer or source.manifest["tokenizer"]["name"])
    if loaded.fingerprint != source.manifest["tokenizer"]["fingerprint"]:
        raise PolygluError(
            f"tokenizer {loaded.name} is not the one that {folder} was made with; pass it with --tokenizer."
        )
    lengths = document_lengths(source)
    console = Console()
    console.print(_overview(source, lengths))
    console.print(_chunk_table(source))
    for index in np.linspace(0, len(lengths) - 1, num=min(documents, len(lengths)), dtype=np.int64):
        console.print(_document(source, loaded, lengths, int(index)))


def _overview(source: TokenSource, lengths: npt.NDArray[np.int64]) -> Table:
    manifest = source.manifest
    table = Table(title=str(source.folder), show_header=False)
    origin = manifest["source"]
    table.add_row("source", origin.get("dataset") or ", ".join(file["path"] for file in origin.get("files", [])))
    for key in ("config", "split", "revision", "max_tokens"):
        if origin.get(key) is not None:
            table.add_row(key, str(origin[key]))
    table.add_row("tokenizer", f"{manifest['tokenizer']['name']} ({source.vocab_size:,} tokens)")
    table.add_row("tokens", f"{source.n_tokens:,}")
    table.add_row("documents", f"{manifest['documents']:,}")
    table.add_row(
        "skipped rows", ", ".join(f"{count:,} {kind}" for kind, count in manifest["skipped"].items()) or "none"
    )
    values = zip(PERCENTILES, np.percentile(lengths, PERCENTILES), strict=True)
    table.add_row("document length", "  ".join(f"{percent}%: {value:,.0f}" for percent, value in values) + "  (tokens)")
    table.add_row("mean length", f"{lengths.mean():,.1f} tokens")
    return table


def _chunk_table(source: TokenSource) -> Table:
    table = Table("chunk", "tokens", "documents", "MB", "SHA-256")
    for chunk in source.manifest["chunks"]:
        size = f"{(source.folder / chunk['file']).stat().st_size / 1e6:,.1f}"
        table.add_row(chunk["file"], f"{chunk['tokens']:,}", f"{chunk['documents']:,}", size, chunk["sha256"][:12])
    return table


def _document(source: TokenSource, tokenizer: Tokenizer, lengths: npt.NDArray[np.int64], index: int) -> Panel:
    start, length = int(lengths[:index].sum()), int(lengths[index])
    shown = min(length, SHOWN_TOKENS)
    text = tokenizer.decode(source.read(start, start + shown).tolist())
    more = "" if shown == length else f", first {shown} shown"
    return Panel(Text(text), title=f"document {index:,}: {length:,} tokens{more}", title_align="left")


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
