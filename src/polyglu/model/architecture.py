"""PolychromaticLM in plain PyTorch: the readable reference, pinned to published numbers (arXiv 2603.13347).

Legend of shapes:
    B rows    T positions    N = B * T tokens    V vocabulary    D d_model    F d_ff (neurons)
    K activations    L layers    H query heads    G key/value heads    d head_dim    R ROUTER_WIDTH
    S = T where routing depends on the position, else 1
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyglu.model.activations import ACTIVATIONS
from polyglu.model.config import KernelName, ModelConfig, Recompute, RoutingScope
from polyglu.model.flash_attention import attention
from polyglu.model.packing import Packing
from polyglu.model.routing import RoutingState, gated_mixture, pool, projected_mixture

ROPE_BASE = 10000.0
ROUTER_WIDTH = 32
SINGLE_ACTIVATION = {"reglu": 0, "tanhglu": 1, "swiglu": 2, "geglu": 3}
"""Name of a gated linear unit -> index of its activation in ``ACTIVATIONS``."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32.

    Under autocast the result has its dtype: it goes into matrix products, each of which would convert it by itself.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., width]``; the shape is kept, and without autocast the dtype."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding, half split: dimension i is paired with i + d/2. Tables stay fp32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, seq_length: int) -> None:
        super().__init__()
        frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.arange(seq_length).float()[:, None] * frequencies  # [seq_length, d/2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[..., 1, d/2]`` of positions ``[...]``."""
        return self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to ``[B, T, heads, d]`` in fp32; shape and dtype are kept."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """Causal attention with grouped heads and QK-norm; documents never see each other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.use_flash = config.head_dim, config.use_flash_attn
        queries, keys = config.n_q_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, queries, bias=False)
        self.k_proj = nn.Linear(config.d_model, keys, bias=False)
        self.v_proj = nn.Linear(config.d_model, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.eps)
        self.k_norm = RMSNorm(config.head_dim, config.eps)

    def forward(self, x: Tensor, packing: Packing, rope: tuple[Tensor, Tensor]) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), *rope)  # [B, T, H, d]
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), *rope)  # [B, T, G, d]
        v = self.v_proj(x).view(heads)  # [B, T, G, d]
        return self.o_proj(attention(q, k, v, packing, self.use_flash).flatten(2))  # type: ignore[no-any-return]


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
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_activations: int = 4,
        routing_scope: RoutingScope = "causal",
        kernels: KernelName = "auto",
    ) -> None:
        super().__init__()
        self.routing_scope, self.kernels = routing_scope, kernels
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.alpha = nn.Parameter(torch.zeros(d_ff, n_activations))
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
        with torch.autocast(x.device.type, enabled=False):
            token_logits = self.beta.float() * self.router.logits(state.mean)[:, None]  # [B, 1, K]
        return self.combine(x, token_logits, tau, None), state


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


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.eps)
        self.self_attn = GroupedQueryAttention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.eps)
        self.mlp: PolyGLU | GLU
        if config.ffn == "polyglu":
            shape = config.d_model, config.d_ff, config.n_activations
            self.mlp = PolyGLU(*shape, config.routing_scope, config.kernels)
        else:
            self.mlp = GLU(config.d_model, config.d_ff, config.ffn)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        rope: tuple[Tensor, Tensor],
        tau: float | Tensor,
        gumbel: Tensor | None,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]`` -> the same shape, and the token logits ``[B, S, K]`` of a routed layer."""
        x = x + self.self_attn(self.input_layernorm(x), packing, rope)
        if recompute != "ffn":
            return self.feed_forward(x, packing, tau, gumbel, keep_hidden=recompute != "hidden")
        return checkpoint(self.feed_forward, x, packing, tau, gumbel, use_reentrant=False)  # type: ignore[no-any-return]

    def feed_forward(
        self, x: Tensor, packing: Packing, tau: float | Tensor, gumbel: Tensor | None, keep_hidden: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The second half of ``forward``, from and to ``[B, T, D]``."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, GLU):
            return x + self.mlp(normed), None
        token_logits = self.mlp.token_logits(normed, packing)
        return x + self.mlp.combine(normed, token_logits, tau, gumbel, keep_hidden), token_logits


class PolychromaticLM(nn.Module):
    """Decoder-only language model of PolyGLU blocks; the head is tied to the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.eps)
        self.rope = RotaryEmbedding(config.head_dim, config.seq_length)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew.

        ==============================  =====================================
        Linear and Embedding weights    N(0, 0.02), the router's included
        o_proj and down_proj            then multiplied by 1 / sqrt(2 L)
        biases, alpha                   0
        norm weights, beta              1
        ==============================  =====================================
        """
        depth_scale = (2 * self.config.n_layers) ** -0.5
        for name, parameter in self.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind in ("bias", "alpha"):
                nn.init.zeros_(parameter)
            elif kind == "beta" or parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02, generator=generator)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.data.mul_(depth_scale)

    def forward(
        self,
        input_ids: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        tau: float | Tensor = 1.0,
        gumbel: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits.

        Args:
            input_ids: ``[B, T]``.
            cu_seqlens: ``[documents + 1]``, bounds of the documents in the flattened rows, best kept on the CPU;
                absent: a row is a document.
            tau: routing temperature.
            gumbel: noise ``[L, B, F, K]`` of a training step; absent: deterministic.

        Returns:
            ``[B, T, V]``.

        Raises:
            ValueError: a document is longer than ``config.seq_length``.
        """
        return self.head(self.features(input_ids, cu_seqlens=cu_seqlens, tau=tau, gumbel=gumbel)[0])

    def head(self, features: Tensor) -> Tensor:
        """Logits ``[..., V]`` of features ``[..., D]``."""
        return F.linear(features, self.embed_tokens.weight)

    def features(
        self,
        input_ids: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        tau: float | Tensor = 1.0,
        gumbel: Tensor | None = None,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, list[Tensor]]:
        """Everything but the head; arguments as in ``forward``, and what backward computes anew.

        Returns:
            Normalised features ``[B, T, D]``, and the token logits ``[B, S, K]`` of each routed layer.
        """
        packing = Packing.of(input_ids.shape, cu_seqlens, input_ids.device)
        longest = max(packing.lengths)
        if longest > self.config.seq_length:
            raise ValueError(f"a document of {longest} tokens exceeds the model's seq_length {self.config.seq_length}")
        rope = self.rope(packing.positions.view(input_ids.shape))
        x = self.embed_tokens(input_ids)  # [B, T, D]
        routing = []
        for index, block in enumerate(self.layers):
            noise = None if gumbel is None else gumbel[index]
            if recompute == "full":
                x, token_logits = checkpoint(block, x, packing, rope, tau, noise, use_reentrant=False)
            else:
                x, token_logits = block(x, packing, rope, tau, noise, recompute)
            if token_logits is not None:
                routing.append(token_logits)
        return self.norm(x), routing
