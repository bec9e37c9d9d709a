"""The tables and the page of a report on tokenised data, from its numbers (``polyglu.data_report``)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from polyglu.data.inspect import sample_title
from polyglu.data.quarantine import in_words
from polyglu.data.statistics import Sample
from polyglu.data_figure import SHARES, draw
from polyglu.interpretability.plotting_pages import Point, page_figure
from polyglu.page import Block, Code, Column, Fact, Facts, Figure, Note, Page, Section, Table

COLUMNS = {
    "windows\ncutting": ("windows", "cutting_share"),
    "documents\ncut": ("windows", "documents_cut_share"),
    "repeated\ndocuments": ("repeats", "documents_share"),
    "from other\nsources": ("repeats", "documents_of_other_sources_share"),
    "repeated\ntokens": ("repeats", "tokens_share"),
}
"""Label of the table -> where in the numbers of a source."""
LENGTHS = {"mean": "mean", "5%": "p5", "50%": "p50", "95%": "p95", "longest": "max"}
"""Label of the table -> name of the statistic."""


def tables(report: Mapping[str, Any]) -> list[Table]:
    """A row a source, and one for all of them if there are several."""
    numbers = list(report["sources"].items())
    numbers += [("all", report["total"])] if len(numbers) > 1 else []
    sizes, shares = [], []
    for name, one in numbers:
        sizes.append([name, one["tokens"], one["documents"], *(one["length"].get(key) for key in LENGTHS.values())])
        values = [one[part][key] for part, key in COLUMNS.values()]
        shares.append([name, *values, sum(one["bad_records"].values())])
    counts = [Column(title, kind="number", spec=",.0f") for title in ("tokens", "documents", *LENGTHS)]
    percents = [Column(title, kind="number", spec=".2%") for title in COLUMNS]
    bad = Column("bad\nrecords", kind="number", spec=",d")
    return [
        Table([Column("source"), *counts], sizes, "Sizes and lengths (tokens)"),
        Table(
            [Column("source"), *percents, bad],
            shares,
            f"Cuts by windows of {report['seq_length']:,} tokens, repeats",
        ),
    ]


def data_picture(report: Mapping[str, Any]) -> Figure:
    """Make the picture, whose bars and steps tell their numbers."""
    figure = draw(report)
    alt = "Lengths of documents, sizes of sources, cuts and repeats: the numbers of the tables."
    return page_figure(figure, alt, points=_points(figure.subfigs[0].axes, report), wide=True)


def data_page(report: Mapping[str, Any], picture: Figure) -> Page:
    """Make the page."""
    sources, total = report["sources"], report["total"]
    bad = [[name, in_words(one["bad_records"])] for name, one in sources.items() if one["bad_records"]]
    left_out = [Note(f"{name} is left out: {reason}", "warn") for name, reason in report["left_out"].items()]
    blocks: list[Block] = [*left_out, Facts(_facts(report))]
    sections = [
        Section("Numbers", tables(report)),
        Section("Picture", [picture]),
        Section("Bad records", [Table([Column("source"), Column("records")], bad)] if bad else []),
        Section("Samples", _samples(sources)),
    ]
    lead = f"{total['tokens']:,} tokens in {total['documents']:,} documents, of {', '.join(sources)}."
    return Page("Tokenised data", lead, sections, blocks)


def _facts(report: Mapping[str, Any]) -> list[Fact]:
    total = report["total"]
    cut, repeated = total["windows"]["cutting_share"], total["repeats"]["documents_share"]
    return [
        Fact("tokens", f"{total['tokens']:,}"),
        Fact("documents", f"{total['documents']:,}"),
        Fact("windows that cut a document", _percent(cut), f"of {report['seq_length']:,} tokens"),
        Fact("repeated documents", _percent(repeated), "token for token an earlier one"),
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _points(panels: Sequence[Any], report: Mapping[str, Any]) -> Iterator[Point]:
    documents, tokens, sizes, shares = panels
    edges = report["length_edges"]
    groups = iter(shares.patches)
    for index, (name, one) in enumerate(report["sources"].items()):
        for panel, key in ((documents, "documents"), (tokens, "tokens")):
            counts = one["histogram"][key]
            for (low, high), count in zip(pairwise(edges), counts, strict=True):
                share = count / max(1, sum(counts))
                text = f"{name}: {share:.2%} of its {key}\n{low:,} to {high - 1:,} tokens long"
                yield Point(panel, math.sqrt(low * high), share, text)
        yield Point(sizes, one["tokens"], index, f"{name}: {one['tokens']:,} tokens")
        for label, (part, key) in SHARES.items():
            bar = next(groups)
            text = f"{name}, {label.replace(chr(10), ' ')}: {_percent(one[part][key])}"
            yield Point(shares, bar.get_x() + bar.get_width() / 2, bar.get_height(), text)


def _samples(sources: Mapping[str, Any]) -> list[Block]:
    """The beginnings of documents, and why a source has none."""
    blocks: list[Block] = []
    for name, one in sources.items():
        for values in one.get("samples", []):
            sample = Sample(**values)
            blocks.append(Code(sample_title(sample, name), sample.text))
        if "no_samples" in one:
            blocks.append(Note(f"{name} has no samples: {one['no_samples']}"))
    return blocks
