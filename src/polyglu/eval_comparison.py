"""Two evaluations side by side: ``polyglu compare-evals A.json B.json --output DIR``.

    A.json, A.samples/ ─┐
                        ├─► compare ──► rows ──► table, comparison.json, comparison.png
    B.json, B.samples/ ─┘

A difference is B - A. Where the samples of both are there, it is taken sample by sample (paired), over those that both
have: what makes a question hard for both cancels, and the standard error is that of the mean difference. Held-out text
is paired by documents. Otherwise the two standard errors are added in quadrature, as of independent samples. Results
that were not measured alike have no difference, but the reason why.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from polyglu.errors import PolygluError, run_command
from polyglu.estimates import Estimate, estimate, ratio_estimate, t_quantile, welch_freedom
from polyglu.eval_comparison_figure import draw
from polyglu.evaluation.results import read_results
from polyglu.evaluation.samples import samples_folder
from polyglu.files import check_writable, write_atomically, write_json
from polyglu.interpretability.plotting import to_png
from polyglu.logs import console

Row = dict[str, Any]
Values = dict[tuple[str, int], tuple[str, float]]
"""(Task, number of the document) -> (the document, its score)."""

ALIKE = {"version": "task version", "num_fewshot": "examples in the prompt"}
"""What two results of a task must share, and its name in a sentence."""
AS_MANY = {"n_samples": "samples"}
"""What they must share as well if they cannot be paired."""
NOTED = ("apply_chat_template", "system_instruction", "limit")
"""Settings that are told where they differ."""
HELD_OUT = ("bits_per_byte", "nats_per_token")
"""Of held-out text, the first that both have."""
CLOSE = 1e-6
"""A mean of samples that is nearer to the reported score is that score."""


def compare(a: Mapping[str, Any], b: Mapping[str, Any], a_folder: Path, b_folder: Path) -> list[Row]:
    """Compare two evaluations.

    Args:
        a: results of an evaluation, as its JSON file holds them.
        b: others.
        a_folder: the samples of ``a``; may be missing.
        b_folder: those of ``b``.

    Returns:
        A row for each metric of each task or source that either has: ``name``; ``metric``; ``a`` and ``b``, each
        ``value``, ``stderr`` and ``n`` with the 95% interval, ``low`` and ``high``, or None; ``difference`` and
        ``difference_stderr`` with ``difference_low`` and ``difference_high``; ``method``: ``paired``,
        ``unpaired`` or None; ``n_pairs``, what both have; ``higher_is_better``; ``member_of``: the group that holds
        the task; ``not_comparable``: reasons.
    """
    rows = []
    groups = {task: name for found in (a, b) for name, one in found["results"].items() for task in one.get("tasks", [])}
    names = dict.fromkeys([*a["results"], *b["results"]])
    for name in sorted(names, key=lambda name: (groups.get(name, name), name in groups)):  # members after their group
        ours, theirs = a["results"].get(name, {}), b["results"].get(name, {})
        reasons = _unlike(name, a["results"], b["results"], ALIKE)
        of_number = _unlike(name, a["results"], b["results"], AS_MANY)
        for metric in dict.fromkeys([*_metrics(ours), *_metrics(theirs)]):
            left, right = _score(ours, metric), _score(theirs, metric)
            row = {"name": name, "metric": metric, "a": left, "b": right, "member_of": groups.get(name)}
            row["higher_is_better"] = {**ours, **theirs}.get("higher_is_better", {}).get(metric.split(",")[0])
            paired = None
            if left and right and not reasons:
                samples = _samples(a_folder, name, ours, metric), _samples(b_folder, name, theirs, metric)
                paired = _paired(*samples, left, right)
            rows.append(row | _difference(left, right, reasons or ([] if paired else of_number), paired))
    for source in dict.fromkeys([*a["perplexity"], *b["perplexity"]]):
        rows.append(_held_out(source, a, b))
    return rows


def _metrics(result: Mapping[str, Any]) -> list[str]:
    return [key for key in result if "," in key and not key.split(",")[0].endswith("_stderr")]


def _score(result: Mapping[str, Any], metric: str) -> Row | None:
    if metric not in result:
        return None
    stderr = result.get("_stderr,".join(metric.split(",", 1)))
    return _one(result[metric], stderr, result.get("n_samples"))


def _one(value: float, stderr: float | None, n: int | None) -> Row:
    """A score with its 95% interval: Student's, or of an unknown number of samples the normal one."""
    low, high = _ends(value, stderr, (n or math.inf) - 1)
    return {"value": value, "stderr": stderr, "n": n, "low": low, "high": high}


def _ends(value: float, stderr: float | None, freedom: float) -> tuple[float | None, float | None]:
    if stderr is None or freedom < 1:
        return None, None
    half = t_quantile(freedom) * stderr
    return value - half, value + half


def _unlike(name: str, a: Mapping[str, Any], b: Mapping[str, Any], alike: Mapping[str, str]) -> list[str]:
    """In what results of one name differ that should not; of a group, for any of its tasks."""
    if name not in a or name not in b:
        return []
    reasons = [
        f"{words}: {a[name].get(key)} and {b[name].get(key)}"
        for key, words in alike.items()
        if a[name].get(key) != b[name].get(key)
    ]
    ours, theirs = a[name].get("tasks", []), b[name].get("tasks", [])
    if sorted(ours) != sorted(theirs):
        return [*reasons, "tasks of the group differ"]
    return [*reasons, *dict.fromkeys(reason for task in ours for reason in _unlike(task, a, b, alike))]


def _samples(folder: Path, name: str, result: Mapping[str, Any], metric: str) -> Values | None:
    """Score of each document of a task, or of all tasks of a group; None if it is not there or no number."""
    key, _, filter_name = metric.partition(",")
    values: Values = {}
    for task in result.get("tasks") or [name]:
        path = folder / f"{task.replace('/', '_')}.jsonl"
        if not path.is_file():
            return None
        lines = path.read_bytes().splitlines()  # a text's would also end at U+2028, which JSON leaves as it is
        for number, line in enumerate(lines, start=1):
            try:
                sample = json.loads(line)
                if sample["filter"] == filter_name and key in sample["metrics"]:
                    value = sample["metrics"][key]
                    if not isinstance(value, int | float):
                        return None
                    document = json.dumps(sample["doc"], sort_keys=True)
                    values[task, int(sample["doc_id"])] = document, float(value)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise PolygluError(
                    f"{path}, line {number}, is not a sample of an evaluation ({error}); evaluate again, or remove it."
                ) from None
    return values


def _paired(ours: Values | None, theirs: Values | None, a: Row, b: Row) -> Estimate | None:
    """Mean difference of two results sample by sample, of those that both have; None without any.

    Samples of one number with other documents, a score that is no mean of its samples, and files that another
    evaluation left make no pairs.
    """
    both = sorted(ours.keys() & theirs.keys()) if ours and theirs else []
    if not ours or not theirs or not both or any(ours[key][0] != theirs[key][0] for key in both):
        return None
    for values, reported in ((ours, a), (theirs, b)):
        mean = math.fsum(value for _, value in values.values()) / len(values)
        if not abs(mean - reported["value"]) < CLOSE:
            return None
    return estimate([theirs[key][1] - ours[key][1] for key in both])


def _difference(a: Row | None, b: Row | None, reasons: Sequence[str], paired: Estimate | None) -> Row:
    """Of two scores, with its standard error."""
    keys = ("difference", "difference_stderr", "difference_low", "difference_high", "method", "n_pairs")
    found: Row = dict.fromkeys(keys)
    found["not_comparable"] = list(reasons) if a and b else []
    if a is None or b is None or reasons:
        return found
    if paired is not None:
        ends = {"difference_low": paired.low, "difference_high": paired.high}
        told = {"difference": paired.mean, "difference_stderr": paired.stderr, "n_pairs": paired.n}
        return found | told | ends | {"method": "paired"}
    difference = b["value"] - a["value"]
    found |= {"difference": difference, "method": "unpaired"}
    if a["low"] is None or b["low"] is None:
        return found
    stderr = math.hypot(a["stderr"], b["stderr"])
    freedom = welch_freedom(a["stderr"], b["stderr"], *(one["n"] or math.inf for one in (a, b)))
    low, high = _ends(difference, stderr, freedom)
    return found | {"difference_stderr": stderr, "difference_low": low, "difference_high": high}


def _held_out(source: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Row:
    """Row of held-out text."""
    ours, theirs = a["perplexity"].get(source), b["perplexity"].get(source)
    both = [found for found in (ours, theirs) if found is not None]
    metric = next((key for key in HELD_OUT if all(key in found for found in both)), HELD_OUT[-1])
    left, right = (
        found and _one(found[metric], found.get(f"{metric}_stderr"), found["documents"]) for found in (ours, theirs)
    )
    reasons = []
    if ours and theirs:
        size = "bytes" if metric == "bits_per_byte" else "tokens"
        reasons = [f"{key}: {ours[key]} and {theirs[key]}" for key in ("documents", size) if ours[key] != theirs[key]]
    row = {"name": source, "metric": metric, "a": left, "b": right, "member_of": None, "higher_is_better": False}
    return row | _difference(left, right, reasons, _paired_documents(ours or {}, theirs or {}, metric))


def _paired_documents(ours: Row, theirs: Row, metric: str) -> Estimate | None:
    """Difference of held-out text document by document; None unless both had the same tokens."""
    a, b = ours.get("each"), theirs.get("each")
    if not a or not b or a["sha256"] != b["sha256"]:
        return None
    sizes, unit = (a["bytes"], math.log(2)) if metric == "bits_per_byte" else (a["tokens"], 1.0)
    return ratio_estimate([(after - before) / unit for before, after in zip(a["nats"], b["nats"], strict=True)], sizes)


def noted(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Settings and versions in which two evaluations differ, a sentence each."""
    sentences = [
        f"{key} differs: A {a['settings'].get(key)}, B {b['settings'].get(key)}."
        for key in NOTED
        if a["settings"].get(key) != b["settings"].get(key)
    ]
    if a["versions"].get("lm_eval") != b["versions"].get("lm_eval"):
        versions = f"A {a['versions'].get('lm_eval')}, B {b['versions'].get('lm_eval')}"
        sentences.append(f"the harness's version differs: {versions}.")
    return sentences


def comparison_table(rows: Iterable[Row]) -> Table:
    """Rows as a table."""
    table = Table(title="B against A", title_justify="left")
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold", min_width=10)
    for column in ("A ± stderr", "B ± stderr", "B - A ± stderr"):
        table.add_column(column, justify="right")
    table.add_column("how", min_width=8)
    for row in rows:
        how = f"not comparable: {'; '.join(row['not_comparable'])}" if row["not_comparable"] else row["method"] or ""
        if row["n_pairs"] and any(found["n"] not in (None, row["n_pairs"]) for found in (row["a"], row["b"])):
            how = f"{how}, {row['n_pairs']:,} that both have"
        cells = [_with_error(found["value"], found["stderr"]) if found else "–" for found in (row["a"], row["b"])]
        difference = "" if row["difference"] is None else _with_error(row["difference"], row["difference_stderr"], "+")
        name = f"  {row['name']}" if row["member_of"] else row["name"]
        table.add_row(name, row["metric"].removesuffix(",none"), *cells, difference, how)
    return table


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def main(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="Results of an evaluation.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Results to compare with them.")],
    output: Annotated[Path, typer.Option(help="Folder for comparison.json and comparison.png.")],
) -> None:
    """Compare two evaluations: scores, differences and standard errors; a table, JSON and a figure."""
    ours, theirs = read_results(a), read_results(b)
    check_writable(output, "--output")
    rows = compare(ours, theirs, samples_folder(a), samples_folder(b))
    notes = noted(ours, theirs)
    sides = {
        side: {"file": str(path), **found["checkpoint"]} for side, path, found in (("a", a, ours), ("b", b, theirs))
    }
    write_json(output / "comparison.json", {**sides, "rows": rows, "notes": notes})
    figure = draw(rows, sides, notes)
    write_atomically(output / "comparison.png", lambda file: file.write(to_png(figure)))
    screen = console()
    for side, found in sides.items():
        screen.print(Text(f"{side.upper()}: {found['path']}, step {found['step']} ({found['file']})"))
    screen.print(comparison_table(rows))
    for note in notes:
        screen.print(Text(note))
    screen.print(Text(f"written: {output / 'comparison.json'}, {output / 'comparison.png'}"))


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
