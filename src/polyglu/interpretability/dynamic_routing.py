"""Routing on real inputs of three kinds: arithmetic, algebra, geometry.

    prompts of a kind ──► model ──► token logits [L, N, K] ──┬─► mean of each prompt ──► gate sensitivity
                                                             └─► + alpha, softmax at tau, mean over the prompts
                                                                      └─► effective weights ──► shift between kinds

Each kind is seen in two halves of different wording: how far those differ is what a shift between kinds has to exceed
before it means anything. A prompt counts as one, however many tokens it has.
Shapes as in ``polyglu.model.architecture``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import Protocol

import torch
from torch import Tensor

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.layers import routing_weights
from polyglu.model.routing import entropy

POSITIONS = 4
"""Evenly spaced ones of a prompt are looked at, its last token always."""
NUMBERS = ((3, 7, 12), (5, 4, 9), (8, 6, 15))
TEMPLATES = {
    "arithmetic": (
        "What is {c} + {a} * {b}? {c} + {a} * {b} =",
        "Compute ({a} + {b}) * {c}. The result is",
        "{c}{a} divided by {b}, rounded to the nearest whole number, is",
        "Add {a}{b} and {c}. The sum is",
        "A box holds {c} apples. Tom buys {a} boxes and eats {b} apples. How many apples are left?",
        "Sara has ${c}{b} and spends ${a} a day for {b} days. How much money does she have left?",
        "A train travels {c}{a} miles in {b} hours. How many miles does it travel each hour?",
        "There are {a} red, {b} blue and {c} green marbles in a bag. How many marbles are there in all?",
    ),
    "algebra": (
        "Solve for x: {a}x + {b} = {c}.",
        "Solve the system x + y = {c}, x - y = {a} for x and y.",
        "Factor the polynomial x^2 + {c}x + {b}.",
        "Expand (x + {a})(x - {b}) and collect like terms.",
        "If f(x) = {a}x^2 - {b}x + {c}, what is f({a})?",
        "Find the roots of the quadratic equation {a}x^2 + {c}x + {b} = 0.",
        "Simplify the expression ({a}y + {b}) / {c} - {a}y.",
        "The variable y is proportional to x, and y = {c} when x = {a}. Express y in terms of x when x = {b}.",
    ),
    "geometry": (
        "Find the area of a triangle with base {c} and height {a}.",
        "A circle has radius {a}. What are its circumference and its area in terms of pi?",
        "The legs of a right triangle are {a} and {b}. Find the length of the hypotenuse.",
        "What is the volume of a cylinder with radius {b} and height {c}?",
        "A rectangle has sides of length {a} and {c}. What is the length of its diagonal?",
        "Two angles of a triangle measure {c} degrees and {b}0 degrees. Find the third angle.",
        "Find the distance between the points ({a}, {b}) and ({c}, {a}) in the plane.",
        "A regular polygon has {c} sides. What is the measure of each interior angle?",
    ),
}
"""Kind -> wordings; the first and the second half of them are the halves that are compared."""
KINDS = tuple(TEMPLATES)


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""


@dataclass(frozen=True)
class DynamicRouting:
    """What routing did on the prompts; P prompts of each kind."""

    prompt_logits: Tensor
    """``[kinds, P, L, K]``: beta * f(h_bar), mean over each prompt."""
    weights: Tensor
    """``[kinds, 2, L, F, K]``: effective weights at the checkpoint's tau, mean over each half of a kind's prompts."""
    entropy: Tensor
    """``[L, F]`` nats: of softmax(full logits) at temperature 1, mean over all prompts."""
    effective_entropy: Tensor
    """``[L, F]`` nats: the same at the checkpoint's tau."""


def make_prompts(kind: str) -> list[str]:
    """Prompts of one kind, the same every time: each wording with each triple of numbers."""
    return [template.format(a=a, b=b, c=c) for template in TEMPLATES[kind] for a, b, c in NUMBERS]


@torch.no_grad()
def observe(model: PolychromaticLM, documents: Sequence[Sequence[int]], tau: float) -> Tensor:
    """Run P documents packed in one row; return their token logits ``[L, P, POSITIONS, K]``."""
    bounds = [0, *accumulate(len(document) for document in documents)]
    tokens = torch.tensor([token for document in documents for token in document])[None]
    _, token_logits = model.features(tokens, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), tau=tau)
    starts, lengths = torch.tensor(bounds[:-1]), torch.tensor(bounds).diff()
    ends = torch.arange(1, POSITIONS + 1) * lengths[:, None] // POSITIONS  # [P, POSITIONS]
    positions = starts[:, None] + (ends - 1).clamp(min=0)
    return torch.stack([logits[0].expand(bounds[-1], -1)[positions] for logits in token_logits])


def analyze_layers(
    model: PolychromaticLM, tokenizer: Encoder, alpha: Tensor, tau: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Run all prompts, then yield layer by layer one slice of each field of ``DynamicRouting``, in its order.

    Prompts longer than the model's seq_length are cut.

    Args:
        model: in evaluation mode, on the CPU.
        tokenizer: the model's own.
        alpha: ``[L, F, K]``.
        tau: routing temperature of the checkpoint.
    """
    observed = []
    for kind in KINDS:
        documents = [tokenizer.encode(prompt)[: model.config.seq_length] for prompt in make_prompts(kind)]
        observed.append(observe(model, documents, tau))
    for layer_alpha, layer_logits in zip(alpha, torch.stack(observed, dim=1), strict=True):  # [kinds, P, POSITIONS, K]
        halves = layer_logits.reshape(2 * len(KINDS), -1, alpha.shape[-1])
        _, entropies = effective_routing(layer_alpha, halves, 1.0)
        weights, effective_entropies = effective_routing(layer_alpha, halves, tau)
        yield layer_logits.mean(2), weights.reshape(len(KINDS), 2, *layer_alpha.shape), entropies, effective_entropies


def collect(layers: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> DynamicRouting:
    """Stack what ``analyze_layers`` yields."""
    prompt_logits, weights, entropies, effective_entropies = zip(*layers, strict=True)
    return DynamicRouting(
        prompt_logits=torch.stack(prompt_logits, dim=2),
        weights=torch.stack(weights, dim=2),
        entropy=torch.stack(entropies),
        effective_entropy=torch.stack(effective_entropies),
    )


def effective_routing(alpha: Tensor, token_logits: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Mean routing of one layer over groups of positions.

    Args:
        alpha: ``[F, K]``.
        token_logits: ``[groups, positions, K]``.
        tau: temperature.

    Returns:
        Mean weights ``[groups, F, K]`` of each group, and the neurons' mean entropy ``[F]`` in nats over all groups.
    """
    means, entropies = [], []
    for logits in token_logits:  # one group at a time bounds the memory
        weights = torch.stack(routing_weights(alpha[None], logits[None], tau), dim=-1)[0]  # [positions, F, K]
        means.append(weights.mean(0))
        entropies.append(entropy(weights).mean(0))
    return torch.stack(means), torch.stack(entropies).mean(0)


def gate_sensitivity(prompt_logits: Tensor) -> Tensor:
    """How far the router's output moves from prompt to prompt: ``[..., P, L, K]`` -> ``[L]``, in logit units.

    The root mean square over activations of the deviation over all prompts. A logit common to all activations changes
    nothing in a softmax and is left out.
    """
    centred = prompt_logits - prompt_logits.mean(-1, keepdim=True)
    return centred.flatten(0, -3).var(0, correction=0).mean(-1).sqrt()


def routing_shift(first: Tensor, second: Tensor) -> Tensor:
    """Routing weight that moves to another activation between two inputs, mean over neurons: in 0..1.

    The total variation distance of two weights ``[L, F, K]`` -> ``[L]``.
    """
    return 0.5 * (first - second).abs().sum(-1).mean(-1)


def shifts_between_kinds(weights: Tensor) -> dict[str, Tensor]:
    """Shift of each pair of kinds, each ``[L]``; measured between halves, so that it compares with the baseline.

    Args:
        weights: ``[kinds, 2, L, F, K]``.
    """
    shifts = {}
    for i, j in combinations(range(len(KINDS)), 2):
        crossed = routing_shift(weights[i, 0], weights[j, 1]) + routing_shift(weights[i, 1], weights[j, 0])
        shifts[f"{KINDS[i]} / {KINDS[j]}"] = crossed / 2
    return shifts


def shift_within_kinds(weights: Tensor) -> Tensor:
    """Shift ``[L]`` between the two halves of one kind, mean over kinds: the baseline."""
    return torch.stack([routing_shift(first, second) for first, second in weights]).mean(0)
