import math
from pathlib import Path
from typing import Any

import pytest
from html_page import HtmlPage

from polyglu.interpretability.plotting import curves, to_png
from polyglu.report import build_report, format_duration


def make_report(**changes: Any) -> str:
    content: dict[str, Any] = {
        "title": "A run",
        "lead": "",
        "stages": [],
        "metrics": [],
        "sft_metrics": [],
        "events": [],
        "figures": [],
        "samples": [],
        "results": {},
        "settings": {},
        "versions": {},
    }
    return build_report(**{**content, **changes})


def test_an_empty_run_is_a_page_with_a_title() -> None:
    assert HtmlPage(make_report()).texts == ["A run", "A run"]


def test_all_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>&"
    text = make_report(
        title=evil,
        stages=[{"name": evil, "seconds": 1.0}],
        events=[{"time": evil, "step": 1, "level": evil, "message": evil}],
        samples=[{"model": evil, "prompt": evil, "output": [evil], "target": evil, "metrics": {"exact_match": 1.0}}],
        results={evil: {"perplexity": {evil: {"perplexity": 2.0}}}},
        settings={evil: {evil: evil}},
        versions={evil: evil},
    )
    page = HtmlPage(text)
    assert page.texts.count(evil) == 12
    assert page.tags.count("script") == 1
    assert text.count("alert") == text.count("&lt;script&gt;alert(&#39;x")


def test_it_needs_no_network(tmp_path: Path) -> None:
    figure = tmp_path / "layer_distribution.png"
    figure.write_bytes(to_png(curves({"a": ([0, 1], [1.0, 2.0])}, "A", "")))
    rows = [{"step": step, "train/loss": 5 / step, "train/tau": 1.0} for step in (1, 2, 3)]
    page = HtmlPage(make_report(figures=[figure], metrics=rows))
    assert len(page.images) == 3
    assert any(image["alt"].startswith("Loss over steps: loss from 5 to 1.667") for image in page.images)


def test_rows_without_a_quantity_are_passed_over() -> None:
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 2, "eval/loss": 1.0}, {"step": 3, "train/loss": math.pi}]
    page = HtmlPage(make_report(sft_metrics=rows))
    assert [image["alt"] for image in page.images] == ["Loss over steps: loss from 2 to 3.142"]
    assert [text for _, _, text in page.data[0]] == [
        "step 1\nloss: 2 nats per token",
        "step 3\nloss: 3.142 nats per token",
    ]


def test_stage_table() -> None:
    stages = [
        {"name": "pretrain", "seconds": 125.2, "loss": (6.9, 1.25), "entropy": (1.3861, 0.5)},
        {"name": "evaluate", "seconds": None, "accuracy": (0.02, 0.643)},
    ]
    texts = HtmlPage(make_report(stages=stages)).texts
    for shown in ("2 min 05 s", "6.900 → 1.250", "1.3861 / 0.5000", "2.0% → 64.3%"):
        assert shown in texts
    for fact in ("64.3%", "2.0% before", "1.250", "6.900 at the first step"):
        assert fact in texts


def test_events_are_shown_in_order_and_warnings_stand_out() -> None:
    def event(level: str, message: str) -> dict[str, Any]:
        return {"time": "2026-11-23T18:19:37+00:00", "step": 12345, "kind": "any", "level": level, "message": message}

    levels = {"quiet": "note", "careful": "warning", "broken": "error", "fine": "note"}
    page = HtmlPage(make_report(events=[event(level, message) for message, level in levels.items()]))
    start = page.texts.index("Events") + 1
    shown = ("time", "UTC", "step", "level", "event")
    when = ("2026-11-23 18:19:37", "12,345")
    rows = (*when, "note", "quiet", *when, "⚠ warning", "careful", *when, "✗ error", "broken", *when, "note", "fine")
    assert page.texts[start:] == [*shown, *rows]
    assert {message: page.classes[message] for message in levels} == {
        "quiet": "text", "careful": "text warn", "broken": "text bad", "fine": "text",
    }  # fmt: skip


def test_repeated_steps_are_drawn_as_they_are() -> None:
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0, "repeated": 1}]
    assert [image["alt"] for image in HtmlPage(make_report(metrics=rows)).images] == [
        "Loss over steps: loss from 2 to 1"
    ]


def test_results_of_models_stand_side_by_side() -> None:
    base = {"results": {"sums": {"exact_match,strict": 0.02, "exact_match_stderr,strict": 0.01, "n_samples": 100}}}
    tuned = {"results": {"sums": {"exact_match,strict": 0.5}}, "perplexity": {"math": {"perplexity": 3.5612}}}
    texts = HtmlPage(make_report(results={"base": base, "tuned": tuned})).texts
    start = texts.index("sums: exact_match (strict)")
    assert texts[start + 1 : start + 3] == ["0.0200 ± 0.0100", "0.5000"]
    assert texts[texts.index("perplexity: math") + 1 :][:2] == ["–", "3.561"]


@pytest.mark.parametrize("right, verdict", [(1.0, "✓ right"), (0.0, "✗ wrong")])
def test_samples_say_whether_they_are_right(right: float, verdict: str) -> None:
    sample = {"prompt": "1 + 1", "output": "2", "target": "2", "metrics": {"exact_match": right}}
    assert verdict in HtmlPage(make_report(samples=[sample])).texts


@pytest.mark.parametrize(
    "seconds, text", [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.97, "1 min 00 s"), (3600, "1 h 00 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
