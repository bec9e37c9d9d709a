"""The page about a run: stages, curves, figures, samples, results, settings, versions."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyglu.interpretability import FIGURES
from polyglu.interpretability.plotting import curves
from polyglu.interpretability.plotting_pages import Point, page_figure
from polyglu.page import Cell, Code, Column, Fact, Facts, Figure, Gallery, Page, Section, Table, Tone, render

CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "nats per token", {"loss": "train/loss"}),
    ("Learning rate", "", {"learning rate": "train/lr"}),
    ("Routing temperature", "τ", {"τ": "train/tau"}),
    (
        "Routing entropy",
        "nats",
        {"static, softmax(α)": "routing_entropy/mean", "dynamic, on the batch": "dynamic_routing_entropy/mean"},
    ),
    ("Speed", "tokens per second", {"tokens per second": "train/tokens_per_sec"}),
)
"""Title, unit, and label -> key of metrics.jsonl."""


def build_report(
    title: str,
    lead: str,
    stages: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    sft_metrics: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    figures: Sequence[Path],
    samples: Sequence[Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> str:
    """Make the page; a section without content is left out.

    Args:
        title: heading of the page.
        lead: what the run is, in a sentence or two.
        stages: rows of the stage table: ``name``, ``seconds``, and pairs ``loss`` (first, last), ``accuracy`` (base,
            fine-tuned; 0..1) and ``entropy`` (static, dynamic; nats). A row may lack all but its name.
        metrics: rows of the pre-training's metrics.jsonl.
        sft_metrics: rows of the fine-tuning's metrics.jsonl.
        events: rows of events.jsonl, in the order to be shown.
        figures: PNG files, embedded.
        samples: single answers as an evaluation keeps them: ``prompt``, ``output``, ``target``, ``metrics`` (name ->
            0 or 1); and ``model``, its name.
        results: name of a model -> its evaluation: ``results`` (task -> metric -> value) and ``perplexity`` (source ->
            ``perplexity``).
        settings: the resolved settings, nested.
        versions: package -> version.

    Returns:
        HTML text.
    """
    sections = [
        Section("Stages", [_stage_table(stages)] if stages else []),
        Section("Events", [_event_table(events)] if events else []),
        Section("Results", [_results_table(results)] if results else []),
        Section("Pre-training", _curves(metrics)),
        Section("Fine-tuning", _curves(sft_metrics)),
        Section("Routing", [_routing_figure(path) for path in figures]),
        Section("Samples", [_sample_table(samples)] if samples else []),
        Section("Settings", [Code(name, _json(value)) for name, value in settings.items()]),
        Section(
            "Versions", [Table([Column("package"), Column("version")], list(versions.items()))] if versions else []
        ),
    ]
    return render(Page(title, lead, sections, [Facts(facts)] if (facts := _facts(stages)) else []))


def format_duration(seconds: float) -> str:
    """Seconds as ``12.3 s``, ``4 min 05 s`` or ``2 h 03 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _facts(stages: Sequence[Mapping[str, Any]]) -> list[Fact]:
    """What a reader asks first, of the stages that tell it."""
    facts = []
    for stage in stages:
        if stage.get("accuracy") is not None:
            before, after = stage["accuracy"]
            facts.append(Fact("problems right, after fine-tuning", f"{after:.1%}", f"{before:.1%} before"))
        if stage.get("loss") is not None:
            first, last = stage["loss"]
            facts.append(Fact(f"loss, end of {stage['name']}", f"{last:.3f}", f"{first:.3f} at the first step"))
    seconds = sum(stage.get("seconds") or 0 for stage in stages)
    return [*facts, Fact("time", format_duration(seconds), "all stages")] if stages else []


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """One row a stage; a pair is sorted by what it ends with."""
    columns: Sequence[tuple[str, str, str, Callable[[Any], Cell]]] = (
        ("time", "", "seconds", lambda seconds: Cell(format_duration(seconds), seconds)),
        ("loss", "first → last", "loss", lambda pair: Cell(f"{pair[0]:.3f} → {pair[1]:.3f}", pair[1])),
        ("accuracy", "base → fine-tuned", "accuracy", lambda pair: Cell(f"{pair[0]:.1%} → {pair[1]:.1%}", pair[1])),
        (
            "routing entropy",
            "nats, static / dynamic",
            "entropy",
            lambda pair: Cell(f"{pair[0]:.4f} / {pair[1]:.4f}", pair[1]),
        ),
    )
    rows = [
        [str(stage["name"]), *(None if stage.get(key) is None else show(stage[key]) for *_, key, show in columns)]
        for stage in stages
    ]
    return Table([Column("stage"), *(Column(title, unit, "number") for title, unit, *_ in columns)], rows)


def _event_table(events: Sequence[Mapping[str, Any]]) -> Table:
    """One row an event; warnings and errors stand out."""
    marks: dict[str, tuple[Tone, str]] = {"warning": ("warn", "⚠ warning"), "error": ("bad", "✗ error")}
    rows = []
    for event in events:
        tone, level = marks.get(event["level"], ("", event["level"]))
        time = str(event["time"])[:19].replace("T", " ")  # without the zone, which is UTC
        rows.append([time, event["step"], Cell(level, tone=tone), Cell(event["message"], tone=tone)])
    columns = [Column("time", "UTC"), Column("step", kind="number", spec=",d"), Column("level"), Column("event")]
    return Table(columns, rows)


def _results_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a metric or perplexity, one column a model; standard errors beside their values."""
    found: dict[str, dict[str, Cell]] = {}
    for model, evaluation in results.items():
        for task, metrics in evaluation.get("results", {}).items():
            for key, value in metrics.items():
                metric, _, variant = key.partition(",")
                if variant and not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr,{variant}")
                    text = f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
                    found.setdefault(f"{task}: {metric} ({variant})", {})[model] = Cell(text, value)
        for source, values in evaluation.get("perplexity", {}).items():
            value = values["perplexity"]
            found.setdefault(f"perplexity: {source}", {})[model] = Cell(f"{value:,.3f}", value)
    rows = [[name, *(by_model.get(model) for model in results)] for name, by_model in found.items()]
    return Table([Column("measure"), *(Column(model, kind="number") for model in results)], rows)


def _sample_table(samples: Sequence[Mapping[str, Any]]) -> Table:
    columns = [
        Column("model"),
        Column("answer"),
        *(Column(name, kind="code") for name in ("prompt", "output", "expected")),
    ]
    rows = []
    for sample in samples:
        right = any(value >= 1 for value in sample["metrics"].values())
        verdict = Cell("✓ right", tone="good") if right else Cell("✗ wrong", tone="bad")
        rows.append([sample.get("model", ""), verdict, *(str(sample[key]) for key in ("prompt", "output", "target"))])
    return Table(columns, rows)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[Gallery]:
    """One figure a quantity, of the rows that have it; nothing for a quantity that no row has."""
    figures = []
    for title, unit, keys in CURVES:
        found = {
            label: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for label, key in keys.items()
        }
        series = {label: points for label, points in found.items() if points}
        if series:
            figures.append(_curve(title, unit, series))
    return [Gallery(figures)] if figures else []


def _curve(title: str, unit: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    text = f"{title} over steps: " + "; ".join(
        f"{label} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for label, points in series.items()
    )
    lines = {label: ([step for step, _ in points], [value for _, value in points]) for label, points in series.items()}
    drawn = curves(lines, title, unit)
    shown = [
        Point(drawn.axes[0], step, value, f"step {step:,}\n{label}: {value:.4g} {unit}".rstrip())
        for label, points in series.items()
        for step, value in points
    ]
    return page_figure(drawn, text, points=shown)


def _routing_figure(path: Path) -> Figure:
    text = FIGURES.get(path.name, path.stem)
    return Figure(path.read_bytes(), f"{text}.", wide=True)
