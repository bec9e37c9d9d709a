"""What a trained model loses when its routing is replaced: losses of documents under interventions.

An intervention is a pure function of a layer's alpha and token logits, which gives the weights that the activations are
mixed with. The walk over the blocks is the model's own order of its own parts; a layer that is left alone goes through
the same walk with the model's own weights, so that what differs is the intervention and not the arithmetic.

Shapes as in ``polyglu.model.architecture``; a batch is documents packed into one row of N tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyglu.model.activations import ACTIVATIONS
from polyglu.model.architecture import Block, PolychromaticLM
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.layers import mix_activations, routing_weights
from polyglu.model.packing import Packing, groups_of_tokens, pack_rows

BATCH_TOKENS = 2048
"""Of documents that run together."""
HEAD_TOKENS = 512
"""Tokens that go through the head together, which bounds the memory of their logits."""
MEAN_TOKENS = 64
"""Tokens whose weights ``[tokens, F, K]`` are made together."""


class Routing(NamedTuple):
    """What a layer would route by."""

    layer: int
    alpha: Tensor
    """fp32 ``[F, K]``."""
    token_logits: Tensor
    """fp32 ``[1, N or 1, K]``."""
    tau: float


@dataclass(frozen=True)
class Intervention:
    """A way to route."""

    name: str
    label: str
    weights: Callable[[Routing], Sequence[Tensor]]
    """K weights that broadcast to ``[1, N, F]``."""


class Condition(NamedTuple):
    """An intervention in one layer, or in all of them."""

    intervention: Intervention
    layer: int | None


class Losses(NamedTuple):
    """Of n documents."""

    conditions: Sequence[Condition]
    nats: Tensor
    """fp64 ``[conditions, n]``: negative log-likelihood of each document."""
    own: Tensor
    """fp64 ``[n]``: of the model as it was trained."""
    tokens: Tensor
    """``[n]``: predicted tokens of each document."""


def as_trained(routing: Routing) -> Sequence[Tensor]:
    """The model's own weights."""
    return routing_weights(routing.alpha[None], routing.token_logits, routing.tau)


def interventions(means: Tensor) -> list[Intervention]:
    """All of them; ``means`` ``[L, F, K]`` are the model's own weights, mean over the data."""
    names = [activation.name for activation in ACTIVATIONS[: means.shape[-1]]]
    forced = [Intervention(f"force_{name}", f"{name} alone", _forced(k, len(names))) for k, name in enumerate(names)]
    return [
        *forced,
        Intervention(
            "freeze_layer", "one mean mixture for the layer", lambda r: _constant(means[r.layer].mean(0)[None])
        ),
        Intervention("freeze_neurons", "each neuron's mean mixture", lambda r: _constant(means[r.layer])),
        Intervention("static_only", "static part alone, α", _static_only),
        Intervention("dynamic_only", "dynamic part alone, β f(h̄)", _dynamic_only),
        Intervention("harden", "largest weight alone", _hardened),
    ]


def _constant(weights: Tensor) -> Sequence[Tensor]:
    """``[F or 1, K]`` -> K weights ``[1, 1, F or 1]``."""
    return list(weights.T[:, None, None])


def _forced(chosen: int, count: int) -> Callable[[Routing], Sequence[Tensor]]:
    return lambda routing: _constant(torch.eye(count, device=routing.alpha.device)[chosen][None])


def _static_only(routing: Routing) -> Sequence[Tensor]:
    return routing_weights(routing.alpha[None], torch.zeros_like(routing.token_logits[:, :1]), routing.tau)


def _dynamic_only(routing: Routing) -> Sequence[Tensor]:
    return routing_weights(torch.zeros_like(routing.alpha[None, :1]), routing.token_logits, routing.tau)


def _hardened(routing: Routing) -> Sequence[Tensor]:
    weights = torch.stack(list(as_trained(routing)))
    largest = weights.argmax(0)
    return [(largest == k).to(weights.dtype) for k in range(len(weights))]


@torch.inference_mode()
def mean_weights(model: PolychromaticLM, documents: Sequence[Sequence[int]], tau: float) -> Tensor:
    """The model's own weights, mean over all tokens of the documents: fp32 ``[L, F, K]``."""
    alphas = [layer.mlp.alpha.float() for layer in model.layers if isinstance(layer.mlp, PolyGLU)]
    totals = [torch.zeros(alpha.shape, dtype=torch.float64, device=alpha.device) for alpha in alphas]
    n_tokens = 0
    for batch in _batches(documents, model.embed_tokens.weight.device):
        _, token_logits = model.features(batch.input_ids, cu_seqlens=batch.cu_seqlens, tau=tau)
        size = batch.input_ids.shape[1]
        n_tokens += size
        for alpha, total, logits in zip(alphas, totals, token_logits, strict=True):
            for part in torch.split(logits.expand(-1, size, -1), MEAN_TOKENS, dim=1):
                total += torch.stack([weight.sum((0, 1)) for weight in routing_weights(alpha[None], part, tau)], dim=-1)
    return torch.stack([total / n_tokens for total in totals]).float()


@torch.inference_mode()
def measure(
    model: PolychromaticLM,
    documents: Sequence[Sequence[int]],
    tau: float,
    chosen: Sequence[Intervention],
    by_layer: bool,
    advance: Callable[[], None] = lambda: None,
) -> Losses:
    """Losses of documents as trained and under interventions: each in all layers, and if wanted in each layer alone.

    Args:
        model: as ``open_for_inference`` gives it.
        documents: token ids, at least two each and at most seq_length + 1; all but the first are predicted.
        tau: the checkpoint's temperature.
        chosen: interventions.
        by_layer: also each intervention in each layer alone.
        advance: called after each of ``passes``.
    """
    n_layers = len(model.layers)
    conditions = [Condition(one, None) for one in chosen]
    if by_layer:
        conditions += [Condition(one, layer) for layer in range(n_layers) for one in chosen]
    own, nats = [], []
    untouched = Intervention("as_trained", "as trained", as_trained)
    for batch in _batches([document[:-1] for document in documents], model.embed_tokens.weight.device):
        targets = [document[1:] for document in documents[batch.documents]]
        walk = _Walk(model, batch, tau)
        states = [model.embed_tokens(batch.input_ids)]
        for layer in range(n_layers):
            states.append(walk.block(layer, states[-1], untouched))
        own.append(walk.nats(states[-1], targets))
        advance()
        found = []
        for intervention, only in conditions:
            x = states[only or 0]
            for layer in range(only or 0, n_layers):
                x = walk.block(layer, x, intervention if only in (None, layer) else untouched)
            found.append(walk.nats(x, targets))
            advance()
        nats.append(torch.stack(found))
    tokens = torch.tensor([len(document) - 1 for document in documents])
    return Losses(conditions, torch.cat(nats, dim=1), torch.cat(own), tokens)


def passes(documents: Sequence[Sequence[int]], chosen: int, n_layers: int, by_layer: bool) -> int:
    """How often ``measure`` calls ``advance``."""
    batches = sum(1 for _ in groups_of_tokens([len(document) - 1 for document in documents], BATCH_TOKENS))
    return batches * (1 + chosen * (1 + (n_layers if by_layer else 0)))


class _Batch(NamedTuple):
    documents: slice
    input_ids: Tensor
    cu_seqlens: Tensor


def _batches(documents: Sequence[Sequence[int]], device: torch.device) -> Iterator[_Batch]:
    for group in groups_of_tokens([len(document) for document in documents], BATCH_TOKENS):
        yield _Batch(group, *pack_rows(documents[group], device))


class _Walk:
    """The model's parts in their order, over one batch."""

    def __init__(self, model: PolychromaticLM, batch: _Batch, tau: float) -> None:
        self.model, self.tau = model, tau
        self.packing = Packing.of(batch.input_ids.shape, batch.cu_seqlens, batch.input_ids.device)
        self.rope = model.rope(self.packing.positions[None])

    def block(self, layer: int, x: Tensor, intervention: Intervention) -> Tensor:
        """``[1, N, D]`` -> ``[1, N, D]``."""
        block = self.model.layers[layer]
        assert isinstance(block, Block) and isinstance(block.mlp, PolyGLU)
        x = x + block.self_attn(block.input_layernorm(x), self.packing, self.rope)
        normed, mlp = block.post_attention_layernorm(x), block.mlp
        routing = Routing(layer, mlp.alpha.float(), mlp.token_logits(normed, self.packing), self.tau)
        hidden = mix_activations(intervention.weights(routing), mlp.gate_proj(normed)) * mlp.up_proj(normed)
        return x + mlp.down_proj(hidden)  # type: ignore[no-any-return]

    def nats(self, x: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """Negative log-likelihood of each document of the batch: fp64 ``[documents]``, on the CPU."""
        features = self.model.norm(x)[0]
        flat = torch.tensor([token for document in targets for token in document], device=features.device)
        losses = [
            F.cross_entropy(self.model.head(part).float(), expected, reduction="none")
            for part, expected in zip(torch.split(features, HEAD_TOKENS), torch.split(flat, HEAD_TOKENS), strict=True)
        ]
        of_documents = torch.split(torch.cat(losses).double().cpu(), list(self.packing.lengths))
        return torch.stack([one.sum() for one in of_documents])
