"""The mixture of activations on the CPU: some tokens at a time, so that all branches stay in the processor's cache.

Only the gate and the logits are kept for backward; weights and branches are computed anew there. With
w = softmax_k(z_k), z_k = (neuron + token logits) / tau, s_k = activation_k(gate) and h = sum_k w_k s_k:

    d gate = sum_k d h * w_k * s_k'(gate)        d z_k = d h * w_k * (s_k - h)
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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


class ChunkedMixture(torch.autograd.Function):
    """``mix_activations`` with logits that are divided by tau already, and K first."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, neuron: Tensor, token: Tensor) -> Tensor:
        """``[B, T, F]``, ``[K, 1 or B, F]``, ``[K, B, S]`` -> ``[B, T, F]``."""
        ctx.save_for_backward(gate, neuron, token)
        mixed = torch.empty_like(gate)
        for chunk in _chunks(gate, neuron, token):
            x = gate[chunk.tokens].to(neuron.dtype)
            weights = torch.softmax(neuron[chunk.neuron] + token[chunk.token], dim=0)  # [K, tokens or 1, F]
            mixed[chunk.tokens] = _weighted_sum(weights, _branches(x, len(neuron)))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of gate, neuron and token logits; the latter two are summed in the logits' dtype."""
        gate, neuron, token = ctx.saved_tensors
        d_gate, d_neuron, d_token = torch.empty_like(gate), torch.zeros_like(neuron), torch.zeros_like(token)
        for chunk in _chunks(gate, neuron, token):
            x, d_mixed = gate[chunk.tokens].to(neuron.dtype), grads[0][chunk.tokens].to(neuron.dtype)
            weights = torch.softmax(neuron[chunk.neuron] + token[chunk.token], dim=0)
            branches = _branches(x, len(neuron))
            mixed = _weighted_sum(weights, branches)
            d_x = torch.zeros_like(x)
            for k, branch in enumerate(branches):
                d_branch = d_mixed * weights[k]
                d_x += _DERIVATIVES[k](d_branch, x, branch)
                d_logit = d_branch.mul_(branch.sub_(mixed))  # [tokens, F]
                d_neuron[k][chunk.neuron[1:]] += d_logit.sum(0, keepdim=True)
                d_token[k][chunk.token[1:]] += d_logit.sum(1, keepdim=True) if chunk.per_token else d_logit.sum()
            d_gate[chunk.tokens] = d_x
        return d_gate, d_neuron, d_token


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
    per_token, per_row = token.shape[2] > 1, neuron.shape[1] > 1
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
