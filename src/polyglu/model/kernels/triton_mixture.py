"""The mixture of activations times ``up`` on a CUDA device, fused: weights and branches live in registers only.

With x = gate, u = up, z_k = neuron_k + token_k, w = softmax_k(z), s_k = activation_k(x), mix = sum_k w_k s_k, h = mix u:

    d u = d h mix    m = d h u    d x = m sum_k w_k s_k'(x)    d z_k = m w_k (s_k - mix)

A program has ``BLOCK_F`` neurons and goes through up to ``SPAN`` tokens of one row, ``BLOCK_T`` at a time. What limits it
is the number of instructions as much as memory, so K exponentials an element are too many: exp(z_k) is the product of a
neuron's factor, made once a program, and a token's, made once a token and shared by the block.

Gradients of the logits are summed in fp32 and in a fixed order: over a program's tokens in registers, then over the
programs by torch. They sum to zero over k, so only the first K - 1 are computed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter knows no assembly."""
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_2_PI = tl.constexpr(2.5066282746310002)
LOG2_SQRT_2_PI = tl.constexpr(1.3257480647361593)
WIDEST = tl.constexpr(40.0)
"""Largest |token_k - token_0| whose exponentials are taken apart. Neuron factors are at most 1 and one of them is 1, so
the sum of the products is at least e^-40: what underflows does not count, and the inverse is far from overflow."""


@triton.jit
def _reciprocal(x):
    """1 / x in one instruction; a division takes eight, to be exact for x that do not occur here."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _branches(x, K: tl.constexpr):
    """Values and derivatives of the first K of ``ACTIVATIONS``; what is not used of them costs nothing.

    exp2 flushes tiny results to zero and is one instruction, unlike exp. Infinite x gives 0 or infinity in each
    exponential, which all formulas carry to what PyTorch gives, NaN included.
    """
    dead = x <= 0  # False for NaN
    values = (tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL),)
    slopes = (tl.where(dead, 0.0, 1.0),)
    square = x * x
    if K > 1:
        e = tl.exp2(x * -LOG2_E)  # e^-x, shared with SiLU
        odd = x * (1.0 + square * (square * 0.12876421 - 0.33324571))  # the other form cancels near 0
        tanh = tl.where(square < 0.0625, odd, 2.0 * _reciprocal(1.0 + e * e) - 1.0)
        values += (tanh,)
        slopes += (1.0 - tanh * tanh,)
    if K > 2:
        sigmoid = _reciprocal(1.0 + e)
        values += (x * sigmoid,)
        slopes += (sigmoid + x * sigmoid * (1.0 - sigmoid),)
    if K > 3:
        density = tl.exp2(square * (-0.5 * LOG2_E) - LOG2_SQRT_2_PI)  # of the normal distribution, shared with Gaussian
        t = _reciprocal(1.0 + 0.2316419 * tl.abs(x))  # Abramowitz and Stegun 26.2.17: error below 7.5e-8
        series = -0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))
        tail = density * t * (0.319381530 + t * series)
        cumulative = tl.where(dead, tail, 1.0 - tail)
        values += (x * cumulative,)
        slopes += (cumulative + x * density,)
    if K > 4:
        values += (tl.sin(x),)
        slopes += (tl.cos(x),)
    if K > 5:
        gaussian = (SQRT_2_PI * density) * (SQRT_2_PI * density)
        values += (gaussian,)
        slopes += (-2.0 * x * gaussian,)
    return values, slopes


@triton.jit
def _weighted_sum(weights, values, K: tl.constexpr):
    total = weights[0] * values[0]
    for k in tl.static_range(1, K):
        total += weights[k] * values[k]
    return total


@triton.jit
def _sum(values, K: tl.constexpr):
    total = values[0]
    for k in tl.static_range(1, K):
        total += values[k]
    return total


@triton.jit
def _load_logits(pointers, stride, mask, K: tl.constexpr):
    logits = ()
    for k in tl.static_range(K):
        logits += (tl.load(pointers + k * stride, mask=mask, other=0.0),)
    return logits


@triton.jit
def _exponentials(logits, K: tl.constexpr):
    """exp(logit - largest), without overflow."""
    largest = logits[0]
    for k in tl.static_range(1, K):
        largest = tl.maximum(largest, logits[k])
    exponentials = ()
    for k in tl.static_range(K):
        exponentials += (tl.exp2((logits[k] - largest) * LOG2_E),)
    return exponentials


@triton.jit
def _distance(token, K: tl.constexpr):
    """Largest |token_k - token_0| of each token."""
    distance = tl.abs(token[K - 1] - token[0])
    for k in tl.static_range(1, K - 1):
        distance = tl.maximum(distance, tl.abs(token[k] - token[0]))
    return distance


@triton.jit
def _weights(neuron, token_ptr, token_stride, tokens, end, K: tl.constexpr, FORM: tl.constexpr):
    """Weights of a tile up to a factor, and the factor, the inverse of their sum: K times ``[BLOCK_T, BLOCK_F]``, once."""
    if FORM == "weights":
        weights, inverse = neuron, 1.0
    else:
        token = _load_logits(token_ptr + tokens, token_stride, tokens < end, K)
        if FORM == "factors":
            weights = (neuron[0],)
            for k in tl.static_range(1, K):
                weights += (neuron[k] * tl.exp2((token[k] - token[0]) * LOG2_E),)
        else:
            logits = ()
            for k in tl.static_range(K):
                logits += (neuron[k] + token[k],)
            weights = _exponentials(logits, K)
        inverse = _reciprocal(_sum(weights, K))
    return weights, inverse


@triton.jit
def _place(T, F, BLOCK_F: tl.constexpr, SPAN: tl.constexpr):
    """This program's neurons ``[1, BLOCK_F]``, block of neurons, row, span within the row, and its tokens' range."""
    blocks, spans = (F + BLOCK_F - 1) // BLOCK_F, (T + SPAN - 1) // SPAN
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row, first = place // spans, place % spans * SPAN
    neurons = block * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return neurons, block, place, row.to(tl.int64), first, tl.minimum(first + SPAN, T)


@triton.jit
def _is_narrow(token_ptr, token_stride, first, end, K: tl.constexpr, SPAN: tl.constexpr):
    tokens = first + tl.arange(0, SPAN)
    return tl.max(_distance(_load_logits(token_ptr + tokens, token_stride, tokens < end, K), K), 0) <= WIDEST


@triton.jit
def _load(pointer, stride, tokens, neurons, mask):
    return tl.load(pointer + tokens * stride + neurons, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_span(
    gate_ptr, up_ptr, hidden_ptr, token_ptr, gate_stride, up_stride, token_stride, neuron, neurons, first, end, F,
    K: tl.constexpr, FORM: tl.constexpr, BLOCK_T: tl.constexpr,
):
    for start in range(first, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
        mask = (tokens < end) & (neurons < F)
        x = _load(gate_ptr, gate_stride, tokens, neurons, mask)
        up = _load(up_ptr, up_stride, tokens, neurons, mask)
        weights, inverse = _weights(neuron, token_ptr, token_stride, tokens, end, K, FORM)
        values = _branches(x, K)[0]
        tl.store(hidden_ptr + tokens * F + neurons, _weighted_sum(weights, values, K) * (inverse * up), mask=mask)


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, neuron_ptr, token_ptr, hidden_ptr,
    gate_stride, up_stride, neuron_stride, neuron_row, token_stride, T, F,
    K: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, SPAN: tl.constexpr,
):
    neurons, block, place, row, first, end = _place(T, F, BLOCK_F, SPAN)
    gate_ptr += row * T * gate_stride
    up_ptr += row * T * up_stride
    hidden_ptr += row * T * F
    token_ptr += row * T
    logits = _load_logits(neuron_ptr + row * neuron_row + neurons, neuron_stride, neurons < F, K)
    if not PER_TOKEN:
        _forward_span(gate_ptr, up_ptr, hidden_ptr, token_ptr, gate_stride, up_stride, token_stride, _softmax(logits, K), neurons, first, end, F, K, "weights", BLOCK_T)
    elif _is_narrow(token_ptr, token_stride, first, end, K, SPAN):
        _forward_span(gate_ptr, up_ptr, hidden_ptr, token_ptr, gate_stride, up_stride, token_stride, _exponentials(logits, K), neurons, first, end, F, K, "factors", BLOCK_T)
    else:
        _forward_span(gate_ptr, up_ptr, hidden_ptr, token_ptr, gate_stride, up_stride, token_stride, logits, neurons, first, end, F, K, "logits", BLOCK_T)


@triton.jit
def _softmax(logits, K: tl.constexpr):
    exponentials = _exponentials(logits, K)
    inverse = _reciprocal(_sum(exponentials, K))
    weights = ()
    for k in tl.static_range(K):
        weights += (exponentials[k] * inverse,)
    return weights


@triton.jit
def _backward_span(
    d_hidden_ptr, gate_ptr, up_ptr, token_ptr, d_gate_ptr, d_up_ptr, d_neuron_ptr, d_token_ptr, hidden_ptr,
    d_hidden_stride, gate_stride, up_stride, token_stride, neuron, neurons, first, end, F,
    K: tl.constexpr, FORM: tl.constexpr, WITH_HIDDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):
    sums = (tl.full([BLOCK_T, BLOCK_F], 0.0, tl.float32),) * (K - 1)
    lanes = tl.arange(0, 32)[None, :]
    for start in range(first, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
        mask = (tokens < end) & (neurons < F)
        x = _load(gate_ptr, gate_stride, tokens, neurons, mask)
        up = _load(up_ptr, up_stride, tokens, neurons, mask)
        d_hidden = _load(d_hidden_ptr, d_hidden_stride, tokens, neurons, mask)
        weights, inverse = _weights(neuron, token_ptr, token_stride, tokens, end, K, FORM)
        values, slopes = _branches(x, K)
        mixed = _weighted_sum(weights, values, K) * inverse
        d_mixed = d_hidden * up * inverse  # the weights' common factor is here
        if WITH_HIDDEN:
            tl.store(hidden_ptr + tokens * F + neurons, mixed * up, mask=mask)
        tl.store(d_up_ptr + tokens * F + neurons, d_hidden * mixed, mask=mask)
        tl.store(d_gate_ptr + tokens * F + neurons, d_mixed * _weighted_sum(weights, slopes, K), mask=mask)
        new, d_token = (), tl.full([BLOCK_T, 32], 0.0, tl.float32)
        for k in tl.static_range(K - 1):
            d_logit = d_mixed * weights[k] * (values[k] - mixed)
            new += (sums[k] + d_logit,)
            if FORM != "weights":
                d_token = tl.where(lanes == k, tl.sum(d_logit, 1, keep_dims=True), d_token)
        sums = new
        if FORM != "weights":
            tl.store(d_token_ptr + tokens * (K - 1) + lanes, d_token, mask=(tokens < end) & (lanes < K - 1))
    for k in tl.static_range(K - 1):
        tl.store(d_neuron_ptr + k * F + neurons, tl.sum(sums[k], 0, keep_dims=True), mask=neurons < F)


@triton.jit
def _backward_kernel(
    d_hidden_ptr, gate_ptr, up_ptr, neuron_ptr, token_ptr, d_gate_ptr, d_up_ptr, d_neuron_ptr, d_token_ptr, hidden_ptr,
    d_hidden_stride, gate_stride, up_stride, neuron_stride, neuron_row, token_stride, T, F,
    K: tl.constexpr, PER_TOKEN: tl.constexpr, WITH_HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, SPAN: tl.constexpr,
):
    neurons, block, place, row, first, end = _place(T, F, BLOCK_F, SPAN)
    d_hidden_ptr += row * T * d_hidden_stride
    gate_ptr += row * T * gate_stride
    up_ptr += row * T * up_stride
    d_gate_ptr += row * T * F
    d_up_ptr += row * T * F
    hidden_ptr += row * T * F
    token_ptr += row * T
    d_token_ptr += (block.to(tl.int64) * token_stride + row * T) * (K - 1)
    d_neuron_ptr += place.to(tl.int64) * (K - 1) * F
    logits = _load_logits(neuron_ptr + row * neuron_row + neurons, neuron_stride, neurons < F, K)
    if not PER_TOKEN:
        _backward_span(d_hidden_ptr, gate_ptr, up_ptr, token_ptr, d_gate_ptr, d_up_ptr, d_neuron_ptr, d_token_ptr, hidden_ptr,
            d_hidden_stride, gate_stride, up_stride, token_stride, _softmax(logits, K), neurons, first, end, F, K, "weights", WITH_HIDDEN, BLOCK_T, BLOCK_F)
    elif _is_narrow(token_ptr, token_stride, first, end, K, SPAN):
        _backward_span(d_hidden_ptr, gate_ptr, up_ptr, token_ptr, d_gate_ptr, d_up_ptr, d_neuron_ptr, d_token_ptr, hidden_ptr,
            d_hidden_stride, gate_stride, up_stride, token_stride, _exponentials(logits, K), neurons, first, end, F, K, "factors", WITH_HIDDEN, BLOCK_T, BLOCK_F)
    else:
        _backward_span(d_hidden_ptr, gate_ptr, up_ptr, token_ptr, d_gate_ptr, d_up_ptr, d_neuron_ptr, d_token_ptr, hidden_ptr,
            d_hidden_stride, gate_stride, up_stride, token_stride, logits, neurons, first, end, F, K, "logits", WITH_HIDDEN, BLOCK_T, BLOCK_F)


class _Blocks(NamedTuple):
    """Compile-time sizes of both kernels."""

    BLOCK_T: int
    BLOCK_F: int
    SPAN: int
    num_warps: int
    enable_fp_fusion: bool = True


def _blocks(gate: Tensor) -> _Blocks:
    width = 16 // gate.element_size() * 32
    block_f = min(width, triton.next_power_of_2(gate.shape[2]))
    return _Blocks(4, block_f, 256, 4)


def _signature(T: Tensor) -> None: ...


def forward(gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor) -> Tensor:
    """h."""
    rows, columns, d_ff = gate.shape
    hidden = torch.empty_like(gate, memory_format=torch.contiguous_format)
    per_token = token.shape[2] > 1
    logits = neuron if per_token else neuron + token
    blocks = _blocks(gate)
    grid = (rows * triton.cdiv(columns, blocks.SPAN) * triton.cdiv(d_ff, blocks.BLOCK_F),)
    _forward_kernel[grid](
        gate, up, logits, token, hidden, _row_stride(gate), _row_stride(up), logits.stride(0),
        logits.stride(1) if logits.shape[1] > 1 else 0, rows * columns, columns, d_ff,
        K=len(neuron), PER_TOKEN=per_token, **blocks._asdict(),
    )
    return hidden


def _row_stride(x: Tensor) -> int:
    return x.view(-1, x.shape[-1]).stride(0)


def backward(d_hidden, gate, up, neuron, token, with_hidden):
    rows, columns, d_ff = gate.shape
    k = len(neuron)
    per_token = token.shape[2] > 1
    logits = neuron if per_token else neuron + token
    blocks = _blocks(gate)
    spans, f_blocks = triton.cdiv(columns, blocks.SPAN), triton.cdiv(d_ff, blocks.BLOCK_F)
    d_gate, d_up = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    hidden = torch.empty_like(d_gate) if with_hidden else gate.new_empty(0)
    d_neuron = neuron.new_empty(rows, spans, k - 1, d_ff)
    d_token = neuron.new_empty(f_blocks, k - 1, rows, columns) if per_token else neuron.new_empty(0)
    _backward_kernel[(rows * spans * f_blocks,)](
        d_hidden, gate, up, logits, token, d_gate, d_up, d_neuron, d_token, hidden,
        _row_stride(d_hidden), _row_stride(gate), _row_stride(up), logits.stride(0),
        logits.stride(1) if logits.shape[1] > 1 else 0, rows * columns, columns, d_ff,
        K=k, PER_TOKEN=per_token, WITH_HIDDEN=with_hidden, **blocks._asdict(),
    )
    by_row = d_neuron.sum(1).movedim(1, 0)  # [K - 1, B, F]
    d_token = d_token.sum(0) if per_token else by_row.sum(2, keepdim=True)
    d_neuron = by_row if neuron.shape[1] == rows else by_row.sum(1, keepdim=True)
    return d_gate, d_up, _all(d_neuron), _all(d_token), hidden


def _all(first: Tensor) -> Tensor:
    return torch.cat([first, -first.sum(0, keepdim=True)])
