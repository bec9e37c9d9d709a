"""What a decoding step does on a CPU in fp32, in C++ (``decode.cpp``).

One new token of a row is so little work that PyTorch's operations would mostly wait for each other. Shapes: B rows,
D width, H query heads, G key heads, d head width, P positions of a slot, R router width, K activations.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyglu.model.kernels.compiled import load_library

FEW = 8
"""Rows up to which a product takes hardly longer than reading its weights."""
WIDTHS, OUTPUTS = 16, 4
"""Numbers whose multiples ``decode_products`` takes."""


class Attention(ctypes.Structure):
    """Arguments, as in ``decode.cpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "query_heads", "key_heads", "width", "longest")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "q_weight", "k_weight", "cos", "sin", "positions")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "out")),
        ("eps", ctypes.c_float),
    ]


class Route(ctypes.Structure):
    """Arguments, as in ``decode.cpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "activations")),
        *((name, ctypes.c_void_p) for name in ("projected", "count", "hidden_bias", "weight", "bias", "beta")),
        *((name, ctypes.c_void_p) for name in ("total", "token")),
        ("tau", ctypes.c_float),
        ("add", ctypes.c_int64),
    ]


def available() -> bool:
    """Whether a compiler is here that makes the library."""
    return load_library("decode") is not None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``architecture.RMSNorm`` of dense fp32 ``[B, D]``."""
    y = torch.empty_like(x)
    rows, width = x.shape
    _library().decode_norm(x.data_ptr(), weight.data_ptr(), eps, rows, width, y.data_ptr())
    return y


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` of dense fp32 ``[B, width]`` and ``[outputs, width]``; of few rows as fast as memory allows."""
    (rows, width), outputs = x.shape, len(weight)
    if rows > FEW or width % WIDTHS or outputs % OUTPUTS:
        return F.linear(x, weight)
    y = torch.empty(rows, outputs)
    _library().decode_products(x.data_ptr(), weight.data_ptr(), rows, outputs, width, y.data_ptr())
    return y


class Heads(NamedTuple):
    """What attention knows of a layer beside its products; all fp32."""

    q_weight: Tensor
    """Of the norm, ``[d]``."""
    k_weight: Tensor
    eps: float
    cos: Tensor
    """``[positions, d / 2]``."""
    sin: Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: Heads, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of each row's new token to the row: norms, rotary embedding, and the new key and value put in place.

    Args:
        q: ``[B, H * d]``, as projected, fp32.
        k: ``[B, G * d]``, the same.
        v: ``[B, G * d]``, the same.
        heads: norms and angles.
        positions: ``[B]`` int64, of the new tokens.
        keys: ``[slots, P, G, d]``, changed: row i has slot i.
        values: the same.

    Returns:
        ``[B, H * d]``.
    """
    out = torch.empty_like(q)
    _, longest, key_heads, width = keys.shape
    problem = Attention(
        len(q), q.shape[1] // width, key_heads, width, longest,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), heads.q_weight.data_ptr(), heads.k_weight.data_ptr(),
        heads.cos.data_ptr(), heads.sin.data_ptr(), positions.data_ptr(),
        keys.data_ptr(), values.data_ptr(), out.data_ptr(), heads.eps,
    )  # fmt: skip
    _library().decode_attention(ctypes.byref(problem))
    return out


class Router(NamedTuple):
    """Weights of a layer's router, fp32."""

    hidden_bias: Tensor
    """``[R]``."""
    weight: Tensor
    """``[K, R]``."""
    bias: Tensor
    """``[K]``."""
    beta: Tensor
    """``[K]``."""


def route(projected: Tensor, total: Tensor, count: Tensor, router: Router, tau: float, add: bool) -> Tensor:
    """What the tokens share of the routing logits, divided by tau: ``[K, 1, B]``, as ``native.forward`` takes them.

    Args:
        projected: the router's input of the new tokens, ``[B, R]``.
        total: ``[slots, R]``, sum of those before them; row i has slot i.
        count: ``[slots]``, how many there are.
        router: weights.
        tau: temperature.
        add: whether the new tokens enter the mean; then ``total`` is changed, and ``count`` is not.
    """
    rows, width = projected.shape
    token = torch.empty(len(router.beta), 1, rows)
    problem = Route(
        rows, width, len(router.beta), projected.data_ptr(), count.data_ptr(),
        *(tensor.data_ptr() for tensor in router), total.data_ptr(), token.data_ptr(), tau, add,
    )  # fmt: skip
    _library().decode_route(ctypes.byref(problem))
    return token


@cache
def _library() -> ctypes.CDLL:
    library = load_library("decode")
    if library is None:
        raise RuntimeError("the native kernel could not be compiled")
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.decode_norm.argtypes = [pointer, pointer, ctypes.c_float, size, size, pointer]
    library.decode_products.argtypes = [pointer, pointer, size, size, size, pointer]
    return library
