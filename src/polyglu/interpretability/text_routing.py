"""The routing that really happens on texts: g = softmax((alpha + beta * f(h_bar)) / tau), without noise.

    texts ──► model ──► token logits [L, n, T, K]          all that is kept of the forward passes
                             │
    layer by layer, document by document ([P, F, K] at a time):
                             ├─► shares, entropies, each neuron's dominant activation
                             ├─► where the variance of g comes from
                             └─► inner products of the documents' routing [n, n]  ──► do kinds of text differ?

Shapes as in ``polyglu.model.architecture``; n documents of T tokens, of which P evenly spaced ones are looked at.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from polyglu.interpretability.statistics import Interval, t_interval
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.layers import routing_weights

POSITIONS = 16
"""Evenly spaced tokens of a document that are looked at, the last one always."""
BATCH_TOKENS = 2048
"""Of a forward pass."""
COMPONENTS = ("static preference", "text", "token", "static x text", "static x token")
"""Where the variance of g comes from; see ``LayerRouting.variance``."""


@dataclass(frozen=True)
class LayerRouting:
    """What one layer's routing did on n documents."""

    neuron_weights: Tensor
    """``[F, K]``: mean of g over documents and positions."""
    chosen: Tensor
    """``[F, K]``: share of the positions at which the activation had the neuron's largest weight."""
    document_shares: Tensor
    """``[n, K]``: mean of g over neurons and the document's positions."""
    token_shares: Tensor
    """``[n, P, K]``: mean of g over neurons."""
    entropies: Tensor
    """``[n, 2]`` nats: entropy of g, mean over neurons and positions; at temperature 1, and at the checkpoint's tau."""
    total_variance: float
    """Of g, summed over activations; over neurons, documents and positions."""
    variance: Interval
    """``[5]``: share of ``COMPONENTS`` in it, with a jackknife interval over documents. NaN where nothing varies.

    With g[n,d,t] in neuron n at position t of document d, m its mean, and a bar over what is averaged away, all summed
    over activations (a two-way analysis of variance, neuron x position, positions nested in documents):

        static preference   mean_n    |g[n,.,.] - m|^2
        text                mean_d    |g[.,d,.] - m|^2
        token               mean_d,t  |g[.,d,t] - g[.,d,.]|^2
        static x text       mean_n,d  |g[n,d,.] - g[n,.,.] - g[.,d,.] + m|^2
        static x token      mean      |g[n,d,t] - g[n,d,.] - g[.,d,t] + g[.,d,.]|^2

    Text and token are what the layer does alike in all its neurons; the last two are neurons answering it each in
    their own way. They sum to the variance of g exactly.
    """
    gram: Tensor
    """``[n, n]``: inner products of the documents' routing g[n,d,.] - g[n,.,.], mean over neurons."""


@torch.inference_mode()
def token_logits(model: PolychromaticLM, tokens: Tensor, tau: float) -> Tensor:
    """Run documents ``[n, T]``; return what routing adds for each token, beta * f(h_bar): fp32 ``[L, n, T, K]``.

    Args:
        model: as ``open_for_inference`` gives it, with routed layers.
        tokens: ids, at most the model's seq_length of them in a row.
        tau: the checkpoint's temperature.
    """
    n, length = tokens.shape
    device = model.embed_tokens.weight.device
    found = []
    for rows in torch.split(tokens, max(1, BATCH_TOKENS // length)):
        _, logits = model.features(rows.to(device), tau=tau)
        found.append(torch.stack([layer.expand(-1, length, -1).float().cpu() for layer in logits]))
    return torch.cat(found, dim=1)


def route_layers(alpha: Tensor, logits: Tensor, tau: float) -> Iterator[LayerRouting]:
    """Look at one layer after another.

    Args:
        alpha: ``[L, F, K]``.
        logits: ``[L, n, T, K]``, as ``token_logits`` gives them.
        tau: the checkpoint's temperature.
    """
    for layer_alpha, layer_logits in zip(alpha, logits, strict=True):
        yield route_layer(layer_alpha, layer_logits[:, spaced(layer_logits.shape[1])], tau)


def spaced(length: int) -> Tensor:
    """Indices of ``POSITIONS`` evenly spaced tokens of ``length``, of all where there are fewer."""
    count = min(POSITIONS, length)
    return torch.arange(1, count + 1) * length // count - 1


@torch.inference_mode()
def route_layer(alpha: Tensor, logits: Tensor, tau: float) -> LayerRouting:
    """Look at one layer.

    Args:
        alpha: ``[F, K]``.
        logits: of the positions that are looked at, ``[n, P, K]``.
        tau: the checkpoint's temperature.
    """
    n, positions, n_activations = logits.shape
    means = torch.empty(n, n_activations, len(alpha))
    token_shares, entropies = torch.empty(n, positions, n_activations), torch.empty(n, 2)
    chosen = torch.zeros(n_activations, len(alpha))
    own_way = torch.empty(n, dtype=torch.float64)
    for index, document in enumerate(logits):
        weights = _weights(alpha, document, tau)  # [K, P, F]
        means[index] = weights.mean(1)
        token_shares[index] = weights.mean(2).T
        chosen += _is_largest(weights).sum(1)
        entropies[index, 1] = _mean_entropy(weights)
        entropies[index, 0] = entropies[index, 1] if tau == 1 else _mean_entropy(_weights(alpha, document, 1.0))
        # In place: the deviation that neither the neuron nor the position explains within the document.
        weights -= means[index][:, None]
        weights -= weights.mean(2, keepdim=True)
        own_way[index] = weights.square_().sum(0).mean()
    neuron_weights = means.mean(0).T
    total, variance = _variance(means, token_shares, own_way)
    means -= means.mean(0)
    flat = means.flatten(1)
    return LayerRouting(
        neuron_weights=neuron_weights.contiguous(),
        chosen=chosen.T / (n * positions),
        document_shares=token_shares.mean(1),
        token_shares=token_shares,
        entropies=entropies,
        total_variance=total,
        variance=variance,
        gram=flat @ flat.T / len(alpha),
    )


def token_shares(alpha: Tensor, logits: Tensor, tau: float) -> Tensor:
    """Mean of g over neurons at every token: ``[F, K]`` and ``[n, T, K]`` -> ``[n, T, K]``."""
    return torch.stack([_weights(alpha, document, tau).mean(2).T for document in logits])


def _weights(alpha: Tensor, document: Tensor, tau: float) -> Tensor:
    """``[F, K]`` and ``[P, K]`` -> g, ``[K, P, F]``."""
    return torch.cat(routing_weights(alpha[None], document[None], tau))


def _is_largest(weights: Tensor) -> Tensor:
    """Which activation has the largest weight, of equal ones the first: bool ``[K, P, F]``."""
    # An argmax over the first dimension takes ten times as long.
    largest, open_places = reduce(torch.maximum, weights), torch.ones(weights.shape[1:], dtype=torch.bool)
    found = []
    for weight in weights:
        found.append((weight == largest) & open_places)
        open_places = open_places & ~found[-1]
    return torch.stack(found)


def _mean_entropy(weights: Tensor) -> Tensor:
    """Of weights ``[K, P, F]``, in nats; ``torch.special.entr`` takes three times as long."""
    logarithms = weights.clamp_min(torch.finfo(weights.dtype).tiny).log_()
    return -logarithms.mul_(weights).sum(0).mean()


def _variance(means: Tensor, token_shares: Tensor, own_way: Tensor) -> tuple[float, Interval]:
    """Total variance, and the shares of its components (``LayerRouting.variance``) with jackknife intervals.

    Args:
        means: ``[n, K, F]``, g[n,d,.].
        token_shares: ``[n, P, K]``, g[.,d,t].
        own_way: ``[n]``, each document's static x token.
    """
    n = len(means)
    centred = means.double() - means.double().mean((0, 2), keepdim=True)  # [n, K, F]
    of_document = centred.mean(2)  # [n, K]
    moved = token_shares.double() - token_shares.double().mean(1, keepdim=True)
    moments = torch.stack(
        [centred.square().sum(1).mean(1), of_document.square().sum(1), moved.square().sum(2).mean(1), own_way]
    )  # [4, n]
    of_neuron = centred.mean(0)  # [K, F]
    parts = _components(of_neuron.square().sum(0).mean(), of_neuron.mean(1).square().sum(), moments.mean(1))
    shares = parts / parts.sum()
    if n < 3:
        return float(parts.sum()), t_interval(shares, shares, 0)
    without = (n * of_neuron - centred) / (n - 1)  # [n, K, F]: mean over all documents but one
    others = (moments.sum(1, keepdim=True) - moments) / (n - 1)
    left_out = _components(without.square().sum(1).mean(1), without.mean(2).square().sum(1), others)
    samples = left_out / left_out.sum(0)  # [5, n]
    error = (samples.var(1, correction=0) * (n - 1)).sqrt()
    interval = t_interval(shares, error, n - 1)
    return float(parts.sum()), Interval(shares, interval.low.clamp(min=0), interval.high.clamp(max=1))


def _components(neurons: Tensor, centre: Tensor, moments: Tensor) -> Tensor:
    """Five components of mean squares about any one point.

    Args:
        neurons: mean over neurons of |g[n,.,.]|^2.
        centre: |m|^2.
        moments: mean over documents of: mean_n |g[n,d,.]|^2, |g[.,d,.]|^2, and the two components of single tokens.
    """
    both, documents, token, own_way = moments
    parts = torch.stack([neurons - centre, documents - centre, token, both - neurons - documents + centre, own_way])
    return parts.clamp(min=0)  # rounding


class Dominant(NamedTuple):
    """Of each neuron of a layer, ``[F]``."""

    activation: Tensor
    """Activation of the largest mean weight."""
    lead: Tensor
    """Its mean weight less that of the second, in 0..1."""
    leads_at: Tensor
    """Share of the positions at which it has the largest weight."""


def dominant(layer: LayerRouting) -> Dominant:
    """Which activation dominates each neuron on the texts, and how decidedly."""
    index = layer.neuron_weights.argmax(-1)
    best = layer.neuron_weights.topk(min(2, layer.neuron_weights.shape[-1]), dim=-1).values
    return Dominant(index, best[:, 0] - best[:, 1:].sum(-1), layer.chosen.gather(1, index[:, None])[:, 0])
