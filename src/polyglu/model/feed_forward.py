"""Feed-forward layers: the routed one, and gated linear units with one activation. Shapes as in ``architecture``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyglu.model.activations import ACTIVATIONS
from polyglu.model.config import KernelName, RoutingParts, RoutingScope
from polyglu.model.packing import Packing
from polyglu.model.routing import RoutingState, gated_mixture, pool, projected_mixture

ROUTER_WIDTH = 32
SINGLE_ACTIVATION = {"reglu": 0, "tanhglu": 1, "swiglu": 2, "geglu": 3}
"""Name of a gated linear unit -> index of its activation in ``ACTIVATIONS``."""


class Router(nn.Module):
    """f of the paper: mean of the input over the routing scope -> Linear(D, R) -> ReLU -> Linear(R, K).

    The mean is taken after the first product, which is linear: a causal run keeps ``[T, R]`` sums, not ``[T, D]``.
    """

    def __init__(self, d_model: int, n_activations: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_model, ROUTER_WIDTH)
        self.out = nn.Linear(ROUTER_WIDTH, n_activations)

    def forward(self, x: Tensor, scope: RoutingScope, packing: Packing) -> Tensor:
        """``[B, T, D]`` -> fp32 ``[B, S, K]``."""
        projected = self.project(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.logits(pool(projected, scope, packing))

    def project(self, x: Tensor) -> Tensor:
        """What the mean is taken of: ``[..., D]`` -> fp32 ``[..., R]``."""
        return F.linear(x, self.hidden.weight).float()

    def logits(self, mean: Tensor) -> Tensor:
        """Of a mean, outside autocast: fp32 ``[..., R]`` -> ``[..., K]``."""
        logits: Tensor = self.out(F.relu(mean + self.hidden.bias))
        return logits


class NoRouter(nn.Module):
    """In a router's place where neurons choose by their own preference alone: no parameters, logits of zero."""

    def __init__(self, n_activations: int) -> None:
        super().__init__()
        self.n_activations = n_activations

    def forward(self, x: Tensor, scope: RoutingScope, packing: Packing) -> Tensor:
        """``[B, T, D]`` -> fp32 ``[B, 1, K]``."""
        return self.logits(self.project(x[:, :1]))

    def project(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> fp32 ``[..., R]``."""
        return x.new_zeros(*x.shape[:-1], ROUTER_WIDTH, dtype=torch.float32)

    def logits(self, mean: Tensor) -> Tensor:
        """fp32 ``[..., R]`` -> ``[..., K]``."""
        return mean.new_zeros(*mean.shape[:-1], self.n_activations)


class PolyGLU(nn.Module):
    """Gated linear unit whose neurons choose among K activations (paper, section 3).

        gate, up    = x W_gate, x W_up
        logits[n,k] = alpha[n,k] + beta[k] * f(h_bar)[k]
        g           = softmax_k((logits + gumbel) / tau)
        y           = W_down((sum_k g[n,k] * activation_k(gate)) * up)

    Works in any transformer: ``PolyGLU(d_model, d_ff)(x)`` for ``x`` of shape ``[B, T, D]``.

    Args:
        d_model: width of input and output, D.
        d_ff: neurons, F.
        n_activations: K, the first K of ``ACTIVATIONS``.
        routing_scope: what h_bar is a mean of; ``causal`` is the one that is honest in a language model.
        kernels: what computes the mixture.
        routing: ``static`` leaves out the router and beta, ``dynamic`` leaves out alpha: what is left out adds nothing
            to the logits, and is no parameter.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_activations: int = 4,
        routing_scope: RoutingScope = "causal",
        kernels: KernelName = "auto",
        routing: RoutingParts = "both",
    ) -> None:
        super().__init__()
        self.routing_scope, self.kernels = routing_scope, kernels
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
            self.router = Router(d_model, n_activations)

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, tau: float | Tensor = 1.0, gumbel: Tensor | None = None
    ) -> Tensor:
        """Feed ``[B, T, D]`` forward.

        Args:
            x: normalised input ``[B, T, D]``.
            cu_seqlens: ``[documents + 1]``, bounds of the documents in the flattened rows; absent: a row is a document.
            tau: routing temperature.
            gumbel: noise ``[B, F, K]`` of a training step; absent: deterministic routing.

        Returns:
            ``[B, T, D]``.
        """
        packing = Packing.of(x.shape[:2], cu_seqlens, x.device)
        return self.combine(x, self.token_logits(x, packing), tau, gumbel)

    def token_logits(self, x: Tensor, packing: Packing) -> Tensor:
        """Part of the routing logits that all neurons share, ``beta * f(h_bar)``: fp32 ``[B, S, K]``."""
        logits: Tensor = self.router(x, self.routing_scope, packing)
        return self.beta.float() * logits

    def combine(
        self,
        x: Tensor,
        token_logits: Tensor,
        tau: float | Tensor,
        gumbel: Tensor | None,
        keep_hidden: bool = True,
    ) -> Tensor:
        """Output ``[B, T, D]`` for given token logits ``[B, S, K]`` and noise ``[B, F, K]``.

        Without ``keep_hidden``, what goes into ``down_proj`` is not kept for backward but computed anew.
        """
        neuron_logits = self.alpha.float()[None] if gumbel is None else self.alpha.float() + gumbel  # [1 or B, F, K]
        inputs = self.gate_proj(x), self.up_proj(x), neuron_logits, token_logits, tau
        if keep_hidden or self.kernels == "reference":
            return self.down_proj(gated_mixture(*inputs, self.kernels))  # type: ignore[no-any-return]
        return projected_mixture(*inputs, self.down_proj.weight, self.kernels)

    def step(self, x: Tensor, state: RoutingState, tau: float | Tensor = 1.0) -> tuple[Tensor, RoutingState]:
        """Feed the next position of each row forward, deterministic, under ``causal`` scope.

        Args:
            x: normalised input ``[B, 1, D]``.
            state: of the positions before it.
            tau: routing temperature.

        Returns:
            ``[B, 1, D]``, and the state with this position.
        """
        state = state.add(self.router.project(x[:, 0]))
        return self.routed_by(x, state, tau), state

    def routed_by(self, x: Tensor, state: RoutingState, tau: float | Tensor) -> Tensor:
        """``[B, 1, D]`` -> ``[B, 1, D]`` with the routing mean of a state."""
        with torch.autocast(x.device.type, enabled=False):
            token_logits = self.beta.float() * self.router.logits(state.mean)[None]  # [1, B, K]
        # Rows stand side by side like positions: the neurons' part of the softmax is made once for all.
        return self.combine(x.transpose(0, 1), token_logits, tau, None).transpose(0, 1)


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
