"""The gated mixture in PyTorch, on any device and in any precision: some tokens at a time.

All branches of a chunk stay in the processor's cache; weights and branches are computed anew in backward.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from polyglu.model.activations import ACTIVATIONS

ELEMENTS_AT_ONCE = 2**16
"""Gate values worked on at a time: with K branches about 2 MB in fp32, the size of a core's cache."""

Derivative = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(gradient of the output, input, output) -> gradient of the input."""

_DERIVATIVES: tuple[Derivative, ...] = (
    lambda grad, x, y: torch.ops.aten.threshold_backward(grad, x, 0),
    lambda grad, x, y: torch.ops.aten.tanh_backward(grad, y),
    lambda grad, x, y: torch.ops.aten.silu_backward(grad, x),
    lambda grad, x, y: torch.ops.aten.gelu_backward(grad, x),
    lambda grad, x, y: grad * torch.cos(x),
    lambda grad, x, y: grad * (-2 * x * y),
)
"""In the order of ``ACTIVATIONS``."""


def forward(gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor) -> Tensor:
    """See ``mixture.gated_mixture_op``."""
    hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for chunk in _chunks(gate, neuron, token):
        x, factor = (tensor[chunk.tokens].to(neuron.dtype) for tensor in (gate, up))
        weights = torch.softmax(neuron[chunk.neuron] + token[chunk.token], dim=0)  # [K, tokens or 1, F]
        hidden[chunk.tokens] = _weighted_sum(weights, _branches(x, len(neuron))).mul_(factor)
    return hidden


def backward(
    d_hidden: Tensor, gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor, with_hidden: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``mixture.gated_mixture_backward_op``."""
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    hidden = torch.empty(gate.shape if with_hidden else (0,), dtype=gate.dtype, device=gate.device)
    d_neuron, d_token = torch.zeros_like(neuron), torch.zeros_like(token)
    for chunk in _chunks(gate, neuron, token):
        x, factor, d_chunk = (tensor[chunk.tokens].to(neuron.dtype) for tensor in (gate, up, d_hidden))
        weights = torch.softmax(neuron[chunk.neuron] + token[chunk.token], dim=0)
        branches = _branches(x, len(neuron))
        mixed = _weighted_sum(weights, branches)
        d_up[chunk.tokens] = d_chunk * mixed
        if with_hidden:
            hidden[chunk.tokens] = mixed * factor
        d_mixed, d_x = d_chunk * factor, torch.zeros_like(x)
        for k, branch in enumerate(branches):
            d_branch = d_mixed * weights[k]
            d_x += _DERIVATIVES[k](d_branch, x, branch)
            d_logit = d_branch.mul_(branch.sub_(mixed))  # [tokens, F]
            d_neuron[k][chunk.neuron[1:]] += d_logit.sum(0, keepdim=True)
            d_token[k][chunk.token[1:]] += d_logit.sum(1, keepdim=True) if chunk.per_token else d_logit.sum()
        d_gate[chunk.tokens] = d_x
    return d_gate, d_up, d_neuron, d_token, hidden


class _Chunk(NamedTuple):
    """Where some tokens of one row lie in the tensors."""

    tokens: tuple[int, slice]
    """In ``[B, T, F]``: ``[tokens, F]``."""
    neuron: tuple[slice, slice]
    """In ``[K, 1 or B, F]``: ``[K, 1, F]``."""
    token: tuple[slice, int, slice, None]
    """In ``[K, B, S]``: ``[K, tokens or 1, 1]``."""
    per_token: bool


def _chunks(gate: Tensor, neuron: Tensor, token: Tensor) -> Iterator[_Chunk]:
    rows, columns, d_ff = gate.shape
    per_token, per_row = token.shape[2] == columns, neuron.shape[1] > 1
    step = max(1, ELEMENTS_AT_ONCE // d_ff)
    for row in range(rows):
        ours = slice(row, row + 1) if per_row else slice(0, 1)
        for start in range(0, columns, step):
            positions = slice(start, min(start + step, columns))
            shared = (slice(None), row, positions if per_token else slice(0, 1), None)
            yield _Chunk((row, positions), (slice(None), ours), shared, per_token)


def _branches(x: Tensor, count: int) -> list[Tensor]:
    return [activation.function(x) for activation in ACTIVATIONS[:count]]


def _weighted_sum(weights: Tensor, branches: list[Tensor]) -> Tensor:
    total = weights[0] * branches[0]
    for weight, branch in zip(weights[1:], branches[1:], strict=True):
        total.addcmul_(weight, branch)
    return total
