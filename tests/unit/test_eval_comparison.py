import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from polyglu import eval_comparison
from polyglu.errors import PolygluError
from polyglu.estimates import ratio_estimate
from polyglu.eval_comparison import compare, comparison_table, noted
from polyglu.eval_comparison_figure import draw
from polyglu.evaluation.samples import samples_folder

A = {"x": [0, 1, 1, 0], "y": [1, 0]}
B = {"x": [1, 1, 1, 0], "y": [1, 1]}

app = typer.Typer()
app.command()(eval_comparison.main)


def stderr(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def task(scores: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "acc,none": sum(scores) / len(scores), "acc_stderr,none": stderr(scores), "n_samples": len(scores),
        "num_fewshot": 0, "version": "1.0", "higher_is_better": {"acc": True}, **changes,
    }  # fmt: skip


def evaluation(scores: dict[str, list[float]], **settings: Any) -> dict[str, Any]:
    group = [value for one in scores.values() for value in one]
    results = {name: task(one) for name, one in scores.items()}
    results["group"] = {
        "acc,none": sum(group) / len(group),
        "acc_stderr,none": 0.1,
        "tasks": list(scores),
        "version": "2",
    }
    return {
        "settings": {"limit": None, "apply_chat_template": False, **settings},
        "versions": {"lm_eval": "0.4.13"},
        "checkpoint": {"path": "model.pt", "sha256": "0", "step": 5},
        "results": results,
        "perplexity": {},
    }


def write(path: Path, found: dict[str, Any], scores: dict[str, list[float]] | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    for name, one in (scores or {}).items():
        samples_folder(path).mkdir(exist_ok=True)
        rows = [
            {"doc_id": index, "doc": {"q": f"{name}{index}\u2028\x85"}, "filter": "none", "metrics": {"acc": value}}
            for index, value in enumerate(one)
        ]
        (samples_folder(path) / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return path


def compared(
    folder: Path, a: dict[str, Any], b: dict[str, Any], a_scores: Any = A, b_scores: Any = B
) -> dict[str, Any]:
    places = [write(folder / side / "eval.json", *one) for side, one in (("a", (a, a_scores)), ("b", (b, b_scores)))]
    return {row["name"]: row for row in compare(a, b, *map(samples_folder, places))}


def test_samples_of_both_make_a_paired_difference(tmp_path: Path) -> None:
    rows = compared(tmp_path, evaluation(A), evaluation(B))
    assert list(rows) == ["group", "x", "y"] and rows["x"]["member_of"] == "group"
    assert rows["x"]["method"] == "paired" and rows["x"]["n_pairs"] == 4
    assert rows["x"]["difference"] == pytest.approx(1 / 4)
    assert rows["x"]["difference_stderr"] == pytest.approx(stderr([1, 0, 0, 0]))
    assert rows["group"]["method"] == "paired" and rows["group"]["n_pairs"] == 6
    assert rows["group"]["difference_stderr"] == pytest.approx(stderr([1, 0, 0, 0, 0, 1]))


def test_without_samples_of_these_scores_it_is_unpaired(tmp_path: Path) -> None:
    expected = math.hypot(stderr(A["x"]), stderr(B["x"]))
    others: list[Any] = [None, {"x": [1, 1, 1, 1], "y": [1, 1]}, {"x": [1, 1, 1], "y": [1, 1]}]
    for index, left_by_others in enumerate(others):
        rows = compared(tmp_path / str(index), evaluation(A), evaluation(B), A, left_by_others)
        assert rows["x"]["method"] == "unpaired" and rows["x"]["n_pairs"] is None
        assert rows["x"]["difference"] == pytest.approx(1 / 4)
        assert rows["x"]["difference_stderr"] == pytest.approx(expected)


def test_a_metric_that_is_no_number_of_each_sample_is_unpaired(tmp_path: Path) -> None:
    pairs: Any = {name: [[-3.5, 4] for _ in scores] for name, scores in A.items()}  # as word_perplexity and f1 have
    rows = compared(tmp_path, evaluation(A), evaluation(B), pairs, pairs)
    assert {row["method"] for row in rows.values()} == {"unpaired"}


def test_other_documents_of_the_same_number_make_no_pairs(tmp_path: Path) -> None:
    place = write(tmp_path / "b/eval.json", evaluation(B), B)
    file = samples_folder(place) / "x.jsonl"
    file.write_text(file.read_text().replace("x1", "another"))
    a = write(tmp_path / "a/eval.json", evaluation(A), A)
    rows = compare(evaluation(A), evaluation(B), samples_folder(a), samples_folder(place))
    assert [row["method"] for row in rows] == ["unpaired", "unpaired", "paired"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_fewshot": 5}, "examples in the prompt: 0 and 5"),
        ({"version": "2.0"}, "task version: 1.0 and 2.0"),
    ],
)
def test_what_was_measured_otherwise_has_no_difference(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    b = evaluation(B)
    b["results"]["x"] |= changes
    rows = compared(tmp_path, evaluation(A), b)
    for name in ("x", "group"):
        assert rows[name]["difference"] is None and rows[name]["not_comparable"] == [said]
    assert rows["y"]["method"] == "paired"


def test_another_limit_leaves_the_samples_that_both_have(tmp_path: Path) -> None:
    fewer = {"x": B["x"][:3], "y": B["y"]}
    rows = compared(tmp_path / "kept", evaluation(A), evaluation(fewer), A, fewer)
    assert (rows["x"]["method"], rows["x"]["n_pairs"]) == ("paired", 3)
    assert rows["x"]["difference"] == pytest.approx(1 / 3)
    assert rows["x"]["difference_stderr"] == pytest.approx(stderr([1, 0, 0]))
    assert rows["group"]["n_pairs"] == 5 and rows["group"]["difference"] == pytest.approx(2 / 5)
    assert "3 that both have" in as_text(comparison_table(rows.values()))
    rows = compared(tmp_path / "lost", evaluation(A), evaluation(fewer), None, fewer)
    for name in ("x", "group"):
        assert rows[name]["difference"] is None and rows[name]["not_comparable"] == ["samples: 4 and 3"]


def as_text(table: Table) -> str:
    console = Console(record=True, width=200)
    console.print(table)
    return console.export_text()


def test_a_task_that_one_has_is_shown(tmp_path: Path) -> None:
    rows = compared(tmp_path, evaluation({"x": A["x"]}), evaluation(B))
    assert rows["y"]["a"] is None and rows["y"]["b"]["value"] == 1.0
    assert rows["y"]["difference"] is None and rows["y"]["not_comparable"] == []
    assert rows["group"]["not_comparable"] == ["tasks of the group differ"]


def test_held_out_text_is_compared_by_the_byte(tmp_path: Path) -> None:
    a, b = evaluation(A), evaluation(B)
    numbers = {"documents": 9, "bytes": 90, "tokens": 30, "nats_per_token": 2.0, "nats_per_token_stderr": 0.5}
    a["perplexity"] = {"held": {**numbers, "bits_per_byte": 1.5, "bits_per_byte_stderr": 0.3}, "only": numbers}
    b["perplexity"] = {"held": {**numbers, "tokens": 20, "bits_per_byte": 1.0, "bits_per_byte_stderr": 0.4}}
    rows = compared(tmp_path, a, b)
    assert rows["held"]["metric"] == "bits_per_byte" and rows["held"]["method"] == "unpaired"
    assert (rows["held"]["difference"], rows["held"]["difference_stderr"]) == pytest.approx((-0.5, 0.5))
    assert rows["only"]["metric"] == "nats_per_token" and rows["only"]["b"] is None
    b["perplexity"]["held"]["bytes"] = 80
    assert compared(tmp_path, a, b)["held"]["not_comparable"] == ["bytes: 90 and 80"]


def test_held_out_documents_of_the_same_tokens_are_paired(tmp_path: Path) -> None:
    def held_out(nats: list[float], sha256: str = "0") -> dict[str, Any]:
        each = {"sha256": sha256, "nats": nats, "tokens": [10, 20, 30], "bytes": [40, 60, 100]}
        sums = {"documents": 3, "tokens": 60, "bytes": 200, "nats_per_token": sum(nats) / 60}
        return {"held": sums | {"bits_per_byte": sum(nats) / math.log(2) / 200, "each": each}}

    a, b = evaluation(A), evaluation(B)
    a["perplexity"], b["perplexity"] = held_out([20.0, 50.0, 60.0]), held_out([18.0, 49.0, 57.0])
    row = compared(tmp_path, a, b)["held"]
    expected = ratio_estimate([-2 / math.log(2), -1 / math.log(2), -3 / math.log(2)], [40, 60, 100])
    assert (row["method"], row["n_pairs"], row["metric"]) == ("paired", 3, "bits_per_byte")
    assert row["difference"] == pytest.approx(row["b"]["value"] - row["a"]["value"])
    assert row["difference_stderr"] == pytest.approx(expected.stderr)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((expected.low, expected.high))
    b["perplexity"] = held_out([18.0, 49.0, 57.0], "another text")
    assert compared(tmp_path, a, b)["held"]["method"] == "unpaired"


def test_settings_that_differ_are_noted() -> None:
    found = noted(evaluation(A), evaluation(B, apply_chat_template=True, limit=3))
    assert found == ["apply_chat_template differs: A False, B True.", "limit differs: A None, B 3."]


def test_the_command_writes_json_and_a_picture(tmp_path: Path) -> None:
    a, b = evaluation(A), evaluation(B)
    b["results"]["only_b"] = task([1, 0])
    places = [write(tmp_path / f"{side}.json", found, None) for side, found in (("a", a), ("b", b))]
    outcome = CliRunner().invoke(app, [*map(str, places), "--output", str(tmp_path / "out")])
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "out/comparison.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["group", "x", "y", "only_b"]
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "only_b" in outcome.output and "+0.2500" in outcome.output


def test_something_else_is_refused_and_nothing_written(tmp_path: Path) -> None:
    good = write(tmp_path / "a.json", evaluation(A), A)
    (tmp_path / "b.json").write_text('{"results": []}')
    for other, said in (("b.json", "is not the results file of an evaluation"), ("c.json", "does not exist")):
        outcome = CliRunner().invoke(app, [str(good), str(tmp_path / other), "--output", str(tmp_path / "out")])
        assert isinstance(outcome.exception, PolygluError) and said in str(outcome.exception)
    sample = '{"doc_id": %s, "doc": 0, "filter": "none", "metrics": {"acc": %s}}\n'
    for line in ("{}\n", sample % ('"a"', 0), sample % ("0", "1" * 400), "[" * 100_000 + "\n"):
        (samples_folder(good) / "x.jsonl").write_text(line)
        outcome = CliRunner().invoke(app, [str(good), str(good), "--output", str(tmp_path / "out")])
        assert isinstance(outcome.exception, PolygluError)
        assert "x.jsonl, line 1, is not a sample" in str(outcome.exception)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out").exists()


def test_intervals_are_student_s_in_the_rows_and_in_the_picture(tmp_path: Path) -> None:
    a, b = evaluation(A), evaluation(B)
    rows = compare(a, b, tmp_path, tmp_path)  # without samples: unpaired
    one = next(row for row in rows if row["name"] == "x")
    error = 3.182446 * stderr(A["x"])
    assert (one["a"]["low"], one["a"]["high"]) == pytest.approx((0.5 - error, 0.5 + error))
    error = 2.446912 * math.hypot(stderr(A["x"]), stderr([0.0, 1.0, 0.0, 1.0]))
    same = compare(a, a, tmp_path, tmp_path)[1]
    assert (same["difference_low"], same["difference_high"]) == pytest.approx((-error, error), rel=1e-5)
    group = rows[0]
    assert group["a"]["high"] - group["a"]["value"] == pytest.approx(0.1959964)  # its number of samples is not told
    left, right = draw([one | {"member_of": None}], {"a": a["checkpoint"], "b": b["checkpoint"]}, []).subfigs[0].axes
    for panel, low, high in (
        (left, one["a"]["low"], one["a"]["high"]), (right, one["difference_low"], one["difference_high"]),
    ):  # fmt: skip
        (bar,) = panel.containers[0].lines[2][0].get_segments()
        assert (bar[0][0], bar[1][0]) == pytest.approx((low, high))


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    name = "x[/x] [bold]$a_{$"
    scores = {name: [0.0, 1.0]}
    a, b = evaluation(scores), evaluation(scores)
    a["checkpoint"]["path"] = b["checkpoint"]["path"] = "[/m] $m_{$.pt"
    places = [write(tmp_path / f"{side}.json", found, None) for side, found in (("a", a), ("b", b))]
    outcome = CliRunner().invoke(app, [*map(str, places), "--output", str(tmp_path / "o[/x]")], env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.exception
    assert name in outcome.output and "A: [/m] $m_{$.pt, step 5" in outcome.output
    assert (tmp_path / "o[/x]/comparison.png").exists()
