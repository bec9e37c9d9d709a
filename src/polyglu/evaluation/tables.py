"""Results of an evaluation as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from polyglu.evaluation.suites import PUBLISHED_NOTE


def results_table(results: Mapping[str, Any]) -> Table:
    """Metrics and perplexities as a table."""
    table = Table(title=f"{results['checkpoint']['path']}, step {results['checkpoint']['step']}")
    table.add_column("task")
    table.add_column("metric")
    for column in ("value", "± stderr", "n"):
        table.add_column(column, justify="right")
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if filter_name and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filter_name}")
                shown = "" if error is None else f"{error:.4f}"
                table.add_row(task, key, f"{value:.4f}", shown, str(values.get("n_samples", "")))
    for source, values in results["perplexity"].items():
        for key in ("perplexity", "bits_per_byte"):
            if key in values:
                low, high = (values.get(f"{key}_{end}") for end in ("low", "high"))
                interval = "" if low is None else f"{low:.4f} to {high:.4f} (95%)"
                n = f"{values['documents']:,} documents, {values['tokens']:,} tokens"
                table.add_row(source, key, f"{values[key]:.4f}", interval, n)
    return table


def published_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Scores beside the published ones, as ``beside_published`` gives them."""
    table = Table(title="beside the published scores", title_justify="left", caption=PUBLISHED_NOTE)
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("value", "± stderr", "acc_norm", "published", "difference"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            row["metric"],
            _shown(row["value"], "not evaluated"),
            _shown(row["stderr"]),
            _shown(row["acc_norm"]),
            _shown(row["published"], "not published"),
            "" if row["difference"] is None else f"{row['difference']:+.2f}",
        )
    return table


def _shown(value: float | None, absent: str = "") -> str:
    return absent if value is None else f"{value:.2f}"
