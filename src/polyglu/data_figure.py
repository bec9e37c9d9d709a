"""The picture of tokenised data: lengths of documents, sizes of sources, how much is cut and repeated.

The numbers are those of ``polyglu.data_report``; a colour is the same source in all panels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from polyglu.interpretability.plotting import GREY, GRID, SERIES_COLOURS, literal, titled_figure

LINES, HATCHES = ("-", "--", ":", "-."), ("", "///", "...", "xxx")
"""For sources beyond the number of colours."""
SHARES = {
    "windows that cut\na document": ("windows", "cutting_share"),
    "documents\nthat are cut": ("windows", "documents_cut_share"),
    "repeated\ndocuments": ("repeats", "documents_share"),
    "repeated\ntokens": ("repeats", "tokens_share"),
}
"""Label of the picture -> where in the numbers of a source."""


def draw(report: Mapping[str, Any]) -> Any:
    """Draw a report as a matplotlib Figure: lengths above, sizes and shares below; a colour is the same source."""
    sources, total = report["sources"], report["total"]
    caption = (
        f"{total['tokens']:,} tokens in {total['documents']:,} documents. A window is {report['seq_length']:,} tokens "
        "of training input; it cuts a document if its last token is not the end of one. A document is repeated if an "
        "earlier one, of the same source or of one listed before it, has exactly its tokens."
    )
    figure, body = titled_figure("Tokenised data", 11, min(16.0, 7.4 + 0.12 * len(sources)), caption)
    (documents, tokens), (sizes, shares) = body.subplots(2, 2)
    for panel, key in ((documents, "documents"), (tokens, "tokens")):
        _draw_lengths(panel, report, key)
    _draw_sizes(sizes, sources)
    _draw_shares(shares, sources)
    for panel in (documents, tokens, shares):
        panel.grid(axis="y", color=GRID)
        panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    for panel in (documents, tokens, sizes, shares):
        panel.set_axisbelow(True)
    handles, labels = documents.get_legend_handles_labels()
    body.legend(handles, labels, loc="outside upper left", ncols=6, frameon=False)
    return figure


def _draw_lengths(panel: Any, report: Mapping[str, Any], key: str) -> None:
    """Share of the documents, or of the tokens, in each bin of length."""
    for index, (name, numbers) in enumerate(report["sources"].items()):
        counts = np.array(numbers["histogram"][key])
        line = {"color": SERIES_COLOURS[index % 4], "linestyle": LINES[index // 4 % 4], "linewidth": 1.6}
        panel.stairs(counts / max(1, counts.sum()), report["length_edges"], label=literal(name), **line)
    panel.axvline(
        report["seq_length"], color=GREY, linestyle="--", linewidth=1, label=f"window, {report['seq_length']:,} tokens"
    )
    lengths = [report["seq_length"], *(report["total"]["length"].get(key, 1) for key in ("min", "max"))]
    panel.set_xscale("log")
    panel.set_xlim(0.7 * min(lengths), 1.5 * max(lengths))
    panel.set(title=f"{key} by length of the document", xlabel="length of the document (tokens)", ylim=(0, None))
    panel.set_ylabel(f"share of the source's {key}")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _draw_sizes(panel: Any, sources: Mapping[str, Any]) -> None:
    tokens = [numbers["tokens"] for numbers in sources.values()]
    bars = panel.barh(range(len(sources)), tokens, height=0.7)
    for index, bar in enumerate(bars):
        bar.set(**_fill(index))
    panel.bar_label(bars, [_short(count) for count in tokens], padding=4, color=GREY)
    panel.set_yticks(range(len(sources)), [literal(name) for name in sources])
    room = max(3, len(sources)) / 2  # one source alone is a bar, not a wall
    panel.set_ylim(len(sources) / 2 - 0.5 + room, len(sources) / 2 - 0.5 - room)
    panel.set(title="size", xlabel="tokens", xlim=(0, 1.18 * max(tokens)))
    panel.xaxis.set_major_formatter(lambda value, _: _short(value))
    panel.grid(axis="x", color=GRID)


def _draw_shares(panel: Any, sources: Mapping[str, Any]) -> None:
    """One group of bars a share, one bar a source."""
    width = min(0.3, 0.8 / len(sources))
    highest = 0.0
    for index, numbers in enumerate(sources.values()):
        values = [numbers[part][key] or 0.0 for part, key in SHARES.values()]
        places = np.arange(len(SHARES)) + width * (index - (len(sources) - 1) / 2)
        bars = panel.bar(places, values, 0.9 * width, **_fill(index))
        if len(sources) <= 4:
            panel.bar_label(bars, [_percent(value) for value in values], padding=2, fontsize=8, color=GREY)
        highest = max(highest, *values)
    panel.set_xticks(range(len(SHARES)), list(SHARES))
    panel.set(title="cuts and repeats", ylabel="share of the source")
    panel.set(xlim=(-0.5, len(SHARES) - 0.5), ylim=(0, 1.1 * highest or 0.1))


def _fill(index: int) -> dict[str, Any]:
    return {"facecolor": SERIES_COLOURS[index % 4], "hatch": HATCHES[index // 4 % 4], "edgecolor": "white"}


def _short(count: float) -> str:
    """A count as ``950``, ``1.2 k``, ``34 M`` or ``5 B``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def _percent(share: float) -> str:
    """A share as ``31%``, ``4.2%`` or ``0.031%``."""
    return f"{share:.0%}" if share >= 0.0995 else f"{100 * share:.2g}%"
