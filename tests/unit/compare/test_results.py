"""From made-up runs to results: pairing, runs that diverged, sentences about the leak."""

import math
from pathlib import Path
from typing import Any

import pytest
from test_suite import write

from polyglu.compare.figure import draw_curves
from polyglu.compare.report import build_page, console_table
from polyglu.compare.results import leak_sentence, run_label, summarise
from polyglu.compare.suite import Suite, load_suite
from polyglu.page import render

TARGETS = [10, 30, 60]


def run(loss: float, ahead: float | None = None) -> dict[str, Any]:
    """A run of a mean loss; ``ahead``: how much lower as trained, on training rows, half of it on held-out ones."""

    def part(mean: float) -> dict[str, Any]:
        return {"all": {"nats": [mean * count for count in TARGETS], "targets": TARGETS}}

    found: dict[str, Any] = {
        "steps": 30, "parameters": 5, "d_ff": 24, "train_loss": loss, "tokens_per_second": 100 * loss,
        "peak_memory_gb": loss, "curve": [[1, 4.0], [30, loss]], "heldout": part(loss),
    }  # fmt: skip
    if ahead is not None:
        found |= {"heldout_as_trained": part(loss - ahead / 2)}
        found |= {"training": part(loss), "training_as_trained": part(loss - ahead)}
    return found


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    variants = {"swiglu": {"model": {"ffn": "swiglu"}}, "sequence": {}}
    return load_suite(write(tmp_path, variants=variants, seeds=[0, 1, 2]))


def results(suite: Suite, sequence: dict[int, Any], failed: dict[str, str] | None = None) -> dict[str, Any]:
    found = {run_label("swiglu", seed): run(3.0 + 0.1 * seed) for seed in range(3)}
    found |= {run_label("sequence", seed): content for seed, content in sequence.items()}
    each = {"swiglu": 1.0, "sequence": 2.0}
    return summarise(suite, found, failed or {}, each, {name: 960 for name in each})


def test_results_of_whole_runs(suite: Suite) -> None:
    found = results(suite, {seed: run(2.9 + 0.1 * seed + 0.001 * seed, 0.5 + 0.01 * seed) for seed in range(3)})
    swiglu, sequence = found["variants"]
    assert swiglu["loss"]["mean"] == pytest.approx(3.1) and swiglu["loss"]["n"] == 3
    assert sequence["difference"]["mean"] == pytest.approx(-0.099) and sequence["difference"]["outcome"] == "lower"
    assert found["verdict"].endswith(
        "against swiglu is lower for sequence by 0.0990 nats (95% interval 0.0965 to 0.1015)."
    )
    assert (sequence["tokens_per_second"], sequence["peak_memory_gb"]) == pytest.approx((300.1, 3.102))
    assert sequence["curve"] == [[1, 4.0], [30, pytest.approx(3.001)]]
    (leak,) = found["leaks"]
    assert leak["training"]["difference"]["mean"] == pytest.approx(0.51)
    assert leak["heldout"]["difference"]["mean"] == pytest.approx(0.255)
    page = render(build_page(found, []))
    assert found["verdict"].split(" (")[0] in page and "0.5100 nats lower" in page
    assert console_table(found).row_count == 2


def test_a_run_without_a_finite_loss_has_diverged(suite: Suite) -> None:
    diverged = run(math.nan, 0.5)
    found = results(suite, {0: run(2.9, 0.5), 1: diverged}, {"sequence, seed 2": "out of memory"})
    assert found["failed"] == {
        "sequence, seed 2": "out of memory",
        "sequence, seed 1": "it diverged: its held-out loss is not finite",
    }
    sequence = found["variants"][1]
    assert (sequence["runs"], sequence["failed"], sequence["loss"]["n"]) == (1, 2, 1)
    assert sequence["difference"]["p"] is None and "2 of the runs failed" in found["verdict"]
    nothing = results(suite, {})
    assert nothing["variants"][1]["loss"] is None and len(nothing["failed"]) == 3
    assert "no result" in render(build_page(nothing, [])) and console_table(nothing).row_count == 2


def leak(suite: Suite, *ahead: float) -> str:
    found = results(suite, {seed: run(3.0, value) for seed, value in enumerate(ahead)})
    return leak_sentence(found["leaks"][0])


def test_a_leak_is_stated_with_its_interval_or_not_at_all(suite: Suite) -> None:
    assert "0.5000 nats lower than" in leak(suite, 0.5, 0.51, 0.49)
    assert "95% interval 0.4752 to 0.5248 over 3 seeds" in leak(suite, 0.5, 0.51, 0.49)
    assert "0.5000 nats higher than" in leak(suite, -0.5, -0.51, -0.49)
    assert "95% interval 0.4752 to 0.5248 over 3 seeds" in leak(suite, -0.5, -0.51, -0.49)
    assert "is undecided (+0.0333 nats" in leak(suite, 0.5, -0.5, 0.1)
    assert "over the documents of one seed's rows" in leak(suite, 0.5)
    assert "2 equal differences do not tell" in leak(suite, 0.5, 0.5)


def test_a_small_leak_is_written_with_the_digits_it_has(suite: Suite) -> None:
    found = results(suite, {seed: run(3.0, value) for seed, value in enumerate((2.2e-4, 2.4e-4, 2.3e-4))})
    sentence = leak_sentence(found["leaks"][0])
    assert "0.00023 nats lower" in sentence and "(2.99977 against 3.00000; 95% interval 0.00021 to 0.00025" in sentence
    page = render(build_page(found, []))
    assert ">2.99977<" in page and "+0.00023 (+0.00021 to +0.00025)" in page


@pytest.mark.parametrize(
    ("budget", "said"), [({"tokens": 10**9}, "1,000,000,000 tokens"), ({"seconds": 1.5e6}, "1,500,000 seconds")]
)
def test_the_budget_is_written_out(suite: Suite, budget: dict[str, float], said: str) -> None:
    assert f"on {said}, the same data" in build_page(results(suite, {}) | {"budget": budget}, []).lead


def test_curves_are_paired_by_seed(suite: Suite) -> None:
    """The mean over seeds 0 and 1 minus that over all three would be -0.15: what seed 2 did to the reference alone."""
    found = results(suite, {seed: run(2.9 + 0.1 * seed, 0.5) for seed in (0, 1)})
    assert found["variants"][1]["curve_difference"] == [[1, 0.0], [30, pytest.approx(-0.1)]]
    figure, points = draw_curves(found)
    (lower,) = [panel for panel in figure.axes if panel.get_ylabel() == "minus swiglu"]
    assert [line.get_ydata()[-1] for line in lower.lines] == pytest.approx([0, -0.1]) and len(points) == 2
    alone = results(suite, {})["variants"]
    assert alone[1]["curve_difference"] == [] == alone[1].get("curve", [])


def test_a_curve_whose_steps_are_all_early_is_drawn_whole(suite: Suite) -> None:
    found = results(suite, {0: run(2.9, 0.5) | {"curve": [[1, 4.0], [30, None]]}})
    assert [point.text for point in draw_curves(found)[1]] == [
        "swiglu: 3.1000 at step 30",
        "sequence: 4.0000 at step 1",
    ]
