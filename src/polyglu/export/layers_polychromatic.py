"""Layers of PolychromaticLM in transformers: attention by its functions, with its cache; rows may be padded.

Shapes: B rows, T new positions, P = past + T positions, H query heads, D d_model, K activations, R width of the router.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from polyglu.export.configuration_polychromatic import PolychromaticConfig
from polyglu.model.layers import GLU, AttentionHeads, RMSNorm, RoutedGLU, Router, reference_mixture


class PolychromaticAttention(AttentionHeads):
    """Causal grouped-query attention with QK-norm, by any of transformers' attention functions."""

    def __init__(self, config: PolychromaticConfig, layer_idx: int) -> None:
        super().__init__(config.d_model, config.n_q_heads, config.n_kv_heads, config.head_dim, config.eps)
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_key_value_groups = config.n_q_heads // config.n_kv_heads

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Any, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]`` -> ``[B, T, D]``, and the weights ``[B, H, T, P]`` if the function makes them."""
        q, k, v = (heads.transpose(1, 2) for heads in self.project(x, rope))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = attend(self, q, k, v, mask, dropout=0.0, scaling=self.head_dim**-0.5)
        return self.o_proj(out.flatten(2)), weights


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention as it is written, with its weights ``[B, H, T, P]``; the softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


class PolychromaticRouter(Router):
    """The same function, by calls of its layers alone: so what wraps a layer (offloading, quantising, LoRA) works.

    The bias is added before the mean is taken, not after.
    """

    def project(self, x: Tensor) -> Tensor:
        """What the mean is taken of: ``[..., D]`` -> fp32 ``[..., R]``."""
        return self.hidden(x).float()  # type: ignore[no-any-return]

    def logits(self, mean: Tensor) -> Tensor:
        """Of a mean, in the dtype of the weights, which is fp32 after loading: ``[..., R]`` -> fp32 ``[..., K]``."""
        with torch.autocast(mean.device.type, enabled=False):
            return self.out(torch.relu(mean).to(self.out.weight.dtype)).float()  # type: ignore[no-any-return]


class PolychromaticMLP(RoutedGLU):
    """Routed feed-forward layer over rows that may be padded."""

    def __init__(self, config: PolychromaticConfig, layer_idx: int) -> None:
        super().__init__(config.d_model, config.d_ff, config.n_activations, config.routing, PolychromaticRouter)
        self.running = config.pools and config.routing_scope == "causal"
        self.tau, self.layer_idx = config.tau, layer_idx

    def forward(self, x: Tensor, seen: Tensor | None, cache: Cache | None) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``; ``seen`` says which of ``[B, T]`` positions are no padding, if any is."""
        projected = self.router.project(x)
        counted = torch.cat((projected, torch.ones_like(projected[..., :1])), dim=-1)
        if seen is not None:
            counted = counted.masked_fill(~seen[..., None], 0.0)
        if not self.running:
            sums = counted.sum(1, keepdim=True)
        elif cache is None:
            sums = counted.cumsum(1)
        else:
            sums = cache.layers[self.layer_idx].add(counted)
        token_logits = self.logits_of(sums[..., :-1] / sums[..., -1:].clamp(min=1))  # [B, T or 1, K]
        mixed = reference_mixture(self.gate_proj(x), self.alpha.float()[None], token_logits, self.tau)
        return self.down_proj(mixed * self.up_proj(x))  # type: ignore[no-any-return]


class PolychromaticDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: PolychromaticConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.eps)
        self.self_attn = PolychromaticAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.eps)
        routed = config.ffn == "polyglu"
        self.mlp = PolychromaticMLP(config, layer_idx) if routed else GLU(config.d_model, config.d_ff, config.ffn)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Any,
        seen: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, past_key_values)[0]
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, GLU):
            return x + self.mlp(normed)  # type: ignore[no-any-return]
        return x + self.mlp(normed, seen, past_key_values)  # type: ignore[no-any-return]
