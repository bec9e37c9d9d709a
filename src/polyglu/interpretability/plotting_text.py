"""Figures of routing on texts, over training and under ablation: numbers in, a figure and its points' details out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from matplotlib.colors import LinearSegmentedColormap, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from polyglu import page
from polyglu.estimates import SIGNIFICANT
from polyglu.interpretability.plotting import (
    GREY,
    GRID,
    MARKERS,
    SERIES_COLOURS,
    activation_legend,
    entropy_limit,
    entropy_range,
    figure_legend,
    layer_axis,
    literal,
    stacked_bars,
    titled_figure,
)
from polyglu.interpretability.plotting_pages import Point, page_figure
from polyglu.interpretability.statistics import Interval
from polyglu.model.activations import ACTIVATIONS

COMPONENT_COLOURS = ("#6741d9", "#0b7285", "#66b8c4", "#b5541c", "#e8a87c")
"""Of the parts of the variance."""
SMALL_CHANGE = 0.01
"""Nats per token; below, the axis is linear."""
SPREAD = 0.5
"""Room in which series stand side by side, in layers."""


class Drawn(NamedTuple):
    """A figure, and what its points tell on a page."""

    figure: Figure
    points: list[Point]
    themed: bool = True
    """Can be drawn in dark colours; not so what is written on a colour map."""

    def on_page(self, alt: str) -> page.Figure:
        """Make a page's figure; this one may have dark colours afterwards."""
        shown = page_figure(self.figure, alt, points=self.points, wide=True)
        return shown if self.themed else replace(shown, dark=None)


def text_routing(
    shares: Interval, dominant: Tensor, entropies: Mapping[str, Interval], max_entropy: float, caption: str
) -> Drawn:
    """Shares of the activations, neurons by dominant activation, and entropies, by layer.

    Args:
        shares: ``[L, K]``.
        dominant: ``[L, K]``, share of the layer's neurons.
        entropies: label -> ``[L]`` nats.
        max_entropy: ln K.
        caption: printed below.
    """
    n_layers, n_activations = dominant.shape
    figure, body = titled_figure("Routing on text", max(13.0, 0.45 * n_layers), 4.8, caption)
    left, middle, right = body.subplots(1, 3)
    points = []
    for k, activation in enumerate(ACTIVATIONS[:n_activations]):
        values = Interval(*(part[:, k] for part in shares))
        points += error_bars(left, values, k, n_activations, activation.colour, ".1%", activation.name, named=False)
    left.set(title="share of the routing weight", ylim=(-0.03, 1.03))
    stacked_bars(middle, dominant, [activation.colour for activation in ACTIVATIONS[:n_activations]])
    middle.set(title="neurons by dominant activation", ylim=(0, 1))
    for index, (label, values) in enumerate(entropies.items()):
        points += error_bars(right, values, index, len(entropies), SERIES_COLOURS[index], ".3f", label)
    entropy_limit(right.axhline, max_entropy)
    right.set(title="entropy (nats)", ylim=entropy_range(max_entropy))
    for panel in (left, middle, right):
        layer_axis(panel, n_layers)
        panel.set_axisbelow(True)
        panel.grid(axis="y", color=GRID)
    for panel in (left, middle):
        panel.yaxis.set_major_formatter(PercentFormatter(1))
    activation_legend(body, n_activations, right)
    return Drawn(figure, points)


def routing_variance(components: Mapping[str, Tensor], of_largest: Tensor, caption: str) -> Drawn:
    """Where the variance of the routing weights comes from, and how large it is, by layer.

    Args:
        components: name -> share of the variance ``[L]``.
        of_largest: ``[L]``, the variance as a share of the largest that the layer's mean shares allow.
        caption: printed below.
    """
    n_layers = len(of_largest)
    figure, body = titled_figure(
        "What decides the routing weight of a neuron at a token", max(11.0, 0.4 * n_layers), 4.8, caption
    )
    left, right = body.subplots(1, 2, width_ratios=(2, 1))
    bottom, width = torch.zeros(n_layers), 0.85 if n_layers <= 40 else 1.0
    points = []
    for (name, values), colour in zip(components.items(), COMPONENT_COLOURS, strict=True):
        known = values.nan_to_num(nan=0.0).float()
        left.bar(range(n_layers), known.numpy(), width, bottom.numpy(), color=colour, label=name)
        for layer in range(n_layers):
            middle = (bottom[layer] + known[layer] / 2).item()
            points.append(Point(left, layer, middle, f"layer {layer}, {name}: {known[layer]:.1%}"))
        bottom = bottom + known
    left.set(title="share of the variance of g", ylim=(0, 1))
    right.bar(range(n_layers), of_largest.numpy(), color=GREY)
    right.set(title="its size, of the largest possible", ylim=(0, max(0.02, 1.1 * of_largest.max().item())))
    for panel in (left, right):
        panel.yaxis.set_major_formatter(PercentFormatter(1))
        layer_axis(panel, n_layers)
        panel.set_axisbelow(True)
        panel.grid(axis="y", color=GRID)
    figure_legend(body, left, 5)
    return Drawn(figure, points)


def routing_kinds(
    effect: Interval, p_values: Tensor, kinds: Sequence[str], pairs: Tensor, pair_p: Tensor, caption: str
) -> Drawn:
    """How routing differs between kinds of text: by layer, and pair by pair.

    Args:
        effect: omega squared ``[L]``.
        p_values: ``[L]``, corrected.
        kinds: names.
        pairs: omega squared ``[kinds, kinds]`` of each pair over all layers; NaN on the diagonal.
        pair_p: ``[kinds, kinds]``, corrected.
        caption: printed below.
    """
    n_layers = len(p_values)
    figure, body = titled_figure(
        "How routing differs between kinds of text", max(12.0, 6 + 0.3 * n_layers), 5.0, caption
    )
    left, right = body.subplots(1, 2, width_ratios=(1.25, 1))
    shown = p_values <= SIGNIFICANT
    for mask, filled, label in ((shown, True, f"p ≤ {SIGNIFICANT}"), (~shown, False, "difference not shown")):
        layers = mask.nonzero()[:, 0]
        if len(layers):
            values = Interval(*(part[layers] for part in effect))
            fill = SERIES_COLOURS[3] if filled else "white"
            left.errorbar(
                layers.numpy(), values.estimate.numpy(), yerr=_reach(values), fmt="o", color=SERIES_COLOURS[3],
                markerfacecolor=fill, capsize=2, label=label,
            )  # fmt: skip
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(title="between all kinds, by layer", ylabel="ω²: variance between documents\nthat the kind explains")
    left.set_ylim(min(-0.05, effect.low.nan_to_num(neginf=-0.05).min().item()), 1.02)
    left.yaxis.set_major_formatter(PercentFormatter(1))
    left.grid(axis="y", color=GRID)
    layer_axis(left, n_layers)
    left.legend(frameon=False)
    colours = LinearSegmentedColormap.from_list("effect", ["#f2f6f7", SERIES_COLOURS[3]])
    right.imshow(pairs.clamp(min=0).numpy(), vmin=0, vmax=1, cmap=colours)
    for row, column in pairs.isfinite().nonzero().tolist():
        value = pairs[row, column].item()
        text = f"{value:.0%}" if pair_p[row, column] <= SIGNIFICANT else f"({value:.0%})"
        right.text(column, row, text, ha="center", va="center", color="white" if value > 0.5 else "#222222")
    names = [literal(kind) for kind in kinds]
    right.set_xticks(range(len(kinds)), names, rotation=30, ha="right")
    right.set_yticks(range(len(kinds)), names)
    right.set(title="pair by pair, over all layers\n(in brackets: difference not shown)")
    told = [
        f"layer {layer}: {_told(effect, layer, '.1%')}, corrected p = {p:.2g}"
        for layer, p in enumerate(p_values.tolist())
    ]
    points = [Point(left, layer, effect.estimate[layer].item(), text) for layer, text in enumerate(told)]
    return Drawn(figure, points, themed=False)


def over_training(
    steps: Sequence[int], entropies: Mapping[str, Interval], shares: Interval, max_entropy: float, caption: str
) -> Drawn:
    """Entropy and shares over the steps of a run.

    Args:
        steps: S of them, rising.
        entropies: label -> ``[S]`` nats, mean over layers.
        shares: ``[S, K]``, mean over layers.
        max_entropy: ln K.
        caption: printed below.
    """
    figure, body = titled_figure("Routing over training", 12, 4.8, caption)
    left, right = body.subplots(1, 2)
    points = []
    for index, (label, values) in enumerate(entropies.items()):
        points += _band(left, steps, values, SERIES_COLOURS[index], MARKERS[index], ".3f", label)
    entropy_limit(left.axhline, max_entropy)
    left.set(title="entropy (nats), mean over layers", xlabel="step", ylim=entropy_range(max_entropy))
    n_activations = shares.estimate.shape[1]
    for k, activation in enumerate(ACTIVATIONS[:n_activations]):
        values = Interval(*(part[:, k] for part in shares))
        points += _band(right, steps, values, activation.colour, "o", ".1%", activation.name)
    right.set(title="share of the routing weight on text, mean over layers", xlabel="step", ylim=(-0.03, 1.03))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for panel in (left, right):
        panel.grid(axis="y", color=GRID)
    activation_legend(body, n_activations, left)
    return Drawn(figure, points)


def error_bars(
    panel: Any, values: Interval, index: int, count: int, colour: str, spec: str, label: str, named: bool = True
) -> list[Point]:
    """Draw a series ``[L]`` with its intervals, beside those of the other series; return its points.

    Args:
        panel: axes.
        values: of the layers.
        index: of the series.
        count: of series.
        colour: of the series.
        spec: how its numbers are written.
        label: its name.
        named: put it into the legend.
    """
    layers = torch.arange(len(values.estimate)) + SPREAD * ((index + 0.5) / count - 0.5)
    size = 5 if len(layers) <= 15 else 3
    panel.errorbar(
        layers.numpy(), values.estimate.numpy(), yerr=_reach(values), color=colour, fmt=MARKERS[index % len(MARKERS)],
        linestyle="-", linewidth=0.8, markersize=size, capsize=2, label=label if named else None,
    )  # fmt: skip
    return [
        Point(panel, x, y, f"layer {layer}, {label}: {_told(values, layer, spec)}")
        for layer, (x, y) in enumerate(zip(layers.tolist(), values.estimate.tolist(), strict=True))
    ]


def _told(values: Interval, index: int, spec: str) -> str:
    """An estimate, with its interval where it has one."""
    estimate, low, high = (part[index].item() for part in values)
    if low == high or not (math.isfinite(low) and math.isfinite(high)):
        return format(estimate, spec)
    return f"{estimate:{spec}} ({low:{spec}} to {high:{spec}})"


def _reach(values: Interval) -> Any:
    """Lengths of error bars ``[2, n]``; none where an interval has no end."""
    reach = torch.stack([values.estimate - values.low, values.high - values.estimate])
    return reach.clamp(min=0).nan_to_num(nan=0.0, posinf=0.0).numpy()


def _band(
    panel: Any, steps: Sequence[int], values: Interval, colour: str, marker: str, spec: str, label: str
) -> list[Point]:
    low, high = (part.double().clamp(-1e3, 1e3).numpy() for part in (values.low, values.high))
    panel.plot(steps, values.estimate.numpy(), color=colour, marker=marker, linewidth=1.4, markersize=5, label=label)
    panel.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    return [
        Point(panel, step, values.estimate[index].item(), f"step {step:,}, {label}: {_told(values, index, spec)}")
        for index, step in enumerate(steps)
    ]


def ablation(
    labels: Sequence[str], whole: Interval, layers: Tensor | None, shown: Tensor | None, caption: str
) -> Drawn:
    """Change of the loss when routing is replaced, in all layers and in each.

    Args:
        labels: of n interventions.
        whole: ``[n]`` nats per token, in all layers.
        layers: ``[n, L]``, in one layer alone; or None.
        shown: bool ``[n, L]``, whether the change differs from 0, corrected.
        caption: printed below.
    """
    n_layers = 0 if layers is None else layers.shape[1]
    figure, body = titled_figure(
        "What routing is worth to the trained model", max(12.0, 7 + 0.35 * n_layers), 5.2, caption
    )
    panels = body.subplots(
        1, 2 if n_layers else 1, squeeze=False, width_ratios=(1, max(0.8, 0.05 * n_layers)) if n_layers else None
    )[0]
    rows = range(len(labels))
    panels[0].errorbar(whole.estimate.numpy(), rows, xerr=_reach(whole), fmt="o", color=SERIES_COLOURS[3], capsize=2)
    panels[0].axvline(0, color=GREY, linewidth=0.8)
    panels[0].set_xscale("symlog", linthresh=SMALL_CHANGE)
    ends = torch.cat(list(whole)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    panels[0].set_xlim(1.5 * min(-SMALL_CHANGE, ends.min().item()), 1.5 * max(SMALL_CHANGE, ends.max().item()))
    panels[0].set_yticks(rows, labels)
    panels[0].invert_yaxis()
    panels[0].grid(axis="x", color=GRID)
    panels[0].set(title="replaced in all layers", xlabel="change of the held-out loss (nats per token)")
    if layers is not None and shown is not None:
        most = max(SMALL_CHANGE, layers.abs().max().item())
        norm = SymLogNorm(SMALL_CHANGE, vmin=-most, vmax=most)
        image = panels[1].imshow(layers.numpy(), norm=norm, cmap="PuOr_r", aspect="auto")
        for row, layer in shown.nonzero().tolist():
            panels[1].plot(layer, row, marker=".", color="#222222", markersize=4)
        panels[1].set_yticks([])
        panels[1].set(title="replaced in one layer; dot: differs from 0")
        layer_axis(panels[1], n_layers)
        panels[1].set_xlim(-0.5, n_layers - 0.5)
        figure.colorbar(image, ax=panels[1], label="change (nats per token)")
    points = [
        Point(panels[0], whole.estimate[row].item(), row, f"{label}, all layers: {_told(whole, row, '+.2g')}")
        for row, label in enumerate(labels)
    ]
    for row, changes in enumerate([] if layers is None else layers.tolist()):
        points += [
            Point(panels[1], layer, row, f"{labels[row]}, layer {layer}: {change:+.2g}")
            for layer, change in enumerate(changes)
        ]
    return Drawn(figure, points, themed=layers is None)
