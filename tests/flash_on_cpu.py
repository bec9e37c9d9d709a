"""FlashAttention for CPU tensors, so that tests run what a GPU runs: PyTorch's operators get a readable CPU kernel."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from polyglu.model import flash_attention

Tensors = tuple[Tensor, Tensor, Tensor]


def use(backend: str, patch: pytest.MonkeyPatch) -> None:
    """Have attention on CPU tensors take ``backend``: ``torch`` or ``flash_attn``, a stand-in for the package."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = _package_function  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "flash_attn", module)
    patch.setattr(flash_attention, "FLASH_ATTN_INSTALLED", backend == "flash_attn")
    patch.setattr(flash_attention, "flash_serves", lambda *_: True)


def _weights(query: Tensor, key: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Softmax ``[H, N, N]`` of queries ``[N, H, d]`` over the earlier tokens of their documents."""
    document = torch.searchsorted(cu_seqlens, torch.arange(len(query)), right=True)
    visible = (document[:, None] == document).tril()
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def _repeated(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    """In fp32, with as many heads as the queries."""
    return [tensor.float().repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in tensors]


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, window_size: list[int] | None = None, *_: Any, **__: Any,
) -> Tensors:  # fmt: skip
    lengths = cu_seq_q.diff()
    assert is_causal and window_size == [-1, 0] and scale is None and cu_seq_q.dtype == torch.int32
    assert 0 < int(lengths.min()) <= int(lengths.max()) <= max_q == max_k
    q, k, v = _repeated(query, query, key, value)
    out = torch.einsum("hqk,khd->qhd", _weights(q, k, cu_seq_q), v).to(query.dtype)
    logsumexp, state = torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)
    return out.contiguous(), logsumexp, state


@varlen._varlen_attn_backward.register_kernel("cpu")
def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_seq_q: Tensor,
    cu_seq_k: Tensor, max_q: int, max_k: int, *_: Any, **__: Any,
) -> Tensors:  # fmt: skip
    grad, q, k, v = _repeated(query, grad_out, query, key, value)
    weights = _weights(q, k, cu_seq_q)
    d_weights = torch.einsum("qhd,khd->hqk", grad, v)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) / query.shape[2] ** 0.5
    d_query = torch.einsum("hqk,khd->qhd", d_scores, k)
    d_key, d_value = torch.einsum("hqk,qhd->khd", d_scores, q), torch.einsum("hqk,qhd->khd", weights, grad)
    d_key, d_value = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (d_key, d_value))
    return d_query.to(query.dtype).contiguous(), d_key.to(key.dtype).contiguous(), d_value.to(key.dtype).contiguous()


class _Package(torch.autograd.Function):
    """Built as in the flash-attn package: an autograd function around operators."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
    ) -> Tensor:
        grouped = (True,) if flash_attention.GROUPED else ()
        out, lse, state = torch.ops.torch_attn._varlen_attn(
            q, k, v, cu_q, cu_k, max_q, max_k, causal, None, [-1, 0], *grouped
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, state)
        ctx.max_q, ctx.max_k, ctx.causal = max_q, max_k, causal
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, state = ctx.saved_tensors
        gradients = torch.ops.torch_attn._varlen_attn_backward(
            grads[0], *tensors, ctx.max_q, ctx.max_k, ctx.causal, state, None, [-1, 0]
        )
        return *gradients, None, None, None, None, None


def _package_function(
    q: Tensor, k: Tensor, v: Tensor, *documents: Any, causal: bool, deterministic: bool
) -> Tensor:  # fmt: skip
    assert isinstance(deterministic, bool)
    if not flash_attention.GROUPED:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return _Package.apply(q, k, v, *documents, causal)  # type: ignore[no-any-return, no-untyped-call]
