"""The routed feed-forward layer over packed documents. Shapes as in ``architecture``."""

import torch
from torch import Tensor

from polyglu.model.config import KernelName, RoutingParts, RoutingScope
from polyglu.model.layers import NoRouter, RoutedGLU
from polyglu.model.packing import Packing
from polyglu.model.routing import RoutingState, gated_mixture, pool, projected_mixture


class PolyGLU(RoutedGLU):
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

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_activations: int = 4,
        routing_scope: RoutingScope = "causal",
        kernels: KernelName = "auto",
        routing: RoutingParts = "both",
    ) -> None:
        super().__init__(d_model, d_ff, n_activations, routing)
        self.routing_scope, self.kernels = routing_scope, kernels

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
        if isinstance(self.router, NoRouter):
            return self.router.logits(x[:, :1].float())
        projected = self.router.project(x)
        with torch.autocast(x.device.type, enabled=False):
            mean = pool(projected, self.routing_scope, packing)
        return self.logits_of(mean)

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
        token_logits = self.logits_of(state.mean)[None]  # [1, B, K]
        # Rows stand side by side like positions: the neurons' part of the softmax is made once for all.
        return self.combine(x.transpose(0, 1), token_logits, tau, None).transpose(0, 1)
