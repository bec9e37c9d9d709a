"""Routing entropy as a part of the objective: value and gradient in one pass, some positions at a time.

The result is a scalar, so its gradient is known up to a factor as soon as its value is. Both are made in forward, where
the weights are at hand, and only the gradients are kept, which are as small as the logits: no ``[P, F, K]`` survives.
With p = softmax_k(z_k), z_k = neuron + token logits, and H = - sum_k p_k ln p_k:

    d H / d z_k = - p_k (ln p_k + H) = entr(p_k) - p_k H
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ELEMENTS_AT_ONCE = 2**20
"""Weights worked on at a time: 4 MB in fp32, and as much for each of three intermediate results."""


class WeightedEntropy(torch.autograd.Function):
    """sum_p weight_p * mean_f H(softmax_k(neuron_kf + token_kp)) in nats, K first."""

    @staticmethod
    def forward(ctx: Any, neuron: Tensor, token: Tensor, weights: Tensor) -> Tensor:
        """``[K, F]``, ``[K, P]``, ``[P]``, all of one dtype -> scalar; no gradient for the weights."""
        total, d_neuron, d_token = token.new_zeros(()), torch.zeros_like(neuron), torch.empty_like(token)
        step = max(1, ELEMENTS_AT_ONCE // neuron.numel())
        for start in range(0, token.shape[1], step):
            part = slice(start, start + step)
            p = torch.softmax(neuron[:, None, :] + token[:, part, None], dim=0)  # [K, positions, F]
            terms = torch.special.entr(p)
            entropy = terms.sum(0)  # [positions, F]
            share = weights[part, None] / neuron.shape[1]  # [positions, 1]
            total += (entropy * share).sum()
            d_logit = terms.sub_(p.mul_(entropy)).mul_(share)
            d_neuron += d_logit.sum(1)
            d_token[:, part] = d_logit.sum(2)
        ctx.save_for_backward(d_neuron, d_token)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of neuron and token logits."""
        d_neuron, d_token = ctx.saved_tensors
        return grads[0] * d_neuron, grads[0] * d_token, None
