"""Layers that need nothing but PyTorch: what all forms of the model share. Shapes as in ``architecture``.

``polyglu export`` puts this file, as it is, beside the modelling code of an exported model: here is the one place of
the formulas, and it imports nothing of the package but ``activations``.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyglu.model.activations import ACTIVATIONS

ROPE_BASE = 10000.0
ROUTER_WIDTH = 32
SINGLE_ACTIVATION = {"reglu": 0, "tanhglu": 1, "swiglu": 2, "geglu": 3}
"""Name of a gated linear unit -> index of its activation in ``ACTIVATIONS``."""


Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the positions, fp32 ``[B, T, 1, d / 2]``."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32.

    Under autocast the result has its dtype: it goes into matrix products, each of which would convert it by itself.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        """Normalise ``[..., width]``, then rotate it if told to; the shape is kept, without autocast the dtype too."""
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return (normed if rope is None else rotate(normed, *rope)).to(result_dtype(x))


def result_dtype(x: Tensor) -> torch.dtype:
    """Of a layer's output: autocast's, or without it the input's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rotary_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding at positions ``[...]``: fp32 ``[..., d/2]``."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[..., None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to fp32 ``[B, T, heads, d]``; the shape is kept."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class AttentionHeads(nn.Module):
    """Projections of grouped-query attention, with QK-norm and rotary positions; who attends to whom is not said."""

    def __init__(
        self,
        d_model: int,
        n_q_heads: int,
        n_kv_heads: int,
        head_dim: int,
        eps: float,
        norm: Callable[[int, float], RMSNorm] = RMSNorm,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(d_model, n_q_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_q_heads * head_dim, d_model, bias=False)
        self.q_norm = norm(head_dim, eps)
        self.k_norm = norm(head_dim, eps)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, D]`` -> queries ``[B, T, H, d]``, keys and values ``[B, T, G, d]``, as attention takes them."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads), rope)
        k = self.k_norm(self.k_proj(x).view(heads), rope)
        return q, k, self.v_proj(x).view(heads)


class Router(nn.Module):
    """f of the paper: mean of the input over the routing scope -> Linear(D, R) -> ReLU -> Linear(R, K).

    The mean is taken after the first product, which is linear: a causal run keeps ``[T, R]`` sums, not ``[T, D]``.
    """

    def __init__(self, d_model: int, n_activations: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_model, ROUTER_WIDTH)
        self.out = nn.Linear(ROUTER_WIDTH, n_activations)

    def project(self, x: Tensor) -> Tensor:
        """What the mean is taken of: ``[..., D]`` -> fp32 ``[..., R]``."""
        return F.linear(x, self.hidden.weight).float()

    def logits(self, mean: Tensor) -> Tensor:
        """Of a mean, in fp32 whatever the weights are kept in: ``[..., R]`` -> ``[..., K]``."""
        with torch.autocast(mean.device.type, enabled=False):
            hidden = F.relu(mean + self.hidden.bias.float())
            return F.linear(hidden, self.out.weight.float(), self.out.bias.float())


class NoRouter(nn.Module):
    """In a router's place where neurons choose by their own preference alone: no parameters, logits of zero."""

    def __init__(self, n_activations: int) -> None:
        super().__init__()
        self.n_activations = n_activations

    def project(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> fp32 ``[..., R]``."""
        return x.new_zeros(*x.shape[:-1], ROUTER_WIDTH, dtype=torch.float32)

    def logits(self, mean: Tensor) -> Tensor:
        """fp32 ``[..., R]`` -> ``[..., K]``."""
        return mean.new_zeros(*mean.shape[:-1], self.n_activations)


class RoutedGLU(nn.Module):
    """Weights of a gated linear unit whose neurons choose among K activations, and what a routing mean says to them.

    Args:
        d_model: width of input and output, D.
        d_ff: neurons, F.
        n_activations: K, the first K of ``ACTIVATIONS``.
        routing: ``both``; ``static`` leaves out the router and beta, ``dynamic`` leaves out alpha: what is left out
            adds nothing to the logits, and is no parameter.
        router: makes the router, of D and K.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_activations: int,
        routing: str = "both",
        router: Callable[[int, int], Router] = Router,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.router: Router | NoRouter
        if routing == "dynamic":
            self.register_buffer("alpha", torch.zeros(d_ff, n_activations), persistent=False)
        else:
            self.alpha = nn.Parameter(torch.zeros(d_ff, n_activations))
        if routing == "static":
            self.register_buffer("beta", torch.ones(n_activations), persistent=False)
            self.router = NoRouter(n_activations)
        else:
            self.beta = nn.Parameter(torch.ones(n_activations))
            self.router = router(d_model, n_activations)

    def logits_of(self, mean: Tensor) -> Tensor:
        """Part of the routing logits that all neurons share, ``beta * f(h_bar)``: fp32 ``[..., R]`` -> ``[..., K]``."""
        return self.beta.float() * self.router.logits(mean)


class GLU(nn.Module):
    """Gated linear unit with one activation for all neurons: SwiGLU, GEGLU, ReGLU (Shazeer 2020) and tanh-GLU."""

    def __init__(self, d_model: int, d_ff: int, kind: str = "swiglu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[SINGLE_ACTIVATION[kind]].function
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def reference_mixture(gate: Tensor, neuron_logits: Tensor, token_logits: Tensor, tau: float | Tensor) -> Tensor:
    """Readable form of the mixture in ``gated_mixture``, before up, one activation at a time."""
    return mix_activations(routing_weights(neuron_logits, token_logits, tau), gate)


def mix_activations(weights: Sequence[Tensor], gate: Tensor) -> Tensor:
    """Sum of weight times activation: K weights that broadcast to the shape of ``gate``, which the result has."""
    mixed = sum(weight * activation.function(gate) for weight, activation in zip(weights, ACTIVATIONS, strict=False))
    assert isinstance(mixed, Tensor)
    return mixed.to(gate.dtype)


def routing_weights(neuron_logits: Tensor, token_logits: Tensor, tau: float | Tensor) -> list[Tensor]:
    """Softmax over K of the full logits: K tensors ``[B, S, F]`` of fp32 weights that sum to 1."""
    neuron, token = activations_first(neuron_logits / tau), activations_first(token_logits / tau)
    logits = [ours[:, None, :] + shared[:, :, None] for ours, shared in zip(neuron, token, strict=True)]
    # The largest logit is subtracted as a constant: it cancels, so it needs no gradient.
    largest = reduce(torch.maximum, [logit.detach() for logit in logits])
    exponentials = [torch.exp(logit - largest) for logit in logits]
    total = sum(exponentials)
    return [exponential / total for exponential in exponentials]


def activations_first(logits: Tensor) -> Tensor:
    """``[..., K]`` -> contiguous ``[K, ...]``: each activation's logits side by side in memory."""
    return logits.movedim(-1, 0).contiguous()
