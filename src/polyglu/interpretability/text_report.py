"""What an analysis writes about routing on texts: figures, numbers, each neuron's weights, and the page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from polyglu.files import json_text
from polyglu.inference import Inference
from polyglu.interpretability import (
    EVOLUTION_FIGURE,
    NEURON_FILE,
    PAGE_FILE,
    TEXT_FIGURES,
    TEXT_FILE,
    evolution,
    plotting_text,
)
from polyglu.interpretability.analysis_page import analysis_page
from polyglu.interpretability.neurotransmitter_maps import stack_alpha
from polyglu.interpretability.plotting_text import Drawn
from polyglu.interpretability.statistics import Interval
from polyglu.interpretability.text_analysis import (
    TextAnalysis,
    analyze_texts,
    dominant_shares,
    kinds_in_words,
    of_largest_variance,
    to_json,
    variance_components,
    variance_in_words,
)
from polyglu.interpretability.text_routing import dominant
from polyglu.interpretability.texts import Texts
from polyglu.page import render

ENTROPIES = {
    "static": "static: softmax(α)",
    "dynamic": "dynamic: full logits, temperature 1",
    "effective": "effective: full logits, the model's τ",
}
"""Name -> label."""


class TextReport(NamedTuple):
    """Files to write, and the content of ``text_routing.json``."""

    files: dict[str, bytes]
    written: dict[str, Any]


def report_on_texts(
    opened: Inference,
    checkpoint: Path,
    texts: Texts,
    others: Sequence[Path],
    stats: Mapping[str, Any],
    images: Mapping[str, bytes],
    description: str,
) -> TextReport:
    """Look at a checkpoint's routing on texts; nothing is written yet.

    Args:
        opened: the checkpoint.
        checkpoint: its path.
        texts: encoded with its tokenizer.
        others: further checkpoints of its run, to be followed over steps.
        stats: content of ``entropy_stats.json``.
        images: the guide's figures, for the page.
        description: of the checkpoint, below each figure.
    """
    analysis = analyze_texts(opened.model, texts, stack_alpha(opened.model), opened.tau)
    sentences = [kinds_in_words(analysis), variance_in_words(analysis), stats["static_preference"]["sentence"]]
    written = {name: stats[name] for name in ("checkpoint", "routing_scope", "activations", "static_preference")}
    written |= to_json(analysis)
    caption = f"{_of_texts(texts)} {description}"
    figures = draw(analysis, stats["static_preference"]["sentence"], caption)
    if others:
        snapshots = evolution.follow(opened, checkpoint, others, texts)
        written["over_training"] = evolution.to_json(snapshots)
        sentences.append(written["over_training"]["persistence_sentence"])
        if len(snapshots) > 1:
            figures[EVOLUTION_FIGURE] = draw_evolution(snapshots, f"{sentences[-1]}\n{_of_texts(texts)}")
    written["sentences"] = [sentence for sentence in sentences if sentence]
    firsts = [int((texts.labels == index).nonzero()[0]) for index in range(len(texts.kinds))]
    tokens = [[opened.tokenizer.decode([token]) for token in texts.tokens[row].tolist()] for row in firsts]
    shown = {name: drawn.on_page(TEXT_FIGURES[name]) for name, drawn in figures.items()}
    page = analysis_page(f"Routing of {checkpoint.name}", sentences, analysis, written, shown, images, tokens)
    files = {name: figure.png for name, figure in shown.items()} | {
        TEXT_FILE: json_text(written).encode(),
        NEURON_FILE: save(neurons(analysis)),
        PAGE_FILE: render(page).encode(),
    }
    return TextReport(files, written)


def neurons(analysis: TextAnalysis) -> dict[str, Tensor]:
    """Content of ``neuron_routing.safetensors``: what the figures sum up, neuron by neuron."""
    found = [dominant(layer) for layer in analysis.layers]
    return {
        "mean_weights": torch.stack([layer.neuron_weights for layer in analysis.layers]),  # [L, F, K]
        "dominant": torch.stack([one.activation for one in found]).to(torch.uint8),  # [L, F]
        "lead": torch.stack([one.lead for one in found]),  # [L, F]
        "leads_at": torch.stack([one.leads_at for one in found]),  # [L, F]
    }


def draw(analysis: TextAnalysis, static_note: str, caption: str) -> dict[str, Drawn]:
    """File name -> figure: the three of one checkpoint."""
    kinds, maximum = analysis.texts.kinds, math.log(analysis.layers[0].neuron_weights.shape[1])
    pairs = torch.full((len(kinds), len(kinds)), torch.nan, dtype=torch.float64)
    p_values = torch.ones_like(pairs)
    for (first, second), difference in analysis.pairs.items():
        row, column = kinds.index(first), kinds.index(second)
        pairs[row, column] = pairs[column, row] = difference.effect.estimate[0]
        p_values[row, column] = p_values[column, row] = analysis.corrected_pairs[first, second]
    entropies = {ENTROPIES[name]: values for name, values in analysis.entropies.items()}
    shares = dominant_shares(analysis)
    largest = of_largest_variance(analysis)
    return {
        "text_routing.png": plotting_text.text_routing(
            analysis.shares, shares, entropies, maximum, f"{static_note}\n{caption}"
        ),
        "routing_variance.png": plotting_text.routing_variance(
            variance_components(analysis), largest, f"{variance_in_words(analysis)}\n{caption}"
        ),
        "routing_kinds.png": plotting_text.routing_kinds(
            analysis.kinds.effect, analysis.corrected, kinds, pairs, p_values, f"{kinds_in_words(analysis)}\n{caption}"
        ),
    }


def draw_evolution(snapshots: Sequence[evolution.Snapshot], caption: str) -> Drawn:
    """Entropies and shares over steps."""
    static = torch.tensor([one.static_entropy for one in snapshots])
    entropies = {ENTROPIES["static"]: Interval(static, static, static)}
    for index, name in enumerate(("dynamic", "effective")):
        parts = [torch.stack([one.entropies[part][index] for one in snapshots]) for part in range(3)]
        entropies[ENTROPIES[name]] = Interval(*parts)
    shares = Interval(*(torch.stack([one.shares[part] for one in snapshots]) for part in range(3)))
    maximum = math.log(shares.estimate.shape[1])
    steps = [one.step for one in snapshots]
    return plotting_text.over_training(steps, entropies, shares, maximum, caption)


def _of_texts(texts: Texts) -> str:
    counts = [f"{int((texts.labels == index).sum())} {kind}" for index, kind in enumerate(texts.kinds)]
    return f"Documents of {texts.tokens.shape[1]} tokens: {', '.join(counts)}."
