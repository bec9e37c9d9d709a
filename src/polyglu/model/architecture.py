"""PolychromaticLM in plain PyTorch: the readable reference, pinned to published numbers (arXiv 2603.13347).

Legend of shapes:
    B rows    T positions    N = B * T tokens    V vocabulary    D d_model    F d_ff (neurons)
    K activations    L layers    H query heads    G key/value heads    d head_dim    R ROUTER_WIDTH
    S = T where routing depends on the position, else 1
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyglu.model.config import KernelName, ModelConfig, Recompute
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.flash_attention import attention
from polyglu.model.kernels.norm import norm_serves, rms_norm_op
from polyglu.model.layers import GLU, AttentionHeads, RMSNorm, Rope, result_dtype, rotary_tables
from polyglu.model.packing import Packing

DYNAMIC = "L['packing'].cu_seqlens,L['packing'].max_length"
"""Arguments of ``Block.forward`` whose sizes differ from batch to batch: one compiled block serves them all."""
Output = TypeVar("Output")


class KernelRMSNorm(RMSNorm):
    """RMSNorm, by a kernel where there is one."""

    def __init__(self, width: int, eps: float, kernels: KernelName = "auto") -> None:
        super().__init__(width, eps)
        self.kernels = kernels

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        """As in ``RMSNorm``."""
        if self.kernels in ("auto", "native") and norm_serves(x, self.weight):
            normed: Tensor = rms_norm_op(x, self.weight, self.eps, *(rope or (None, None)), result_dtype(x))[0]
            return normed
        return super().forward(x, rope)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding, half split: dimension i is paired with i + d/2. Tables stay fp32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, seq_length: int) -> None:
        super().__init__()
        cos, sin = rotary_tables(torch.arange(seq_length), head_dim)  # [seq_length, d/2]
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[..., 1, d/2]`` of positions ``[...]``."""
        return self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)


class GroupedQueryAttention(AttentionHeads):
    """Causal attention with grouped heads and QK-norm; documents never see each other."""

    def __init__(self, config: ModelConfig) -> None:
        norm = partial(KernelRMSNorm, kernels=config.kernels)
        super().__init__(config.d_model, config.n_q_heads, config.n_kv_heads, config.head_dim, config.eps, norm)
        self.use_flash = config.use_flash_attn

    def forward(self, x: Tensor, packing: Packing, rope: Rope) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        q, k, v = self.project(x, rope)
        return self.o_proj(attention(q, k, v, packing, self.use_flash).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = KernelRMSNorm(config.d_model, config.eps, config.kernels)
        self.self_attn = GroupedQueryAttention(config)
        self.post_attention_layernorm = KernelRMSNorm(config.d_model, config.eps, config.kernels)
        self.mlp: PolyGLU | GLU
        if config.ffn == "polyglu":
            shape = config.d_model, config.d_ff, config.n_activations
            self.mlp = PolyGLU(*shape, config.routing_scope, config.kernels, config.routing)
        else:
            self.mlp = GLU(config.d_model, config.d_ff, config.ffn)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        rope: Rope,
        tau: float | Tensor,
        gumbel: Tensor | None,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]`` -> the same shape, and the token logits ``[B, S, K]`` of a routed layer."""
        if recompute == "full":
            return _recomputed(lambda kept: self.forward(kept, packing, rope, tau, gumbel), x)
        x = x + self.self_attn(self.input_layernorm(x), packing, rope)
        if recompute == "ffn":
            return _recomputed(lambda kept: self.feed_forward(kept, packing, tau, gumbel), x)
        return self.feed_forward(x, packing, tau, gumbel, keep_hidden=recompute != "hidden")

    def feed_forward(
        self, x: Tensor, packing: Packing, tau: float | Tensor, gumbel: Tensor | None, keep_hidden: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The second half of ``forward``, from and to ``[B, T, D]``."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, GLU):
            return x + self.mlp(normed), None
        token_logits = self.mlp.token_logits(normed, packing)
        return x + self.mlp.combine(normed, token_logits, tau, gumbel, keep_hidden), token_logits


def _recomputed(part: Callable[[Tensor], Output], x: Tensor) -> Output:
    """A part of a block, for which only ``x`` is kept for backward. Nothing in it is random.

    What else it takes it must enclose: of an argument, compiled code would look at everything, ``lengths`` too.
    """
    output: Output = checkpoint(part, x, use_reentrant=False, preserve_rng_state=False)
    return output


def compile_blocks(model: "PolychromaticLM", **options: Any) -> None:
    """Have the blocks compiled when the first is called; all of them share what is made for it.

    Args:
        model: changed in place.
        options: of ``torch.compile``.
    """
    torch.compiler.config.dynamic_sources = DYNAMIC
    for block in model.layers:
        block.compile(**options)


class PolychromaticLM(nn.Module):
    """Decoder-only language model of PolyGLU blocks; the head is tied to the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = KernelRMSNorm(config.d_model, config.eps, config.kernels)
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
            x, token_logits = block(x, packing, rope, tau, noise, recompute)
            if token_logits is not None:
                routing.append(token_logits)
        return self.norm(x), routing
