"""The page of an analysis, from its numbers and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from polyglu.interpretability import EVOLUTION_FIGURE, FIGURES
from polyglu.interpretability.neurotransmitter_maps import preferred_activation
from polyglu.interpretability.text_analysis import TextAnalysis
from polyglu.interpretability.text_routing import COMPONENTS
from polyglu.model.activations import ACTIVATIONS
from polyglu.page import Cell, Column, Figure, Note, Page, Paragraph, RoutingMap, Section, Table


def analysis_page(
    title: str,
    sentences: Sequence[str],
    analysis: TextAnalysis,
    written: Mapping[str, Any],
    figures: Mapping[str, Figure],
    images: Mapping[str, bytes],
    tokens: Sequence[Sequence[str]],
) -> Page:
    """Make the page.

    Args:
        title: heading.
        sentences: what the analysis found, most important first.
        analysis: of the texts.
        written: content of ``text_routing.json``.
        figures: file name -> figure of the routing on texts.
        images: file name -> PNG of the guide's figures.
        tokens: texts of the tokens of each kind's example, as in ``analysis.examples``.
    """
    shares, variance = _layer_tables(written)
    maps = [
        routing_map(texts, shares, f"{kind}, one text.")
        for kind, texts, shares in zip(analysis.texts.kinds, tokens, analysis.examples, strict=True)
    ]
    return Page(
        title,
        "g = softmax((α + β f(h̄)) / τ), at the checkpoint's τ and without noise. Intervals are 95%, over documents.",
        [
            Section(
                "Routing on text",
                [figures["text_routing.png"], shares, figures["routing_variance.png"], variance],
            ),
            Section("Kinds of text", [Paragraph(KINDS), figures["routing_kinds.png"], _pair_table(written)]),
            Section("Along a text", [Paragraph(ALONG), *maps]),
            Section("Over training", [figures[EVOLUTION_FIGURE]] if EVOLUTION_FIGURE in figures else []),
            Section(
                "Preferences and prompts", [Figure(images[name], text, wide=True) for name, text in FIGURES.items()]
            ),
        ],
        [Note(sentence) for sentence in sentences if sentence],
    )


KINDS = (
    "A router with random weights tells kinds of text apart too, for their mean inputs differ: that a difference was "
    "learned shows only beside an early checkpoint of the run. Wording and punctuation differ with the subject."
)
ALONG = (
    "A field is the mean of g over all neurons of the layer at the token: an even field may hide neurons that differ. "
    "Below causal routing a token sees the text up to itself; otherwise all of the text."
)


def routing_map(tokens: Sequence[str], shares: Tensor, caption: str) -> RoutingMap:
    """Routing along a text.

    Args:
        tokens: texts of T tokens.
        shares: mean of g over neurons, ``[T, L, K]``.
        caption: what it is.
    """
    activations = [(f"{a.name} ({a.transmitter})", a.colour) for a in ACTIVATIONS[: shares.shape[-1]]]
    bounded = shares.clamp(0, 1)  # rounding
    return RoutingMap(tokens, activations, bounded.tolist(), preferred_activation(bounded).tolist(), caption)


def _layer_tables(written: Mapping[str, Any]) -> tuple[Table, Table]:
    """Shares and entropies, and parts of the variance; a row a layer."""
    layers = written["layers"]
    names = list(layers[0]["shares"])
    columns = [Column("layer", kind="number", spec="d"), *(Column(name, "share", "number") for name in names)]
    columns += [Column(f"{kind} entropy", "nats", "number") for kind in layers[0]["entropy"]]
    shares: list[list[Any]] = [
        [index, *(_interval(layer["shares"][name], ".1%") for name in names)]
        + [_interval(value, ".3f") for value in layer["entropy"].values()]
        for index, layer in enumerate(layers)
    ]
    parts = [Column("layer", kind="number", spec="d"), *(Column(name, "of variance", "number") for name in COMPONENTS)]
    parts += [Column("variance", "of largest", "number", ".1%")]
    variance = [
        [index, *(_interval(value, ".1%") for value in layer["variance"]["components"].values())]
        + [layer["variance"]["of_largest"]]
        for index, layer in enumerate(layers)
    ]
    return (
        Table(columns, shares, "Routing of each layer on text"),
        Table(parts, variance, "Where the variance of the routing weights comes from"),
    )


def _pair_table(written: Mapping[str, Any]) -> Table:
    columns = [
        Column("kinds"),
        Column("ω²", "95% interval", kind="number"),
        Column("p", kind="number", spec=".4f"),
        Column("p", "Holm-corrected", kind="number", spec=".4f"),
    ]
    rows = [
        [pair, _interval(found["omega_squared"], ".1%"), found["p"], found["p_holm"]]
        for pair, found in written["pairs"].items()
    ]
    return Table(columns, rows, "Difference between two kinds of text, over all layers")


def _interval(value: Mapping[str, float | None], spec: str) -> Cell | None:
    """``12.3% (11.0% to 13.6%)``; without the interval where it has no ends or no width."""
    estimate, low, high = value["estimate"], value["low"], value["high"]
    if estimate is None:
        return None
    if low is None or high is None or low == high:
        return Cell(format(estimate, spec), estimate)
    return Cell(f"{estimate:{spec}} ({low:{spec}} to {high:{spec}})", estimate)
