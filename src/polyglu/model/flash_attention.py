"""Causal attention inside documents: one function, its backends chosen inside, callers unchanged.

CUDA: the flash-attn package if installed, else PyTorch's own FlashAttention (``torch.nn.attention.varlen``).
Elsewhere, or with ``use_flash_attn: false``: PyTorch's SDPA on the documents of each length, without building masks.

Shapes: B rows, T columns, N = B * T tokens, H query heads, G key/value heads, d head_dim.
"""

import importlib.util
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from polyglu.model.packing import Packing

FLASH_ATTN_INSTALLED = importlib.util.find_spec("flash_attn") is not None
GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether this release's varlen_attn serves several query heads with one key; else keys and values are repeated."""

SHORT = 256
"""Tokens of a row. Below, PyTorch's backward on a CPU takes two to three times as long in bf16 as in fp32."""


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, use_flash: bool) -> Tensor:
    """Softmax(q k^T / sqrt(d)) v over the earlier tokens of the same document.

    Args:
        q: ``[B, T, H, d]``.
        k: ``[B, T, G, d]``, H a multiple of G.
        v: ``[B, T, G, d]``.
        packing: documents of the rows.
        use_flash: use FlashAttention kernels where the device and dtype allow.

    Returns:
        ``[B, T, H, d]``.
    """
    if use_flash and flash_serves(q.device, q.dtype, q.shape[3]):
        return _flash(q, k, v, packing)
    return _sdpa(q, k, v, packing)


def suffix_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for the last T positions of a document: ``[T, H, d]``, twice ``[S, G, d]`` -> ``[T, H, d]``."""
    if len(q) == len(k):
        return _sdpa_rows(q[None], k[None], v[None])[0]
    mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H or G, T or S, d]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def flash_serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention has kernels for a device, a dtype and a width of heads."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def _sdpa(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    if packing.whole_rows:
        return _sdpa_rows(q, k, v)
    stacks = zip(*(packing.stacks.stack(x.flatten(0, 1)) for x in (q, k, v)), strict=True)
    return packing.stacks.unstack([_sdpa_rows(*stack) for stack in stacks]).view_as(q)


def _sdpa_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dtype = q.dtype
    if q.device.type == "cpu" and q.shape[1] < SHORT and dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or G, T, d]
    with torch.autocast(q.device.type, enabled=False):  # which would convert back
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).to(dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """As ``attention``; the host is not asked about the documents."""
    query, key, value = (x.flatten(0, 1) for x in (q, k, v))  # [N, H or G, d]
    bounds, longest = packing.cu_seqlens, packing.max_length
    if FLASH_ATTN_INSTALLED:
        from flash_attn import flash_attn_varlen_func

        # PyTorch's own kernels look at this switch themselves.
        same_bits = torch.are_deterministic_algorithms_enabled()
        out: Tensor = flash_attn_varlen_func(
            query, key, value, bounds, bounds[:], longest, longest, causal=True, deterministic=same_bits
        )  # torch.compile takes no autograd function that is given one tensor twice
    else:
        if not GROUPED:
            key, value = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (key, value))
        grouped: dict[str, Any] = {"enable_gqa": True} if GROUPED else {}
        causal = varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0), **grouped)
        assert isinstance(causal, Tensor)
        out = causal
    return out.view_as(q)
