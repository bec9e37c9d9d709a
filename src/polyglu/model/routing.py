"""Routing: pooling over a scope, the mixture of activations, Gumbel noise, entropies. Shapes as in ``architecture``."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polyglu.model.config import KernelName, RoutingScope
from polyglu.model.kernels.entropy import WeightedEntropy
from polyglu.model.kernels.mixture import RecomputedHidden, gated_mixture_op
from polyglu.model.layers import activations_first, reference_mixture, routing_weights
from polyglu.model.packing import Packing

ENTROPY_POSITIONS = 64
"""Positions of a row whose entropy enters the objective. Token logits are running means, which change slowly."""


def pool(x: Tensor, scope: RoutingScope, packing: Packing) -> Tensor:
    """Mean of ``[B, T, R]`` over the routing scope: ``[B, 1, R]`` if a row has one mean, else ``[B, T, R]``."""
    if scope == "sequence" or (scope == "document" and packing.whole_rows):
        return x.mean(1, keepdim=True)
    running = packing.running_mean(x)
    if scope == "causal":
        return running
    return running.flatten(0, 1)[packing.last].view_as(x)  # at its last position the mean is the document's


@dataclass(frozen=True)
class RoutingState:
    """What ``causal`` routing remembers of the documents read so far, one a row."""

    total: Tensor
    """fp32 ``[B, R]``: sum of the router's projected inputs."""
    count: Tensor
    """fp32 ``[B]``: positions in it."""

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device | str = "cpu") -> "RoutingState":
        """Of documents of which nothing is read."""
        return cls(torch.zeros(rows, width, device=device), torch.zeros(rows, device=device))

    @classmethod
    def along(cls, projected: Tensor, packing: Packing) -> "RoutingState":
        """At each position of a batch, ``B`` being all its tokens.

        Args:
            projected: ``[B, T, R]``.
            packing: documents of the batch.
        """
        count = (packing.positions + 1).to(projected.dtype)
        return cls(packing.running_mean(projected).flatten(0, 1) * count[:, None], count)

    @classmethod
    def after(cls, projected: Tensor, packing: Packing) -> "RoutingState":
        """At the end of each document of a batch, in order; arguments as in ``along``."""
        states, ends = cls.along(projected, packing), packing.cu_seqlens[1:].long() - 1  # [documents]
        return cls(states.total[ends], states.count[ends])

    def add(self, projected: Tensor) -> "RoutingState":
        """With the next position of each row, ``[B, R]``."""
        return RoutingState(self.total + projected, self.count + 1)

    @property
    def mean(self) -> Tensor:
        """``[B, R]``."""
        return self.total / self.count[:, None]


def gated_mixture(
    gate: Tensor,
    up: Tensor,
    neuron_logits: Tensor,
    token_logits: Tensor,
    tau: float | Tensor,
    kernel: KernelName = "auto",
) -> Tensor:
    """sum_k softmax_k((neuron + token logits) / tau) * activation_k(gate), times up; the softmax in fp32.

    Args:
        gate: ``[B, T, F]``.
        up: ``[B, T, F]``.
        neuron_logits: fp32 ``[1 or B, F, K]``, alpha and noise.
        token_logits: fp32 ``[B, S, K]``.
        tau: temperature.
        kernel: one of ``kernels.mixture``, or ``reference``.

    Returns:
        ``[B, T, F]`` in the dtype of ``gate``.

    Raises:
        PolygluError: the kernel does not work on this device.
    """
    if kernel == "reference":
        return reference_mixture(gate, neuron_logits, token_logits, tau) * up
    hidden: Tensor = gated_mixture_op(gate, up, *_scaled(gate, neuron_logits, token_logits, tau), kernel)
    return hidden


def projected_mixture(
    gate: Tensor,
    up: Tensor,
    neuron_logits: Tensor,
    token_logits: Tensor,
    tau: float | Tensor,
    weight: Tensor,
    kernel: KernelName = "auto",
) -> Tensor:
    """``gated_mixture`` projected by a weight ``[D, F]``: ``[B, T, D]``. The mixture is not kept for backward."""
    logits = _scaled(gate, neuron_logits, token_logits, tau)
    projected: Tensor = RecomputedHidden.apply(gate, up, *logits, weight.to(gate.dtype), kernel)  # type: ignore[no-untyped-call]
    return projected


def _scaled(gate: Tensor, neuron_logits: Tensor, token_logits: Tensor, tau: float | Tensor) -> Iterator[Tensor]:
    """Logits as kernels take them: divided by tau, K first, fp32 unless the gate is fp64."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    return (activations_first(logits.to(dtype) / tau) for logits in (neuron_logits, token_logits))


def gumbel_noise(seed: int, sample_ids: Tensor, n_layers: int, d_ff: int, n_activations: int) -> Tensor:
    """Standard Gumbel noise that depends on nothing but (seed, sample, layer, neuron, activation).

    A counter hashed to a uniform number: the same on every device and for any number of ranks.

    Args:
        seed: of the run.
        sample_ids: ``[B]`` int64, global index of each row's sample.
        n_layers: L.
        d_ff: F.
        n_activations: K.

    Returns:
        fp32 ``[L, B, F, K]`` on the device of ``sample_ids``.
    """
    device = sample_ids.device
    samples = _hash(sample_ids + _hash(torch.full((), seed, device=device)))  # [B]
    key = _hash(samples + torch.arange(n_layers, device=device)[:, None])  # [L, B]
    counters = _hash(key[..., None] + torch.arange(d_ff * n_activations, device=device))  # [L, B, F * K]
    noise = -torch.log(-torch.log(_uniform(counters)))
    return noise.view(*noise.shape[:2], d_ff, n_activations)


def _uniform(bits: Tensor) -> Tensor:
    """fp32 numbers strictly between 0 and 1 from random int64 values: 23 bits and a half, which fp32 holds exactly."""
    return ((bits & 0x7FFFFF).float() + 0.5) * 2.0**-23


def _hash(x: Tensor) -> Tensor:
    """Mix the bits of int64 values (splitmix64's finaliser, in arithmetic modulo 2^64)."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def entropy(weights: Tensor, dim: int = -1) -> Tensor:
    """Shannon entropy in nats of weights that sum to 1 along ``dim``."""
    nats: Tensor = torch.special.entr(weights)
    return nats.sum(dim)


def static_entropy(alpha: Tensor) -> Tensor:
    """Entropy in nats of each neuron's static preference, softmax(alpha): ``[F, K]`` -> ``[F]``."""
    return entropy(F.softmax(alpha.float(), dim=-1))


@torch.no_grad()
def dynamic_entropy(alpha: Tensor, token_logits: Tensor, max_positions: int = 256) -> Tensor:
    """Mean entropy in nats of softmax(full logits) at temperature 1, without noise, over neurons and positions.

    Args:
        alpha: ``[F, K]``.
        token_logits: ``[B, S, K]``.
        max_positions: evenly spaced positions that are looked at, to bound the memory.
    """
    rows = token_logits.flatten(0, 1)
    rows = rows[:: max(1, len(rows) // max_positions)][None]
    weights = routing_weights(alpha.float()[None], rows, 1.0)
    total = sum(torch.special.entr(weight) for weight in weights)
    assert isinstance(total, Tensor)
    return total.mean()


def summed_entropy(alpha: Tensor, token_logits: Tensor, counted: Tensor) -> Tensor:
    """Sum over the counted positions of what ``dynamic_entropy`` is the mean of, with gradient and without memory.

    At most ``ENTROPY_POSITIONS`` evenly spaced positions of a row are looked at; each stands for itself and those up
    to the next. A row's share depends on nothing but the row, so the sum does not depend on how rows are batched.

    Args:
        alpha: ``[F, K]``.
        token_logits: ``[B, S, K]``.
        counted: bool ``[B, T]``, positions that count.

    Returns:
        Scalar in nats: the entropy's mean over neurons, its sum over positions; fp32 (fp64 for fp64 token logits).
    """
    columns, dtype = counted.shape[1], torch.promote_types(token_logits.dtype, torch.float32)
    stride = columns if token_logits.shape[1] == 1 else -(-columns // ENTROPY_POSITIONS)
    token = activations_first(token_logits[:, ::stride].flatten(0, 1).to(dtype))  # [K, P]
    padded = F.pad(counted.to(dtype), (0, -columns % stride))
    weights = padded.view(-1, stride).sum(1)  # [P]
    neuron = activations_first(alpha.to(dtype))  # [K, F]
    total: Tensor = WeightedEntropy.apply(neuron, token, weights)  # type: ignore[no-untyped-call]
    return total
