"""The results of a comparison as a table on the console, pictures, and one page."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rich.table import Table as ConsoleTable

from polyglu.compare.figure import draw_curves, draw_differences, signed
from polyglu.compare.statistics import digits
from polyglu.files import write_atomically, write_text
from polyglu.interpretability.plotting import to_png
from polyglu.interpretability.plotting_pages import page_figure
from polyglu.page import Block, Cell, Code, Column, Note, Page, Paragraph, Section, Table, Tone, render

TONES: dict[str, Tone] = {"lower": "good", "higher": "bad"}
ROWS = {"training": "training, last steps", "heldout": "held-out"}
BUDGETS = {"tokens": ",d", "flops": ".6g", "seconds": ",.10g"}
"""How much a run may spend -> how it is written."""
CURVES, DIFFERENCES, PAGE = "curves.png", "differences.png", "report.html"
Row = list[Cell | str | float | None]


def console_table(results: Mapping[str, Any]) -> ConsoleTable:
    """What fits a console of the tables: one row a variant, the lowest loss first."""
    table = ConsoleTable(title=f"{results['suite']}: held-out loss, nats per token")
    losses, costs = _losses(results), _costs(results)
    shown = [(losses, title) for title in ("variant", "held-out loss", _against(results), "p (Holm)", "outcome")]
    shown += [(costs, title) for title in ("speed", "peak memory")]
    cells = []
    for part, title in shown:
        index, column = next(pair for pair in enumerate(part.columns) if pair[1].title == title)
        text = column.kind == "text"
        table.add_column(column.unit or title, justify="left" if text else "right", no_wrap=text)
        cells.append([_text(column, row[index]) for row in part.rows])
    for row in zip(*cells, strict=True):
        table.add_row(*row)
    return table


def write_report(results: Mapping[str, Any], output: Path) -> None:
    """Write ``curves.png``, ``differences.png`` and ``report.html``."""
    (curves, ends), (differences, means) = draw_curves(results), draw_differences(results)
    for name, figure in ((CURVES, curves), (DIFFERENCES, differences)):
        write_atomically(output / name, partial(_write, to_png(figure)))
    figures: list[Block] = [
        page_figure(differences, _differences_in_words(results), "", means, wide=True),
        page_figure(curves, _curves_in_words(results), "", ends, wide=True),
    ]
    write_text(output / PAGE, render(build_page(results, figures)))


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def build_page(results: Mapping[str, Any], figures: list[Block]) -> Page:
    """The page.

    Args:
        results: of the suite.
        figures: its pictures.
    """
    budget = ", ".join(f"{value:{BUDGETS[kind]}} {kind}" for kind, value in results["budget"].items())
    lead = (
        f"{len(results['variants'])} variants, each trained with seeds {', '.join(map(str, results['seeds']))} on "
        f"{budget}, the same data in the same order. Computed by {results['machine']}."
    )
    explained = (
        f"Held-out loss under honest routing, in nats per token, with {results['level']:.0%} t intervals over seeds. "
        "Differences are paired by seed; intervals and p are of each comparison by itself, p (Holm) is corrected for "
        "all of them."
    )
    failed = [[label, why] for label, why in results["failed"].items()]
    sections = [
        Section("Results", [Paragraph(explained), _losses(results)]),
        Section("Costs", [_costs(results)]),
        Section("Figures", figures),
        Section("What routing sees ahead", _leak_blocks(results)),
        Section("Failed runs", [Table([Column("run"), Column("why")], failed)] if failed else []),
        Section(
            "Settings",
            [Code(name, json.dumps(value, indent=2)) for name, value in results["settings"].items()],
        ),
        Section("Versions", [Table([Column("what"), Column("version")], list(results["versions"].items()))]),
    ]
    return Page(f"Comparison: {results['suite']}", lead, sections, [Note(results["verdict"])])


def _losses(results: Mapping[str, Any]) -> Table:
    """Losses and differences, the lowest loss first, variants without one last."""
    columns = [
        Column("variant"),
        Column("held-out loss", kind="number"),
        Column(_against(results), kind="number"),
        Column("p", kind="number", spec=".3g"),
        Column("p (Holm)", kind="number", spec=".3g"),
        Column("outcome"),
        Column("runs", kind="number"),
    ]
    return Table(columns, [_loss_row(row, results["reference"]) for row in _ordered(results)])


def _against(results: Mapping[str, Any]) -> str:
    return f"minus {results['reference']}"


def _ordered(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(results["variants"], key=lambda row: row["loss"]["mean"] if row["loss"] else float("inf"))


def _loss_row(row: Mapping[str, Any], reference: str) -> Row:
    loss, found = row["loss"], row["difference"]
    outcome = "reference" if row["name"] == reference else found["outcome"] if found else "no result"
    return [
        row["name"],
        None if loss is None else Cell(_with_interval(loss), loss["mean"]),
        None if found is None else Cell(signed(found), found["mean"]),
        None if found is None else found["p"],
        None if found is None else found["p_holm"],
        Cell(outcome, tone=TONES.get(outcome, "")),
        Cell(f"{row['runs']} of {row['runs'] + row['failed']}", row["runs"], "bad" if row["failed"] else ""),
    ]


def _costs(results: Mapping[str, Any]) -> Table:
    """What each variant took, in the order of the losses."""
    columns = [
        Column("variant"),
        Column("parameters", kind="number", spec=",d"),
        Column("d_ff", kind="number", spec=",d"),
        Column("steps", kind="number", spec=",d"),
        Column("tokens", kind="number", spec=",d"),
        Column("FLOPs", kind="number", spec=".3g"),
        Column("speed", unit="tokens/s", kind="number", spec=",.0f"),
        Column("peak memory", unit="GB", kind="number", spec=".2f"),
    ]
    keys = ("parameters", "d_ff", "steps", "tokens", "flops", "tokens_per_second", "peak_memory_gb")
    return Table(columns, [[row["name"], *(row.get(key) for key in keys)] for row in _ordered(results)])


def _with_interval(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['mean']:.4f}"
    return f"{found['mean']:.4f} ± {found['high'] - found['mean']:.4f}"


def _text(column: Column, cell: Cell | str | float | None) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Cell):
        return cell.text
    return cell if isinstance(cell, str) else format(cell, column.spec)


def _leak_blocks(results: Mapping[str, Any]) -> list[Block]:
    """The sentences, and the numbers behind them."""
    if not results["leaks"]:
        return []
    columns = [Column("variant"), Column("rows")]
    columns += [Column(title, kind="number") for title in ("as trained", "sees no later token")]
    columns += [Column("difference", kind="number"), Column("seeds", kind="number")]
    rows: list[Row] = []
    for leak in results["leaks"]:
        for kind in ROWS:
            found = leak[kind]
            difference = Cell(signed(found["difference"]), found["difference"]["mean"])
            low, high = (found["difference"][end] for end in ("low", "high"))
            spec = digits(found["difference"]["mean"]) if low is None else digits(low, high)
            means = [
                Cell(format(mean, spec), mean) for mean in (found[key]["mean"] for key in ("as_trained", "honest"))
            ]
            rows.append([leak["name"], ROWS[kind], *means, difference, found["difference"]["n"]])
    explained = (
        "The same weights on the same packed rows, without noise: routed by the mean they were trained with, and by "
        "the mean over the document up to the position. The difference is what later tokens are worth to them, and "
        "what it costs them that they never saw such means."
    )
    return [
        *(Paragraph(sentence) for sentence in results["leak_sentences"]),
        Paragraph(explained),
        Table(columns, rows),
    ]


def _differences_in_words(results: Mapping[str, Any]) -> str:
    found = [f"{row['name']} {signed(row['difference'])}" for row in results["variants"] if row["difference"]]
    return f"Held-out loss minus that of {results['reference']}, nats per token: {'; '.join(found) or 'none'}"


def _curves_in_words(results: Mapping[str, Any]) -> str:
    found = [
        f"{row['name']} from {row['curve'][0][1]:.3f} to {row['curve'][-1][1]:.3f}"
        for row in results["variants"]
        if row.get("curve")
    ]
    return f"Training loss over steps, mean over seeds: {'; '.join(found) or 'none'}"
