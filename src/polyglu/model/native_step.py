"""A decoding step on a CPU in fp32 by ``kernels.decode``; products with many rows are PyTorch's.

The numbers of ``cache.features_by`` but for rounding. Shapes as in ``architecture``; n rows, one new token each.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polyglu.model.architecture import Block, PolychromaticLM
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.kernels import decode, native
from polyglu.model.layers import Router


def native_serves(model: PolychromaticLM, dtype: torch.dtype) -> bool:
    """Whether ``NativeStep`` can run a model whose keys and values have a dtype."""
    config = model.config
    if model.embed_tokens.weight.device.type != "cpu" or dtype != torch.float32:
        return False
    if config.kernels not in ("auto", "native") or not decode.available():
        return False
    # A static routing has no router; other feed-forward layers need no mixture.
    return config.ffn != "polyglu" or (config.routing != "static" and native.available(config.n_activations))


class Routed(NamedTuple):
    """What a routed layer has beside its products."""

    hidden: Tensor
    """The router's first product, ``[R, D]``."""
    router: decode.Router
    neuron: Tensor
    """Neurons' logits divided by tau, ``[K, 1, F]``."""


class Layer(NamedTuple):
    """A block's weights: to look them up in its modules takes as long as a small product."""

    input_norm: Tensor
    qkv: tuple[Tensor, Tensor, Tensor]
    heads: decode.Heads
    o: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    activation: Callable[[Tensor], Tensor] | Routed


class NativeStep:
    """The blocks of a model for one new token a row. The model's weights must stay as they are."""

    def __init__(self, model: PolychromaticLM, tau: float, frozen: bool) -> None:
        self.model, self.tau, self.frozen = model, tau, frozen
        self.layers = [_layer(block, model, tau) for block in model.layers if isinstance(block, Block)]

    def logits(
        self, input_ids: Tensor, positions: Tensor, keys: Tensor, values: Tensor, totals: Tensor, counts: Tensor
    ) -> Tensor:
        """Logits ``[n, V]`` after tokens ``[n]`` at positions ``[n]``; the rest is the cache's, and grows."""
        eps = self.model.config.eps
        x = self.model.embed_tokens(input_ids)  # [n, D]
        for index, layer in enumerate(self.layers):
            normed = decode.norm(x, layer.input_norm, eps)
            q, k, v = (decode.linear(normed, weight) for weight in layer.qkv)
            mixed = decode.attention(q, k, v, layer.heads, positions, keys[index], values[index])
            x = x + decode.linear(mixed, layer.o)
            normed = decode.norm(x, layer.post_norm, eps)
            gate, up, activation = decode.linear(normed, layer.gate), decode.linear(normed, layer.up), layer.activation
            if isinstance(activation, Routed):
                projected = decode.linear(normed, activation.hidden)
                token = decode.route(projected, totals[index], counts, activation.router, self.tau, add=not self.frozen)
                hidden = native.forward(gate[None], up[None], activation.neuron, token)[0]
            else:
                hidden = activation(gate) * up
            x = x + decode.linear(hidden, layer.down)
        return decode.linear(decode.norm(x, self.model.norm.weight, eps), self.model.embed_tokens.weight)


def _layer(block: Block, model: PolychromaticLM, tau: float) -> Layer:
    attn, mlp, rope = block.self_attn, block.mlp, model.rope
    return Layer(
        input_norm=block.input_layernorm.weight,
        qkv=(attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight),
        heads=decode.Heads(attn.q_norm.weight, attn.k_norm.weight, model.config.eps, rope.cos, rope.sin),
        o=attn.o_proj.weight,
        post_norm=block.post_attention_layernorm.weight,
        gate=mlp.gate_proj.weight,
        up=mlp.up_proj.weight,
        down=mlp.down_proj.weight,
        activation=_routed(mlp, tau) if isinstance(mlp, PolyGLU) else mlp.activation,
    )


def _routed(mlp: PolyGLU, tau: float) -> Routed:
    router = mlp.router
    assert isinstance(router, Router)
    weights = decode.Router(router.hidden.bias, router.out.weight, router.out.bias, mlp.beta)
    return Routed(router.hidden.weight, weights, (mlp.alpha / tau).T.contiguous()[:, None])
