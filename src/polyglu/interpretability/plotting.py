"""All figures. Each function takes numbers and returns a matplotlib Figure; nothing is shown, no state is kept.

Shapes as in ``polyglu.model.architecture``; activation names and colours from ``polyglu.model.activations``.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from polyglu.interpretability.neurotransmitter_maps import (
    neuron_order,
    preference_shares,
    preferred_activation,
)
from polyglu.model.activations import ACTIVATIONS

NO_PREFERENCE = ("no preference", "#ebebeb")
SERIES_COLOURS = ("#222222", "#b5541c", "#6741d9", "#0b7285")
MARKERS = ("o", "s", "^", "D")
GREY, FAINT = "#666666", "#cccccc"
GRID = "#e6e6e6"
DPI = 150
MAP_COLUMNS = 600
"""Neurons side by side in a map; more are averaged."""
PALEST = 0.3
"""Share of its colour that the weakest preference keeps."""


def to_png(figure: Figure) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def neurotransmitter_heatmap(static: Tensor, effective: Tensor, caption: str) -> Figure:
    """Preferred activation of every neuron, static and effective side by side; a column is the same neuron in both.

    Args:
        static: weights ``[L, F, K]``.
        effective: weights ``[L, F, K]``.
        caption: printed below.
    """
    n_layers, n_neurons, n_activations = static.shape
    figure, body = titled_figure("Which activation each neuron prefers", 11, min(11.0, 3.2 + 0.2 * n_layers), caption)
    panels = body.subplots(1, 2, sharey=True)
    order = neuron_order(static, effective)
    titles = ("static: softmax(α / τ), without any text", "effective: full logits, mean over real text")
    for panel, weights, title in zip(panels, (static, effective), titles, strict=True):
        extent = (0, n_neurons, n_layers - 0.5, -0.5)
        image = _preference_image(weights, order).numpy()
        panel.imshow(image, aspect="auto", interpolation="nearest", extent=extent)
        panel.set(title=title, xlabel="neurons of the layer, sorted by preference (paler: weaker)")
        if n_layers <= 40:
            panel.hlines([layer + 0.5 for layer in range(n_layers - 1)], 0, n_neurons, colors="white", linewidth=1.5)
        panel.set_xlim(0, n_neurons)
    panels[0].set_ylabel("layer")
    panels[0].set_yticks(_layer_ticks(n_layers))
    activation_legend(body, n_activations)
    return figure


def layer_distribution(static: Tensor, effective: Tensor, caption: str) -> Figure:
    """Stacked bars by layer: share of neurons that prefer each activation, and share of effective routing weight.

    Args:
        static: weights ``[L, F, K]``.
        effective: weights ``[L, F, K]``.
        caption: printed below.
    """
    n_layers, _, n_activations = static.shape
    figure, body = titled_figure("Activations used in each layer", 11, 5, caption)
    panels = body.subplots(1, 2, sharey=True)
    colours = [activation.colour for activation in ACTIVATIONS[:n_activations]]
    stacked_bars(panels[0], preference_shares(static), [*colours, NO_PREFERENCE[1]])
    stacked_bars(panels[1], effective.mean(1), colours)
    panels[0].set(title="static: neurons by largest α", ylabel="share of the layer")
    panels[1].set(title="effective: routing weight on real text")
    for panel in panels:
        layer_axis(panel, n_layers)
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
    activation_legend(body, n_activations)
    return figure


def entropy_per_layer(entropies: Mapping[str, Tensor], max_entropy: float, caption: str) -> Figure:
    """Mean entropy of each layer with the standard deviation over its neurons.

    Args:
        entropies: label -> ``[L, F]`` nats.
        max_entropy: ln K.
        caption: printed below.
    """
    figure, body = titled_figure(
        "Routing entropy of each layer, mean and standard deviation over neurons", 11, 5, caption
    )
    panel = body.subplots()
    n_layers = len(next(iter(entropies.values())))
    for index, (label, values) in enumerate(entropies.items()):
        deviation = values.std(1, correction=0).numpy()
        # Side by side, so that equal values do not hide each other.
        layers = torch.arange(n_layers) + 0.12 * (index - (len(entropies) - 1) / 2)
        style = _line_style(index, n_layers)
        panel.errorbar(layers.numpy(), values.mean(1).numpy(), yerr=deviation, capsize=2, label=label, **style)
    entropy_limit(panel.axhline, max_entropy)
    panel.set(ylabel="entropy (nats)", ylim=entropy_range(max_entropy))
    layer_axis(panel, n_layers)
    panel.grid(axis="y", color=GRID)
    figure_legend(body, panel)
    return figure


def entropy_histogram(entropies: Mapping[str, Tensor], max_entropy: float, caption: str) -> Figure:
    """Distribution of the entropy of single neurons over the whole model, one panel a kind of entropy.

    Args:
        entropies: label -> ``[L, F]`` nats.
        max_entropy: ln K.
        caption: printed below.
    """
    figure, body = titled_figure(
        "How decided single neurons are: distribution of routing entropy", 4 * len(entropies), 4.4, caption
    )
    panels = body.subplots(1, len(entropies), sharey=True, squeeze=False)[0]
    for index, (panel, (label, values)) in enumerate(zip(panels, entropies.items(), strict=True)):
        flat = values.flatten().clamp(max=max_entropy).numpy()  # rounding may lift it above ln K
        panel.hist(
            flat, bins=50, range=(0, max_entropy or 0.1), weights=[1 / flat.size] * flat.size,
            color=SERIES_COLOURS[index], alpha=0.85,
        )  # fmt: skip
        entropy_limit(panel.axvline, max_entropy)
        panel.set(
            title=f"{label}\nmean {flat.mean():.4f} nats",
            xlabel="entropy of a neuron (nats)",
            xlim=entropy_range(max_entropy),
        )
        panel.yaxis.set_major_formatter(PercentFormatter(1))
    panels[0].set_ylabel("share of all neurons")
    figure_legend(body, panels[0])
    return figure


def dynamic_routing_comparison(kinds: Sequence[str], prompt_logits: Tensor, shares: Tensor, caption: str) -> Figure:
    """What the router adds for each kind of input, and the effective routing that comes of it; a column an activation.

    Args:
        kinds: names.
        prompt_logits: ``[kinds, P, L, K]``, beta * f(h_bar), mean over each prompt.
        shares: ``[kinds, L, K]``, effective routing weight.
        caption: printed below.
    """
    n_layers, n_activations = shares.shape[1:]
    figure, body = titled_figure(
        "Dynamic routing by kind of input", max(7.0, 1.2 + max(2.7, 0.06 * n_layers) * n_activations), 6.6, caption
    )
    panels = body.subplots(2, n_activations, sharex=True, sharey="row", squeeze=False)
    layers = range(n_layers)
    for k, (activation, (upper, lower)) in enumerate(zip(ACTIVATIONS[:n_activations], panels.T, strict=True)):
        for index, kind in enumerate(kinds):
            style = _line_style(index, n_layers)
            values = prompt_logits[index, :, :, k]  # [P, L]
            mean, deviation = values.mean(0), values.std(0, correction=0)
            upper.plot(layers, mean.numpy(), label=literal(kind), **style)
            low, high = (mean - deviation).numpy(), (mean + deviation).numpy()
            upper.vlines(layers, low, high, color=SERIES_COLOURS[index], alpha=0.25, linewidth=style["markersize"])
            lower.plot(layers, shares[index, :, k].numpy(), **style)
        upper.set_title(f"{activation.name}\n({activation.transmitter})", fontweight="bold")
        upper.spines["top"].set(color=activation.colour, linewidth=5)
        upper.axhline(0, color=GREY, linewidth=0.8)
        lower.set_ylim(-0.03, 1.03)
        lower.yaxis.set_major_formatter(PercentFormatter(1))
        layer_axis(lower, n_layers, most=7)
        for panel in (upper, lower):
            panel.grid(axis="y", color=GRID)
    panels[0, 0].set_ylabel("router's logit, β f(h̄)\n(mean ± standard deviation)")
    panels[1, 0].set_ylabel("effective routing weight")
    figure_legend(body, panels[0, 0])
    return figure


def routing_shift_summary(sensitivity: Tensor, shifts: Mapping[str, Tensor], baseline: Tensor, caption: str) -> Figure:
    """Gate sensitivity of each layer, and the routing weight that moves between kinds of input.

    Args:
        sensitivity: ``[L]``, logit units.
        shifts: pair of kinds -> ``[L]``, 0..1.
        baseline: ``[L]``, shift between two halves of one kind.
        caption: printed below.
    """
    n_layers = len(sensitivity)
    figure, body = titled_figure(
        "How much routing depends on the input", min(20.0, max(11.0, 0.2 * n_layers)), 4.8, caption
    )
    left, right = body.subplots(1, 2)
    left.bar(range(n_layers), sensitivity.numpy(), color=SERIES_COLOURS[3])
    left.set(title="gate sensitivity", ylabel="standard deviation of the router's\nlogits over prompts (logit units)")
    for index, (pair, values) in enumerate(shifts.items()):
        right.plot(range(n_layers), values.numpy(), label=literal(pair), **_line_style(index, n_layers))
    style = {**_line_style(0, n_layers), "color": GREY, "marker": "x", "linestyle": "--"}
    right.plot(range(n_layers), baseline.numpy(), label="within one kind", **style)
    right.set(title="shift between kinds of input", ylabel="routing weight that changes activation")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for panel in (left, right):
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color=GRID)
        panel.set_axisbelow(True)
        layer_axis(panel, n_layers)
    figure_legend(body, right)
    return figure


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, unit: str) -> Figure:
    """Quantities over training steps.

    Args:
        series: label -> (steps, values).
        title: above the panel.
        unit: what the vertical axis shows.
    """
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    panel = figure.subplots()
    for index, (label, (steps, values)) in enumerate(series.items()):
        panel.plot(steps, values, color=SERIES_COLOURS[index], linewidth=1.6, label=label, marker=".", markersize=4)
    panel.set_title(title, loc="left", fontweight="bold")
    panel.set(xlabel="step", ylabel=unit)
    panel.grid(color=GRID)
    if len(series) > 1:
        panel.legend(frameon=False)
    return figure


def literal(text: str) -> str:
    """A name as matplotlib shows it: ``$`` begins no formula, no ``_`` at its start hides it from the legend.

    What cannot be drawn (control characters, halves of surrogate pairs) becomes U+FFFD.
    """
    text = "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def titled_figure(title: str, width: float, height: float, caption: str) -> tuple[Figure, Any]:
    """Make a figure with its title and caption, and the part between them for legend and panels. Sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    lines = [textwrap.fill(literal(line), int(width * 14)) for line in caption.splitlines()]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=9, color=GREY)
    return figure, figure.subfigures(1, 1)


def _preference_image(weights: Tensor, order: Tensor) -> Tensor:
    """RGB ``[L, columns, 3]`` of weights ``[L, F, K]``: colour by preferred activation, paler where it is weak."""
    n_layers, n_neurons, n_activations = weights.shape
    colours = torch.tensor([to_rgb(a.colour) for a in ACTIVATIONS[:n_activations]] + [to_rgb(NO_PREFERENCE[1])])
    strength = (weights.amax(-1) * n_activations - 1) / max(1, n_activations - 1)  # 0: all equal, 1: one takes all
    depth = PALEST + (1 - PALEST) * strength
    choice = preferred_activation(weights)
    depth = depth.masked_fill(choice == n_activations, 1.0)[..., None]
    image = 1 - depth * (1 - colours[choice])  # [L, F, 3]
    image = image.gather(1, order[..., None].expand(-1, -1, 3))
    binned = F.adaptive_avg_pool1d(image.transpose(1, 2), min(n_neurons, MAP_COLUMNS))
    return binned.transpose(1, 2).clamp(0, 1)


def stacked_bars(panel: Any, shares: Tensor, colours: Sequence[str]) -> None:
    """Draw shares ``[L, colours]``."""
    bottom = torch.zeros(len(shares))
    width = 0.85 if len(shares) <= 40 else 1.0
    for values, colour in zip(shares.T, colours, strict=True):
        panel.bar(range(len(shares)), values.numpy(), width, bottom.numpy(), color=colour)
        bottom = bottom + values


def activation_legend(body: Any, n_activations: int, panel: Any = None) -> None:
    """Names and colours of the activations above all panels; then the series of ``panel``, or no preference."""
    entries = [(f"{a.name} ({a.transmitter})", a.colour) for a in ACTIVATIONS[:n_activations]]
    entries += [NO_PREFERENCE] if panel is None else []
    handles = [Patch(facecolor=colour, edgecolor=FAINT, label=label) for label, colour in entries]
    handles += panel.get_legend_handles_labels()[0] if panel else []
    body.legend(handles=handles, loc="outside upper left", ncols=5 if len(handles) <= 5 else 4, frameon=False)


def figure_legend(body: Any, panel: Any, columns: int = 4) -> None:
    """A panel's series, above all panels."""
    handles, labels = panel.get_legend_handles_labels()
    body.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)


def _line_style(index: int, n_layers: int) -> dict[str, Any]:
    size = 5 if n_layers <= 15 else 3 if n_layers <= 40 else 1.5
    return {"color": SERIES_COLOURS[index], "marker": MARKERS[index], "markersize": size, "linewidth": 1.2}


def entropy_range(max_entropy: float) -> tuple[float, float]:
    """Axis from a little under 0, so that a mark at 0 is whole, to a little over ln K, also where ln K is 0."""
    span = max_entropy or 0.1
    return -0.04 * span, 1.06 * span


def entropy_limit(draw: Any, max_entropy: float) -> None:
    """A dashed line at ln K."""
    draw(max_entropy, color=GREY, linestyle="--", linewidth=1, label=f"ln K = {max_entropy:.4f}, all alike")


def layer_axis(panel: Any, n_layers: int, most: int = 15) -> None:
    """Layers from left to right, no more than ``most`` of them numbered."""
    panel.set(xlabel="layer", xlim=(-0.6, n_layers - 0.4))
    panel.set_xticks(_layer_ticks(n_layers, most))


def _layer_ticks(n_layers: int, most: int = 15) -> list[int]:
    """Round layer numbers, no more than ``most`` of them."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if n_layers <= step * most)
    return list(range(0, n_layers, step))
