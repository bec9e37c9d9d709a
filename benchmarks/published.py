"""A training step by the operations of the published code, on this project's weights.

Each elementary operation is a tensor of its own: the norm's square, mean, root and quotient; keys and values repeated
for each query head, scores ``[B, H, T, T]`` under a mask made anew in each layer; the branches of all activations
stacked, ``[B, T, F, K]``; the logits of all positions. The optimiser is ``torch.optim.AdamW`` with its defaults.
Weights have the compute dtype. Nothing is recomputed in backward, which the published code does only on a GPU.

A row is a document: without FlashAttention the published code cannot keep documents apart. Its numbers are those of
``PolychromaticLM`` under ``sequence`` scope (tests/integration/test_speed.py).
"""

import itertools

import torch
import torch.nn.functional as F
from steps import LEARNING_RATE, Setting
from torch import Tensor
from turns import Case, Stopwatch

from polyglu.model.activations import ACTIVATIONS
from polyglu.model.architecture import GroupedQueryAttention, PolychromaticLM
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.layers import RMSNorm, Rope


def published_step(setting: Setting) -> Case:
    with setting.device:
        model = PolychromaticLM(setting.model.model_copy(update={"routing_scope": "sequence"}))
        model.init_weights()
    model.to(setting.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    batch, config = setting.batch(), setting.model
    shape = config.n_layers, setting.rows, config.d_ff, config.n_activations
    taus = (1 - 1e-5 * step for step in itertools.count())

    def case(watch: Stopwatch) -> None:
        watch.start()
        noise = -torch.empty(shape, dtype=setting.dtype, device=setting.device).exponential_().log()
        logits = published_logits(model, batch.input_ids, next(taus), noise)
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.lap("step")

    return case


def published_logits(model: PolychromaticLM, input_ids: Tensor, tau: float, gumbel: Tensor) -> Tensor:
    """``[B, T]``, noise ``[L, B, F, K]`` -> ``[B, T, V]``."""
    x = model.embed_tokens(input_ids)
    cos, sin = model.rope(torch.arange(input_ids.shape[1], device=input_ids.device))
    for block, noise in zip(model.layers, gumbel, strict=True):
        x = x + _attention(block.self_attn, _norm(x, block.input_layernorm), (cos.to(x.dtype), sin.to(x.dtype)))
        x = x + _feed_forward(block.mlp, _norm(x, block.post_attention_layernorm), tau, noise)
    return model.head(_norm(x, model.norm))


def _norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    (cos, sin), (first, second) = rope, x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def _attention(layer: GroupedQueryAttention, x: Tensor, rope: Rope) -> Tensor:
    q, k, v = (
        project(x).unflatten(-1, (-1, layer.head_dim))  # [B, T, H or G, d]
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = _rotate(_norm(q, layer.q_norm), rope), _rotate(_norm(k, layer.k_norm), rope)
    k, v = (heads.repeat_interleave(q.shape[2] // heads.shape[2], dim=2) for heads in (k, v))
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    scores = q @ k.transpose(-1, -2) / layer.head_dim**0.5  # [B, H, T, T]
    future = torch.ones(x.shape[1], x.shape[1], device=x.device).triu(1).bool()
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return layer.o_proj((weights @ v).transpose(1, 2).flatten(2))


def _feed_forward(layer: PolyGLU, x: Tensor, tau: float, gumbel: Tensor) -> Tensor:
    pooled = layer.beta * layer.router.out(layer.router.hidden(x.mean(1)).relu())  # [B, K]
    weights = ((layer.alpha + pooled[:, None] + gumbel) / tau).softmax(-1)  # [B, F, K]
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    branches = torch.stack([activation.function(gate) for activation in ACTIVATIONS[: weights.shape[-1]]], dim=-1)
    return layer.down_proj((weights[:, None] * branches).sum(-1) * up)
