"""Routing on texts, put together: the numbers of all layers, whether kinds of text differ, and it all in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from polyglu.estimates import LEVEL, SIGNIFICANT
from polyglu.interpretability.statistics import (
    Difference,
    Interval,
    group_difference,
    holm,
    mean_of_groups,
)
from polyglu.interpretability.text_routing import (
    COMPONENTS,
    POSITIONS,
    LayerRouting,
    dominant,
    route_layers,
    token_logits,
    token_shares,
)
from polyglu.interpretability.texts import Texts
from polyglu.model.activations import ACTIVATIONS
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.routing import static_entropy


@dataclass(frozen=True)
class TextAnalysis:
    """What is shown and written down of routing on texts."""

    texts: Texts
    layers: list[LayerRouting]
    static_entropy: Tensor
    """``[L]`` nats: of softmax(alpha), mean over neurons."""
    kinds: Difference
    """Between all kinds, ``[L]`` each."""
    pairs: dict[tuple[str, str], Difference]
    """Between two kinds, over all layers together, ``[1]`` each."""
    examples: Tensor
    """``[kinds, T, L, K]``: mean of g over neurons at every token of each kind's first document."""

    @property
    def shares(self) -> Interval:
        """Mean of g over neurons and positions: ``[L, K]``, in 0..1."""
        found = mean_of_groups(self.by_kind(torch.stack([layer.document_shares for layer in self.layers], dim=1)))
        return Interval(*(part.clamp(0, 1) for part in found))

    @property
    def entropies(self) -> dict[str, Interval]:
        """Static, dynamic (temperature 1) and effective (tau) entropy: ``[L]`` nats each."""
        found = mean_of_groups(self.by_kind(torch.stack([layer.entropies for layer in self.layers], dim=1)))
        static = Interval(self.static_entropy, self.static_entropy, self.static_entropy)
        return {
            "static": static,
            "dynamic": Interval(*(part[:, 0] for part in found)),
            "effective": Interval(*(part[:, 1] for part in found)),
        }

    @property
    def corrected(self) -> Tensor:
        """P-values of the layers ``[L]``, corrected for their number."""
        return holm(self.kinds.p_value)

    @property
    def corrected_pairs(self) -> dict[tuple[str, str], float]:
        """P-values of the pairs, corrected for their number."""
        p_values = holm(torch.cat([difference.p_value for difference in self.pairs.values()]))
        return dict(zip(self.pairs, p_values.tolist(), strict=True))

    def by_kind(self, values: Tensor) -> list[Tensor]:
        """Values of documents ``[n, ...]``, kind by kind."""
        return self.texts.of_kind(values)


def analyze_texts(model: PolychromaticLM, texts: Texts, alpha: Tensor, tau: float, seed: int = 0) -> TextAnalysis:
    """Run the texts and look at what routing did.

    Args:
        model: as ``open_for_inference`` gives it.
        texts: documents, no longer than the model's seq_length.
        alpha: its static preferences ``[L, F, K]``.
        tau: the checkpoint's temperature.
        seed: of permutations and bootstrap samples.
    """
    logits = token_logits(model, texts.tokens, tau)
    layers = list(route_layers(alpha, logits, tau))
    firsts = torch.stack([(texts.labels == index).nonzero()[0, 0] for index in range(len(texts.kinds))])
    examples = [token_shares(alpha[layer], logits[layer, firsts], tau) for layer in range(len(alpha))]
    generator = torch.Generator().manual_seed(seed)
    grams = torch.stack([layer.gram for layer in layers])
    whole = grams.double().mean(0, keepdim=True)
    pairs = {}
    for first, second in combinations(range(len(texts.kinds)), 2):
        members = ((texts.labels == first) | (texts.labels == second)).nonzero()[:, 0]
        of_pair = whole[:, members][:, :, members]
        named = texts.kinds[first], texts.kinds[second]
        pairs[named] = group_difference(of_pair, (texts.labels[members] == second).long(), generator)
    return TextAnalysis(
        texts=texts,
        layers=layers,
        static_entropy=torch.stack([static_entropy(layer).mean() for layer in alpha]),
        kinds=group_difference(grams, texts.labels, generator),
        pairs=pairs,
        examples=torch.stack(examples, dim=2),
    )


def kinds_in_words(analysis: TextAnalysis) -> str:
    """Whether routing differs between kinds of text, in a sentence or two that claim no more than the tests show."""
    corrected, effect = analysis.corrected, analysis.kinds.effect.estimate
    shown = (corrected <= SIGNIFICANT).nonzero()[:, 0].tolist()
    n_layers = len(corrected)
    if not shown:
        return (
            f"A difference of routing between the kinds of text is not shown in any layer (permutation test over "
            f"documents, Holm-corrected over {n_layers}, smallest p = {corrected.min():.2g})."
        )
    where = "every layer" if len(shown) == n_layers and n_layers > 1 else numbered("layer", shown)
    low, high = effect[shown].min().item(), effect[shown].max().item()
    share = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
    sentence = (
        f"Routing differs between these kinds of text in {where} (permutation test over documents, Holm-corrected over "
        f"{n_layers}, p ≤ {corrected[shown].max():.2g}); the kind explains {share} of the variance between documents."
    )
    rigid = analysis.kinds.pseudo_f.isinf().nonzero()[:, 0].tolist()
    if rigid:
        sentence += f" Documents of one kind do not vary at all in {numbered('layer', rigid)}, so F is infinite there."
    missing = [" and ".join(pair) for pair, p in analysis.corrected_pairs.items() if p > SIGNIFICANT]
    if missing:
        sentence += f" Pair by pair, over all layers, no difference is shown between {'; nor '.join(missing)}."
    elif len(analysis.pairs) > 1:
        sentence += (
            f" Each of the {len(analysis.pairs)} pairs differs over all layers (p ≤ {SIGNIFICANT}, Holm-corrected)."
        )
    return sentence


def variance_in_words(analysis: TextAnalysis) -> str:
    """What decides routing, over the layers."""
    parts, largest = variance_components(analysis), of_largest_variance(analysis)
    if not any(values.isfinite().all() for values in parts.values()):
        return "The routing weights do not vary at all."
    static = parts[COMPONENTS[0]]
    layer_wide = parts[COMPONENTS[1]] + parts[COMPONENTS[2]]
    own = parts[COMPONENTS[3]] + parts[COMPONENTS[4]]
    return (
        f"Of the variance of the routing weights, {_percent(layer_wide)} is input to which all neurons of a layer "
        f"answer alike, {_percent(static)} is a neuron's own fixed preference, and {_percent(own)} neurons' answering "
        f"the input each in their own way (by layer); the variance is {_percent(largest)} of the largest possible."
    )


def variance_components(analysis: TextAnalysis) -> dict[str, Tensor]:
    """Name -> share of the variance ``[L]``."""
    shares = torch.stack([layer.variance.estimate for layer in analysis.layers], dim=1)
    return dict(zip(COMPONENTS, shares, strict=True))


def of_largest_variance(analysis: TextAnalysis) -> Tensor:
    """Variance of g as a share of 1 - sum of m_k^2 ``[L]``, the variance that hard choices with means m would have."""
    means = torch.stack([layer.neuron_weights.double().mean(0) for layer in analysis.layers])  # [L, K]
    total = torch.tensor([layer.total_variance for layer in analysis.layers], dtype=torch.float64)
    return torch.where(total > 0, total / (1 - means.square().sum(1)), 0.0)


def dominant_shares(analysis: TextAnalysis) -> Tensor:
    """Share of each layer's neurons with each dominant activation: ``[L, K]``."""
    chosen = torch.stack([dominant(layer).activation for layer in analysis.layers])  # [L, F]
    return (chosen[..., None] == torch.arange(analysis.layers[0].neuron_weights.shape[1])).float().mean(1)


def to_json(analysis: TextAnalysis) -> dict[str, Any]:
    """Content of ``text_routing.json`` beside what identifies the checkpoint."""
    texts, corrected = analysis.texts, analysis.corrected
    return {
        "texts": {
            "kinds": {kind: int((texts.labels == index).sum()) for index, kind in enumerate(texts.kinds)},
            "tokens_of_each": texts.tokens.shape[1],
            "positions_of_each": min(POSITIONS, texts.tokens.shape[1]),
            "too_short": dict(texts.too_short),
        },
        "confidence": LEVEL,
        "layers": [_layer(analysis, index) for index in range(len(analysis.layers))],
        "kinds": {
            "pseudo_f": [value if math.isfinite(value) else None for value in analysis.kinds.pseudo_f.tolist()],
            "p": analysis.kinds.p_value.tolist(),
            "p_holm": corrected.tolist(),
            "omega_squared": described(analysis.kinds.effect),
            "sentence": kinds_in_words(analysis),
        },
        "pairs": {
            " / ".join(pair): {
                "p": difference.p_value.item(),
                "p_holm": analysis.corrected_pairs[pair],
                "omega_squared": described(Interval(*(part[0] for part in difference.effect))),
            }
            for pair, difference in analysis.pairs.items()
        },
        "variance_sentence": variance_in_words(analysis),
    }


def _layer(analysis: TextAnalysis, index: int) -> dict[str, Any]:
    layer, names = analysis.layers[index], [activation.name for activation in ACTIVATIONS]
    _, lead, leads = dominant(layer)
    quantiles = lead.double().quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    by_kind = [values.mean(0).tolist() for values in analysis.by_kind(layer.document_shares)]
    shares = Interval(*(part[index] for part in analysis.shares))
    return {
        "shares": dict(zip(names, described(shares), strict=False)),
        "shares_by_kind": {
            kind: dict(zip(names, values, strict=False))
            for kind, values in zip(analysis.texts.kinds, by_kind, strict=True)
        },
        "entropy": {
            name: described(Interval(*(part[index] for part in values))) for name, values in analysis.entropies.items()
        },
        "dominant": dict(zip(names, dominant_shares(analysis)[index].tolist(), strict=False)),
        "dominant_lead": dict(zip(("percentile_5", "median", "percentile_95"), quantiles, strict=True)),
        "dominant_leads_at": leads.double().mean().item(),
        "variance": {
            "total": layer.total_variance,
            "of_largest": of_largest_variance(analysis)[index].item(),
            "components": dict(zip(COMPONENTS, described(layer.variance), strict=True)),
        },
    }


def described(interval: Interval) -> Any:
    """JSON of an interval, or a list of them; what is not finite is null."""
    if interval.estimate.ndim:
        return [described(Interval(*parts)) for parts in zip(*interval, strict=True)]
    values = (value if math.isfinite(value) else None for value in (part.item() for part in interval))
    return dict(zip(Interval._fields, values, strict=True))


def numbered(what: str, numbers: Sequence[int]) -> str:
    """``layers 0, 2 to 5 and 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(number) for number in run]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{what if len(numbers) == 1 else what + 's'} {listed}"


def _percent(values: Tensor) -> str:
    """``12%`` or ``12% to 30%`` of those values that are known."""
    known = values[values.isfinite()]
    low, high = f"{known.min():.0%}", f"{known.max():.0%}"
    return low if low == high else f"{low} to {high}"
