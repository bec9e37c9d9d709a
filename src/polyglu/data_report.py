"""What tokenised data is like: ``polyglu data report DIR``.

    DIR, or each folder of tokens in it ──► scan_documents ──► numbers ──► table, report.json
                                                                      └──► report.png, report.html

The numbers are defined in ``polyglu.data.statistics``.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyglu.data.chunks import TOKEN, TokenSource, open_source
from polyglu.data.inspect import sample_panel
from polyglu.data.manifest import MANIFEST
from polyglu.data.quarantine import in_words
from polyglu.data.statistics import (
    Documents,
    Flags,
    Integers,
    Sample,
    cut_statistics,
    find_repeats,
    length_edges,
    length_histogram,
    length_statistics,
    scan_documents,
    take_samples,
)
from polyglu.data.tokenizer import Tokenizer, load_tokenizer
from polyglu.data.verify import byte_progress
from polyglu.data_page import data_page, data_picture, tables
from polyglu.errors import PolygluError, run_command
from polyglu.files import check_writable, write_atomically, write_json, write_text
from polyglu.logs import console
from polyglu.page import Table as PageTable
from polyglu.page import as_cell, render

Report = dict[str, Any]


def find_sources(folder: Path) -> tuple[list[TokenSource], dict[str, str]]:
    """Open a folder of tokens, or those that lie in it, by name; other things in it are passed over.

    Returns:
        The sources, and name -> why it is left out, for data that is unfinished or damaged beside others.

    Raises:
        PolygluError: there is none that can be read.
    """
    if (folder / MANIFEST).exists():
        return [open_source(folder, folder.resolve().name)], {}
    places = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not places:
        raise PolygluError(f"{folder} holds no tokenised data, nor does a folder in it; tokenise a source first.")
    sources, left_out = [], {}
    for place in places:
        try:
            sources.append(open_source(place))
        except PolygluError as error:
            left_out[place.name] = str(error)
    if not sources:
        raise PolygluError(next(iter(left_out.values())))
    return sources, left_out


def build_report(sources: Sequence[TokenSource], scanned: Sequence[Documents], seq_length: int) -> Report:
    """All numbers of sources and of their total, without samples."""
    repeats = find_repeats([documents.digests for documents in scanned])
    longest = max((int(documents.lengths.max(initial=1)) for documents in scanned), default=1)
    edges = length_edges(longest)
    numbers = {
        source.name: _numbers(source, documents.lengths, flags, edges, seq_length)
        for source, documents, flags in zip(sources, scanned, repeats, strict=True)
    }
    lengths = np.concatenate([documents.lengths for documents in scanned])
    total = _with_shares({**_sum(numbers.values()), "length": length_statistics(lengths)})
    return {"seq_length": seq_length, "length_edges": edges.tolist(), "sources": numbers, "total": total}


def _numbers(
    source: TokenSource, lengths: Integers, flags: tuple[Flags, Flags], edges: Integers, seq_length: int
) -> Report:
    within, across = flags
    documents, tokens = length_histogram(lengths, edges)
    repeated = within | across
    return _with_shares(
        {
            "tokens": source.n_tokens,
            "documents": len(lengths),
            "rows": source.manifest["rows"],
            "bad_records": dict(source.manifest["bad_records"]),
            "length": length_statistics(lengths),
            "histogram": {"documents": documents.tolist(), "tokens": tokens.tolist()},
            "windows": cut_statistics(lengths, source.n_tokens, seq_length),
            "repeats": {
                "documents": int(repeated.sum()),
                "tokens": int(lengths[repeated].sum()),
                "documents_of_other_sources": int(across.sum()),
                "tokens_of_other_sources": int(lengths[across].sum()),
            },
        }
    )


def _with_shares(numbers: Report) -> Report:
    """Put beside the counts the shares that people ask for; None of nothing."""

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    windows, repeats = numbers["windows"], numbers["repeats"]
    windows["cutting_share"] = share(windows["cutting"], windows["windows"])
    windows["documents_cut_share"] = share(windows["documents_cut"], numbers["documents"])
    for part in ("documents", "tokens"):
        for key in (part, f"{part}_of_other_sources"):
            repeats[f"{key}_share"] = share(repeats[key], numbers[part])
    return numbers


def _sum(numbers: Iterable[Report]) -> Report:
    """Counts of all sources together, part by part."""
    each = list(numbers)
    parts = {part: Counter[str]() for part in ("bad_records", "windows", "repeats")}
    for part, counts in parts.items():
        for one in each:
            counts.update({key: value for key, value in one[part].items() if not key.endswith("_share")})
    plain = {key: sum(one[key] for one in each) for key in ("tokens", "documents", "rows")}
    histogram = {key: np.sum([one["histogram"][key] for one in each], 0).tolist() for key in ("documents", "tokens")}
    return {**plain, **{part: dict(counts) for part, counts in parts.items()}, "histogram": histogram}


def _console_table(table: PageTable) -> Table:
    """A page's table as text."""
    shown = Table(title=table.caption, title_justify="left")
    for column in table.columns:
        right = column.kind == "number"
        shown.add_column(column.title, justify="right" if right else "left", overflow="ellipsis" if right else "fold")
    for row in table.rows:
        shown.add_row(*(as_cell(*cell).text for cell in zip(table.columns, row, strict=True)))
    return shown


def _add_samples(
    numbers: Report, source: TokenSource, lengths: Integers, count: int, load: Callable[[str], Tokenizer]
) -> None:
    """Put decoded documents into the numbers of a source, or why there are none."""
    recorded = source.manifest["tokenizer"]
    try:
        tokenizer = load(recorded["name"])
        if tokenizer.fingerprint != recorded["fingerprint"]:
            raise PolygluError(f"tokenizer {tokenizer.name} is not the one that {source.folder} was made with.")
        numbers["samples"] = [asdict(sample) for sample in take_samples(source, tokenizer, lengths, count)]
    except PolygluError as error:
        numbers["samples"], numbers["no_samples"] = [], f"{error} Name its tokenizer with --tokenizer."


def _show(screen: Console, report: Mapping[str, Any]) -> None:
    for name, numbers in report["sources"].items():
        for sample in numbers.get("samples", []):
            screen.print(sample_panel(Sample(**sample), name))
        if "no_samples" in numbers:
            screen.print(Text(f"{name}: no samples: {numbers['no_samples']}"))
    for table in tables(report):
        screen.print(_console_table(table))
    for name, numbers in report["sources"].items():
        if numbers["bad_records"]:
            screen.print(Text(f"{name}: bad records: {in_words(numbers['bad_records'])}"))
    for name, reason in report["left_out"].items():
        screen.print(Text(f"{name} is left out: {reason}"))


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of token chunks, or of several such folders.")],
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens of a training window.")] = 4096,
    samples: Annotated[int, typer.Option(min=0, help="Documents of each source to decode, evenly spread.")] = 3,
    tokenizer: Annotated[str | None, typer.Option(help="Default: the one that each manifest names.")] = None,
    output: Annotated[Path | None, typer.Option(help="For report.json, .png and .html; default: the folder.")] = None,
) -> None:
    """Show what tokenised data is like: sizes, lengths, cuts, repeats, samples; as table, JSON, picture and page."""
    place = output or folder
    sources, left_out = find_sources(folder)
    check_writable(place, "output")
    with byte_progress() as progress:
        task = progress.add_task(f"read {folder}", total=sum(source.n_tokens for source in sources) * TOKEN.itemsize)
        scanned = [scan_documents(source, partial(progress.advance, task)) for source in sources]
    report = {**build_report(sources, scanned, seq_length), "left_out": left_out}
    load = cache(lambda recorded: load_tokenizer(tokenizer or recorded))
    for source, documents in zip(sources, scanned, strict=True):
        if samples:
            _add_samples(report["sources"][source.name], source, documents.lengths, samples, load)
    write_json(place / "report.json", report)
    picture = data_picture(report)
    write_atomically(place / "report.png", lambda file: file.write(picture.png))
    write_text(place / "report.html", render(data_page(report, picture)))
    screen = console()
    _show(screen, report)
    screen.print(Text(f"written: {', '.join(str(place / f'report.{kind}') for kind in ('json', 'png', 'html'))}"))


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
