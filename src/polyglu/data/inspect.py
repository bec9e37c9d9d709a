"""Look at tokenised data: ``polyglu data inspect DIR``.

Shows where the tokens come from, the chunks, how long the documents are, and some of them decoded.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from polyglu.data.chunks import TokenSource, open_source
from polyglu.data.quarantine import in_words
from polyglu.data.statistics import Integers, Sample, length_statistics, scan_documents, take_samples
from polyglu.data.tokenizer import load_tokenizer
from polyglu.data.verify import require_intact
from polyglu.errors import PolygluError, run_command
from polyglu.logs import console


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of token chunks.")],
    documents: Annotated[int, typer.Option(min=0, help="Documents to decode, evenly spread over the source.")] = 3,
    tokenizer: Annotated[str | None, typer.Option(help="Default: the one that the manifest names.")] = None,
    verify: Annotated[bool, typer.Option(help="Check every bit first, as polyglu data verify does.")] = False,
) -> None:
    """Show tokenised data: documents decoded, lengths, counts."""
    if verify:
        require_intact(folder)
    source = open_source(folder)
    loaded = load_tokenizer(tokenizer or source.manifest["tokenizer"]["name"])
    if loaded.fingerprint != source.manifest["tokenizer"]["fingerprint"]:
        raise PolygluError(
            f"tokenizer {loaded.name} is not the one that {folder} was made with; pass it with --tokenizer."
        )
    lengths = scan_documents(source).lengths
    screen = console()
    screen.print(_overview(source, lengths))
    screen.print(_chunk_table(source))
    for sample in take_samples(source, loaded, lengths, documents):
        screen.print(sample_panel(sample))


def _overview(source: TokenSource, lengths: Integers) -> Table:
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
    table.add_row("bad records", in_words(manifest["bad_records"]))
    values = length_statistics(lengths)
    table.add_row(
        "document length", "  ".join(f"{name}: {value:,.0f}" for name, value in values.items()) + "  (tokens)"
    )
    return table


def _chunk_table(source: TokenSource) -> Table:
    table = Table("chunk", "tokens", "documents", "MB", "SHA-256")
    for chunk in source.manifest["chunks"]:
        size = f"{(source.folder / chunk['file']).stat().st_size / 1e6:,.1f}"
        table.add_row(chunk["file"], f"{chunk['tokens']:,}", f"{chunk['documents']:,}", size, chunk["sha256"][:12])
    return table


def sample_panel(sample: Sample, source: str = "") -> Panel:
    """A document in a frame, on whose top its length stands."""
    return Panel(Text(sample.text), title=Text(sample_title(sample, source)), title_align="left")


def sample_title(sample: Sample, source: str = "") -> str:
    """Which document it is, how long, and how much of it is shown."""
    more = "" if sample.shown == sample.length else f", first {sample.shown} shown"
    return f"{source} document {sample.document:,}: {sample.length:,} tokens{more}".strip()


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
