"""A decoding step on a CPU in fp32: PyTorch's matrix products, and ``kernels.decode`` between them.

The numbers of ``cache.features_by`` but for rounding. Shapes as in ``architecture``; n rows, one new token each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyglu.model.architecture import Block, PolychromaticLM
from polyglu.model.feed_forward import GLU, PolyGLU
from polyglu.model.kernels import decode, native


def native_serves(model: PolychromaticLM, dtype: torch.dtype) -> bool:
    """Whether ``NativeStep`` can run a model whose keys and values have a dtype."""
    if model.embed_tokens.weight.device.type != "cpu" or dtype != torch.float32:
        return False
    return model.config.kernels in ("auto", "native") and native.available() and decode.available()


class Routed(NamedTuple):
    """Of a routed layer."""

    router: decode.Router
    neuron: Tensor
    """Neurons' logits divided by tau, ``[K, 1, F]``."""


class NativeStep:
    """The blocks of a model for one new token a row. The model's weights must stay as they are."""

    def __init__(self, model: PolychromaticLM, tau: float, frozen: bool) -> None:
        self.model, self.tau, self.frozen = model, tau, frozen
        self.blocks = [block for block in model.layers if isinstance(block, Block)]
        self.heads = [
            decode.Heads(
                block.self_attn.q_norm.weight, block.self_attn.k_norm.weight, model.config.eps,
                model.rope.cos, model.rope.sin,
            )
            for block in self.blocks
        ]  # fmt: skip
        self.routed = [_routed(block.mlp, tau) for block in self.blocks if isinstance(block.mlp, PolyGLU)]

    def features(
        self, input_ids: Tensor, positions: Tensor, keys: Tensor, values: Tensor, totals: Tensor, counts: Tensor
    ) -> Tensor:
        """Normalised features ``[n, D]`` of tokens ``[n]`` at positions ``[n]``; the rest is the cache's, and grows."""
        eps = self.model.config.eps
        x = self.model.embed_tokens(input_ids)  # [n, D]
        for layer, block in enumerate(self.blocks):
            attn, mlp = block.self_attn, block.mlp
            normed = decode.norm(x, block.input_layernorm.weight, eps)
            q, k, v = (F.linear(normed, part.weight) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
            mixed = decode.attention(q, k, v, self.heads[layer], positions, keys[layer], values[layer])
            x = torch.addmm(x, mixed, attn.o_proj.weight.mT)
            normed = decode.norm(x, block.post_attention_layernorm.weight, eps)
            gate, up = F.linear(normed, mlp.gate_proj.weight), F.linear(normed, mlp.up_proj.weight)
            if isinstance(mlp, GLU):
                hidden = mlp.activation(gate) * up
            else:
                projected, (router, neuron) = mlp.router.project(normed), self.routed[layer]
                token = decode.route(projected, totals[layer], counts, router, self.tau, not self.frozen)
                hidden = native.forward(gate[None], up[None], neuron, token)[0]
            x = torch.addmm(x, hidden, mlp.down_proj.weight.mT)
        return decode.norm(x, self.model.norm.weight, eps)


def _routed(mlp: PolyGLU, tau: float) -> Routed:
    router = mlp.router
    weights = decode.Router(router.hidden.bias, router.out.weight, router.out.bias, mlp.beta)
    return Routed(weights, (mlp.alpha / tau).T.contiguous()[:, None])
