"""The picture of two evaluations: scores on the left, differences on the right, with 95% intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from polyglu.interpretability.plotting import GREY, GRID, MARKERS, SERIES_COLOURS, literal, titled_figure

MOST_ROWS = 60
"""Of a panel; a picture of more is not read."""


def draw(rows: Sequence[Mapping[str, Any]], sides: Mapping[str, Mapping[str, Any]], notes: Sequence[str]) -> Any:
    """Draw a comparison as a matplotlib Figure.

    Args:
        rows: as ``eval_comparison.compare`` gives them.
        sides: ``a`` and ``b`` -> ``path`` and ``step`` of the checkpoint.
        notes: sentences for the caption.
    """
    own = [row for row in rows if row["member_of"] is None]
    shares = [row for row in own if "," in row["metric"] and _is_share(row)]
    held_out = [row for row in own if "," not in row["metric"]]
    panels = [(title, found[:MOST_ROWS]) for title, found in (("score", shares), ("held-out text", held_out)) if found]
    left_out = len(rows) - sum(len(found) for _, found in panels)
    caption = [
        "Bars: 95% intervals (Student's t). A filled mark on the right is a paired difference, a hollow one an "
        "unpaired one; none where the two were not measured alike."
    ]
    if left_out:
        caption.append(f"{left_out} rows (tasks inside a group, metrics that are no shares) are in the table only.")
    heights = [max(2, len(found)) for _, found in panels] or [2]
    height = 2.6 + 0.36 * sum(heights) + 0.7 * len(heights)
    figure, body = titled_figure("Two evaluations", 11, height, "\n".join([*caption, *notes]))
    grid = body.subplots(len(heights), 2, squeeze=False, sharey="row", height_ratios=heights)
    for (title, found), pair in zip(panels or [("score", [])], grid, strict=True):
        _draw_scores(pair[0], found, title, sides)
        _draw_differences(pair[1], found)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if handles:
        body.legend(handles, labels, loc="outside upper left", ncols=1, frameon=False)
    return figure


def _is_share(row: Mapping[str, Any]) -> bool:
    return all(0 <= found["value"] <= 1 for found in (row["a"], row["b"]) if found is not None)


def _draw_scores(
    panel: Any, rows: Sequence[Mapping[str, Any]], title: str, sides: Mapping[str, Mapping[str, Any]]
) -> None:
    for index, side in enumerate(("a", "b")):
        known = [(place, row[side]) for place, row in enumerate(rows) if row[side] is not None]
        reach = [_reach(found["value"], found["low"], found["high"]) for _, found in known]
        panel.errorbar(
            [found["value"] for _, found in known],
            [place + 0.24 * index - 0.12 for place, _ in known],
            xerr=[*zip(*reach, strict=True)] or None,
            label=literal(f"{side.upper()}: {sides[side]['path']}, step {sides[side]['step']}"),
            color=SERIES_COLOURS[index], marker=MARKERS[index], markersize=5, linestyle="none", capsize=2,
        )  # fmt: skip
    names = [literal(f"{row['name']}  {row['metric'].removesuffix(',none')}") for row in rows]
    panel.set_yticks(range(len(rows)), names)
    panel.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    held_out = bool(rows) and "," not in rows[0]["metric"]
    panel.set(title=title, xlabel="lower is better" if held_out else "share of the samples")
    if not held_out:
        low, high = panel.get_xlim()
        panel.set_xlim(max(low, -0.03), min(high, 1.03))  # an interval of few samples goes beyond what is possible
    panel.grid(axis="x", color=GRID)
    panel.set_axisbelow(True)


def _reach(value: float, low: float | None, high: float | None) -> tuple[float, float]:
    """Lengths of an error bar; none without an interval."""
    return (0.0, 0.0) if low is None or high is None else (value - low, high - value)


def _draw_differences(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    panel.axvline(0, color=GREY, linewidth=1)
    for place, row in enumerate(rows):
        if row["difference"] is None:
            continue
        reach = _reach(row["difference"], row["difference_low"], row["difference_high"])
        fill = SERIES_COLOURS[3] if row["method"] == "paired" else "white"
        panel.errorbar(
            [row["difference"]], [place], xerr=[[end] for end in reach], color=SERIES_COLOURS[3], marker="D",
            markersize=5, markerfacecolor=fill, linestyle="none", capsize=2,
        )  # fmt: skip
    ends = [row[key] for row in rows for key in ("difference", "difference_low", "difference_high")]
    limit = 1.1 * max((abs(end) for end in ends if end is not None), default=0.0) or 1.0
    panel.set(title="difference, B - A", xlim=(-limit, limit))
    panel.grid(axis="x", color=GRID)
    panel.set_axisbelow(True)
