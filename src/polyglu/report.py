"""One self-contained page about a run: stages, curves, figures, samples, results, settings, versions.

Plain HTML without scripts or links to the network; follows the reader's light or dark setting, and fits a phone.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from polyglu.interpretability.plotting import curves, to_png

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

FIGURE_TEXTS = {
    "neurotransmitter_heatmap": "Activation that each neuron prefers, by layer: static, and on real text",
    "layer_distribution": "Share of each activation in each layer: static, and on real text",
    "entropy_per_layer": "Mean routing entropy of each layer",
    "entropy_histogram": "Distribution of the routing entropy of single neurons",
    "dynamic_routing_comparison": "How routing shifts between arithmetic, algebra and geometry",
    "routing_shift_summary": "How strongly each layer's routing depends on the input",
}
"""File name without suffix -> alternative text."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --line: #ddd; --box: #f6f6f7;
  --good: #1a7f37; --bad: #b42318; --warn: #8a5300 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececee; --paper: #161618; --line: #3a3a3d; --box: #212124; --good: #57c478;
    --bad: #ff8a80; --warn: #ffc35c }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
td.text, pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace }
td.text { min-width: 14rem }
.good { color: var(--good) } .bad { color: var(--bad) } .warn { color: var(--warn) }
tr.warn, tr.bad { font-weight: 600 }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem }
figure { margin: 1rem 0 } .curves figure { margin: 0 }
figure img { width: 100%; display: block; background: #fff; border-radius: .4rem; padding: .4rem }
figure.wide > img { min-width: 44rem }
.curves figure.wide > img { min-width: 0 }
details { background: var(--box); border-radius: .4rem; padding: .6rem 1rem; margin: .7rem 0 }
summary { cursor: pointer }
"""


def build_report(
    title: str,
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
    sections = {
        "Stages": _stage_table(stages) if stages else "",
        "Events": _event_table(events) if events else "",
        "Results": _results_table(results) if results else "",
        "Pre-training": _curves(metrics),
        "Fine-tuning": _curves(sft_metrics),
        "Routing": "".join(_figure(FIGURE_TEXTS.get(path.stem, path.stem), path.read_bytes()) for path in figures),
        "Samples": _sample_table(samples) if samples else "",
        "Settings": _settings(settings) if settings else "",
        "Versions": _table(["package", "version"], [_row(name, [version]) for name, version in versions.items()])
        if versions
        else "",
    }
    body = "".join(f"<h2>{name}</h2>\n{content}\n" for name, content in sections.items() if content)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{body}</body>\n</html>\n"
    )


def format_duration(seconds: float) -> str:
    """Seconds as ``12.3 s``, ``4 min 05 s`` or ``2 h 03 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    columns = (
        ("time", "seconds", format_duration),
        ("loss, first → last", "loss", lambda pair: f"{pair[0]:.3f} → {pair[1]:.3f}"),
        ("accuracy, base → fine-tuned", "accuracy", lambda pair: f"{pair[0]:.1%} → {pair[1]:.1%}"),
        ("routing entropy, static / dynamic (nats)", "entropy", lambda pair: f"{pair[0]:.4f} / {pair[1]:.4f}"),
    )
    rows = []
    for stage in stages:
        cells = ["" if stage.get(key) is None else show(stage[key]) for _, key, show in columns]
        rows.append(_row(str(stage["name"]), cells))
    return _table(["stage", *(title for title, _, _ in columns)], rows)


def _event_table(events: Sequence[Mapping[str, Any]]) -> str:
    """One row an event; warnings and errors stand out."""
    marks = {"warning": ("warn", "⚠ warning"), "error": ("bad", "✗ error")}
    rows = []
    for event in events:
        style, level = marks.get(event["level"], ("", event["level"]))
        time = str(event["time"])[:19].replace("T", " ")  # without the zone, which is UTC
        numbers = "".join(f'<td class="number">{escape(text)}</td>' for text in (time, f"{event['step']:,}"))
        texts = f"<td>{escape(level)}</td><td>{escape(event['message'])}</td>"
        rows.append(f'<tr class="{style}">{numbers}{texts}</tr>' if style else f"<tr>{numbers}{texts}</tr>")
    return _table(["time (UTC)", "step", "level", "event"], rows)


def _results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a metric or perplexity, one column a model; standard errors beside their values."""
    found: dict[str, dict[str, str]] = {}
    for model, evaluation in results.items():
        for task, metrics in evaluation.get("results", {}).items():
            for key, value in metrics.items():
                metric, _, variant = key.partition(",")
                if variant and not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr,{variant}")
                    text = f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
                    found.setdefault(f"{task}: {metric} ({variant})", {})[model] = text
        for source, values in evaluation.get("perplexity", {}).items():
            found.setdefault(f"perplexity: {source}", {})[model] = f"{values['perplexity']:.3f}"
    rows = [_row(name, [by_model.get(model, "") for model in results]) for name, by_model in found.items()]
    return _table(["", *results], rows)


def _sample_table(samples: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for sample in samples:
        texts = "".join(f'<td class="text">{escape(str(sample[key]))}</td>' for key in ("prompt", "output", "target"))
        right = any(value >= 1 for value in sample["metrics"].values())
        verdict = '<td class="good">✓ right</td>' if right else '<td class="bad">✗ wrong</td>'
        rows.append(f"<tr><td>{escape(sample.get('model', ''))}</td>{verdict}{texts}</tr>")
    return _table(["model", "", "prompt", "output", "expected"], rows)


def _row(name: str, numbers: Sequence[str]) -> str:
    cells = "".join(f'<td class="number">{escape(number)}</td>' for number in numbers)
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"


def _table(titles: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _settings(settings: Mapping[str, Any]) -> str:
    return "".join(
        f"<details><summary>{escape(name)}</summary>"
        f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False, default=str))}</pre></details>"
        for name, value in settings.items()
    )


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """One figure a quantity, of the rows that have it; nothing for a quantity that no row has."""
    figures = []
    for title, unit, keys in CURVES:
        found = {
            label: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for label, key in keys.items()
        }
        series = {
            label: ([step for step, _ in points], [value for _, value in points])
            for label, points in found.items()
            if points
        }
        if series:
            text = f"{title} over steps: " + "; ".join(
                f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, (_, values) in series.items()
            )
            figures.append(_figure(text, to_png(curves(series, title, unit))))
    return f'<div class="curves">{"".join(figures)}</div>' if figures else ""


def _figure(text: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f'<figure class="wide"><img alt="{escape(text)}" src="data:image/png;base64,{data}"></figure>\n'
