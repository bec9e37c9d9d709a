"""The pictures of a comparison: losses over training, and differences from the reference with their intervals."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from polyglu.compare.statistics import digits
from polyglu.interpretability.plotting import GREY, GRID, SERIES_COLOURS, literal, titled_figure
from polyglu.interpretability.plotting_pages import Point

LINES = ("-", "--", ":", "-.")
"""For variants beyond the number of colours."""
FIRST_SHOWN = 0.05
"""Share of a run whose losses, far above all others, would press the rest together."""
SMOOTHED = 0.1
"""Share of a run over which differences of single steps are averaged."""


def draw_curves(results: Mapping[str, Any]) -> tuple[Any, list[Point]]:
    """Training loss over steps, mean over seeds: a matplotlib Figure, and its last points.

    Below it, the same minus the reference's, seed by seed: of one step and seed, both saw the same data.
    """
    rows = [row for row in results["variants"] if row.get("curve")]
    caption = (
        f"Loss of single steps in nats per token, mean over seeds {', '.join(map(str, results['seeds']))}; below, "
        f"minus that of {results['reference']} on the same data, over the seeds that both have, averaged over a tenth "
        "of the run. Training loss includes the noise of training and, for variants that see ahead (sequence and "
        "document scope), what their routing sees of later tokens: only held-out losses compare fairly."
    )
    figure, body = titled_figure("Training loss", 11, 8, caption)
    upper, lower = body.subplots(2, sharex=True)
    points = []
    for index, row in enumerate(rows):
        shown, both = (_shown(row[key], row["steps"]) for key in ("curve", "curve_difference"))
        colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
        style = {"color": colour, "linestyle": LINES[index // len(SERIES_COLOURS) % len(LINES)], "linewidth": 1.5}
        upper.plot([step for step, _ in shown], [mean for _, mean in shown], label=literal(row["name"]), **style)
        step, mean = shown[-1]
        points.append(Point(upper, step, mean, f"{row['name']}: {mean:.4f} at step {step:,}"))
        lower.plot([step for step, _ in both], _smooth([value for _, value in both]), **style)
    upper.set(ylabel="nats per token")
    lower.set(xlabel="step", ylabel=literal(f"minus {results['reference']}"))
    for panel in (upper, lower):
        panel.grid(color=GRID)
    handles, labels = upper.get_legend_handles_labels()
    body.legend(handles, labels, loc="outside upper left", ncols=6, frameon=False)
    return figure, points


def _shown(curve: Sequence[Sequence[float]], steps: int) -> Sequence[Sequence[float]]:
    """A curve without the run's first share; all of it if nothing is beyond that."""
    return [point for point in curve if point[0] >= FIRST_SHOWN * steps] or curve


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and those before it, over a share of the run."""
    window = max(1, round(SMOOTHED * len(values)))
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def draw_differences(results: Mapping[str, Any]) -> tuple[Any, list[Point]]:
    """Held-out loss of each variant minus the reference's, with intervals: a matplotlib Figure, and its means."""
    rows = [row for row in results["variants"] if row["difference"] is not None]
    caption = (
        f"Held-out loss minus that of {results['reference']}, seed by seed: mean and {results['level']:.0%} t interval "
        "of each comparison by itself; dots are single seeds. Left of 0 is better. Filled: the difference holds after "
        "Holm's correction for all comparisons."
    )
    figure, body = titled_figure("Difference in held-out loss", 11, 1.8 + 0.42 * max(1, len(rows)), caption)
    panel, points = body.subplots(), []
    reference = _of_reference(results)
    for place, row in enumerate(rows):
        found = row["difference"]
        single = [loss - reference[seed] for seed, loss in row["loss"]["by_seed"].items() if seed in reference]
        panel.plot(single, [place] * len(single), ".", color=GREY, markersize=5)
        if found["low"] is not None:
            panel.hlines(place, found["low"], found["high"], color=SERIES_COLOURS[0], linewidth=1.6)
        decided = found["outcome"] in ("lower", "higher")
        fill = SERIES_COLOURS[0] if decided else "white"
        panel.plot(found["mean"], place, "o", color=SERIES_COLOURS[0], markerfacecolor=fill, markersize=7)
        points.append(Point(panel, found["mean"], place, f"{row['name']}: {signed(found)}"))
    panel.axvline(0, color=GREY, linestyle="--", linewidth=1)
    panel.set_yticks(range(len(rows)), [literal(row["name"]) for row in rows])
    panel.set(xlabel="nats per token", ylim=(len(rows) - 0.4, -0.6))
    panel.grid(axis="x", color=GRID)
    return figure, points


def signed(found: Mapping[str, Any]) -> str:
    """A difference with its interval, as text."""
    if found["low"] is None:
        return format(found["mean"], f"+{digits(found['mean'])}")
    spec = f"+{digits(found['low'], found['high'])}"
    return f"{found['mean']:{spec}} ({found['low']:{spec}} to {found['high']:{spec}})"


def _of_reference(results: Mapping[str, Any]) -> dict[str, float]:
    """Seed -> loss of the reference."""
    row = next(row for row in results["variants"] if row["name"] == results["reference"])
    losses: dict[str, float] = row["loss"]["by_seed"] if row["loss"] else {}
    return losses
