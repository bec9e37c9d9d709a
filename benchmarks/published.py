"""A training step by the operations of the published code, on this project's weights.

Each elementary operation is a tensor of its own: the norm's square, mean, root and quotient; the branches of all
activations stacked, ``[B, T, F, K]``; on the CPU keys and values repeated for each query head, scores ``[B, H, T, T]``
under a mask made anew in each layer, and the logits of all positions. On a GPU, as published, FlashAttention keeps
documents apart, and blocks and chunks of logits are recomputed in backward. Weights have the compute dtype; the
optimiser is ``torch.optim.AdamW`` with its defaults, on fp32 copies of them.

The numbers are those of ``PolychromaticLM`` under ``sequence`` scope (tests/integration/test_speed.py).
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from steps import LEARNING_RATE, Setting
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from turns import Case, Stopwatch

from polyglu.data.dataloader import MicroBatch
from polyglu.model.activations import ACTIVATIONS
from polyglu.model.architecture import Block, GroupedQueryAttention, PolychromaticLM
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.flash_attention import attention
from polyglu.model.layers import RMSNorm, Rope
from polyglu.model.packing import Packing

CHUNK = 2048
"""Columns whose logits are made at a time, on a GPU."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``[B, T, H, d]``, twice ``[B, T, G, d]`` -> ``[B, T, H, d]``."""


def published_step(setting: Setting) -> Case:
    with setting.device:
        model = PolychromaticLM(setting.model)
        model.init_weights()
    masters = [weight.detach().requires_grad_() for weight in model.parameters()]
    weights = list(model.to(setting.dtype).parameters())  # in fp32 they share memory
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE)
    batch, config = setting.batch(), setting.model
    loss_of = published_gpu_loss if setting.device.type == "cuda" else published_cpu_loss
    shape = config.n_layers, setting.rows, config.d_ff, config.n_activations
    taus = (1 - 1e-5 * step for step in itertools.count())

    def case(watch: Stopwatch) -> None:
        watch.start()
        noise = -torch.empty(shape, dtype=setting.dtype, device=setting.device).exponential_().log()
        loss_of(model, batch, next(taus), noise).backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        for master, weight in zip(masters, weights, strict=True):
            if weight.dtype != master.dtype:
                weight.data.copy_(master)
        watch.lap("step")

    return case


def published_cpu_loss(model: PolychromaticLM, batch: MicroBatch, tau: float, gumbel: Tensor) -> Tensor:
    """Mean over all positions; rows are whole. Noise ``[L, B, F, K]``."""
    x = model.embed_tokens(batch.input_ids)
    for block, rope, noise in _layers(model, x, gumbel):
        x = _block(x, block, rope, tau, noise, _attend)
    return F.cross_entropy(model.head(_norm(x, model.norm)).flatten(0, 1), batch.targets.flatten())


def published_gpu_loss(model: PolychromaticLM, batch: MicroBatch, tau: float, gumbel: Tensor) -> Tensor:
    """The same with documents kept apart, and all but the blocks' inputs recomputed in backward."""
    packing = Packing.of(batch.input_ids.shape, batch.cu_seqlens, batch.input_ids.device)
    attend = partial(attention, packing=packing, use_flash=True)
    x = model.embed_tokens(batch.input_ids)
    for block, rope, noise in _layers(model, x, gumbel):
        x = checkpoint(_block, x, block, rope, tau, noise, attend, use_reentrant=False)
    chunks = zip(_norm(x, model.norm).split(CHUNK, 1), batch.targets.split(CHUNK, 1), strict=True)
    total = sum(checkpoint(_summed_loss, model, *chunk, use_reentrant=False) for chunk in chunks)
    return total / batch.targets.numel()


def _layers(model: PolychromaticLM, x: Tensor, gumbel: Tensor) -> Iterator[tuple[Block, Rope, Tensor]]:
    cos, sin = (table.to(x.dtype) for table in model.rope(torch.arange(x.shape[1], device=x.device)))
    for block, noise in zip(model.layers, gumbel, strict=True):
        yield block, (cos, sin), noise


def _block(x: Tensor, block: Block, rope: Rope, tau: float, gumbel: Tensor, attend: Attend) -> Tensor:
    x = x + _self_attention(block.self_attn, _norm(x, block.input_layernorm), rope, attend)
    return x + _feed_forward(block.mlp, _norm(x, block.post_attention_layernorm), tau, gumbel)


def _norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    (cos, sin), (first, second) = rope, x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def _self_attention(layer: GroupedQueryAttention, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
    q, k, v = (
        project(x).unflatten(-1, (-1, layer.head_dim))  # [B, T, H or G, d]
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = _rotate(_norm(q, layer.q_norm), rope), _rotate(_norm(k, layer.k_norm), rope)
    return layer.o_proj(attend(q, k, v).flatten(2))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (heads.repeat_interleave(q.shape[2] // heads.shape[2], dim=2) for heads in (k, v))
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [B, H, T, T]
    future = torch.ones(q.shape[2], q.shape[2], device=q.device).triu(1).bool()
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def _feed_forward(layer: PolyGLU, x: Tensor, tau: float, gumbel: Tensor) -> Tensor:
    pooled = layer.beta * layer.router.out(layer.router.hidden(x.mean(1)).relu())  # [B, K]
    weights = ((layer.alpha + pooled[:, None] + gumbel) / tau).softmax(-1)  # [B, F, K]
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    branches = torch.stack([activation.function(gate) for activation in ACTIVATIONS[: weights.shape[-1]]], dim=-1)
    return layer.down_proj((weights[:, None] * branches).sum(-1) * up)


def _summed_loss(model: PolychromaticLM, features: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.head(features).flatten(0, 1), targets.flatten(), reduction="sum")
