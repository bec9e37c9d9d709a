"""Triton kernels of ``triton_mixture``, which has the formulas: tiles of ``BLOCK_T`` tokens by ``BLOCK_F`` neurons.

A program has a block of neurons and goes through a span of a row's tokens, tile by tile.
"""

# Triton's language, which has Python's syntax and other types.
# mypy: ignore-errors

import triton
import triton.language as tl

from polyglu.model.kernels.triton_branches import LOG2_E, branches, exponentials, hardware, softmax, total, weighted_sum

WIDEST = tl.constexpr(32.0)
"""Largest |token_k - token_0| at which exp(z_k) is taken apart. A neuron's largest factor is 1, so the products' sum is
at least e^-32. A factor below e^-87 is lost, which with a token's is at most e^-55: e^-23 of the sum."""


@triton.jit
def _load_logits(pointers, stride, mask, K: tl.constexpr):
    logits = ()
    for k in tl.static_range(K):
        logits += (tl.load(pointers + k * stride, mask=mask, other=0.0),)
    return logits


@triton.jit
def _load(pointer, stride, tokens, neurons, mask):
    return tl.load(pointer + tokens * stride + neurons, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _place(T, F, BLOCK_F: tl.constexpr, SPAN: tl.constexpr):
    """This program's neurons ``[1, BLOCK_F]``, block of neurons, span of tokens, row, and first token and end there."""
    blocks, spans = (F + BLOCK_F - 1) // BLOCK_F, (T + SPAN - 1) // SPAN
    block, span = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row, first = span // spans, span % spans * SPAN
    neurons = block * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return neurons, block.to(tl.int64), span.to(tl.int64), row.to(tl.int64), first, tl.minimum(first + SPAN, T)


@triton.jit
def _separable(token_ptr, token_stride, first, end, K: tl.constexpr, SPAN: tl.constexpr):
    """Whether exp(neuron + token logit) may be taken apart for all of a program's tokens."""
    tokens = first + tl.arange(0, SPAN)
    token = _load_logits(token_ptr + tokens, token_stride, tokens < end, K)
    distance = tl.abs(token[K - 1] - token[0])
    for k in tl.static_range(1, K - 1):
        distance = tl.maximum(distance, tl.abs(token[k] - token[0]))
    return tl.max(distance, 0) <= WIDEST


@triton.jit
def _weights(neuron, token_ptr, token_stride, tokens, end, K: tl.constexpr, FORM: tl.constexpr):
    """Weights of a tile up to a common factor, and that factor.

    Args:
        neuron: K times ``[1, BLOCK_F]``, made once a program: what ``FORM`` says.
        token_ptr: logits of the row's first token.
        token_stride: from one activation's logits to the next.
        tokens: ``[BLOCK_T, 1]``, positions in the row.
        end: of the tokens.
        K: number of activations.
        FORM: "weights", the result itself, as tokens have no say; "factors", exponentials; "logits", where exponentials
            cannot be taken apart.
    """
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
            weights = exponentials(logits, K)
        inverse = hardware("rcp", total(weights, K))
    return weights, inverse


@triton.jit
def _forward_tiles(
    pointers, strides, neuron, neurons, first, end, K: tl.constexpr, FORM: tl.constexpr, BLOCK_T: tl.constexpr
):
    gate_ptr, up_ptr, token_ptr, hidden_ptr = pointers
    gate_stride, up_stride, token_stride, F = strides
    for start in range(first, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
        mask = (tokens < end) & (neurons < F)
        x = _load(gate_ptr, gate_stride, tokens, neurons, mask)
        up = _load(up_ptr, up_stride, tokens, neurons, mask)
        weights, inverse = _weights(neuron, token_ptr, token_stride, tokens, end, K, FORM)
        values = branches(x, K)[0]
        hidden = weighted_sum(weights, values, K) * (inverse * up)
        tl.store(hidden_ptr + tokens * F + neurons, hidden, mask=mask)


@triton.jit(do_not_specialize=["T", "token_stride"])
def forward_kernel(
    gate_ptr,
    up_ptr,
    neuron_ptr,
    token_ptr,
    hidden_ptr,
    gate_stride,
    up_stride,
    neuron_stride,
    neuron_row,
    token_stride,
    T,
    F,
    K: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Hidden layer of one block of neurons and one span of tokens."""
    neurons, _, _, row, first, end = _place(T, F, BLOCK_F, SPAN)
    token_ptr += row * T
    pointers = gate_ptr + row * T * gate_stride, up_ptr + row * T * up_stride, token_ptr, hidden_ptr + row * T * F
    strides = gate_stride, up_stride, token_stride, F
    logits = _load_logits(neuron_ptr + row * neuron_row + neurons, neuron_stride, neurons < F, K)
    if not PER_TOKEN:
        _forward_tiles(pointers, strides, softmax(logits, K), neurons, first, end, K, "weights", BLOCK_T)
    elif _separable(token_ptr, token_stride, first, end, K, SPAN):
        _forward_tiles(pointers, strides, exponentials(logits, K), neurons, first, end, K, "factors", BLOCK_T)
    else:
        _forward_tiles(pointers, strides, logits, neurons, first, end, K, "logits", BLOCK_T)


@triton.jit
def _backward_tiles(
    pointers,
    strides,
    neuron,
    neurons,
    first,
    end,
    K: tl.constexpr,
    FORM: tl.constexpr,
    WITH_HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    d_hidden_ptr, gate_ptr, up_ptr, token_ptr, d_gate_ptr, d_up_ptr, d_neuron_ptr, d_token_ptr, hidden_ptr = pointers
    d_hidden_stride, gate_stride, up_stride, token_stride, F = strides
    sums = (tl.full([BLOCK_T, neurons.shape[1]], 0.0, tl.float32),) * (K - 1)
    lanes = tl.arange(0, 32)[None, :]
    for start in range(first, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
        mask = (tokens < end) & (neurons < F)
        x = _load(gate_ptr, gate_stride, tokens, neurons, mask)
        up = _load(up_ptr, up_stride, tokens, neurons, mask)
        d_hidden = _load(d_hidden_ptr, d_hidden_stride, tokens, neurons, mask)
        weights, inverse = _weights(neuron, token_ptr, token_stride, tokens, end, K, FORM)
        values, slopes = branches(x, K)
        mixed = weighted_sum(weights, values, K) * inverse
        d_mixed = d_hidden * up * inverse  # with the factor that the weights lack
        if WITH_HIDDEN:
            tl.store(hidden_ptr + tokens * F + neurons, mixed * up, mask=mask)
        tl.store(d_up_ptr + tokens * F + neurons, d_hidden * mixed, mask=mask)
        tl.store(d_gate_ptr + tokens * F + neurons, d_mixed * weighted_sum(weights, slopes, K), mask=mask)
        # A warp has one token of the tile, and its lane k that token's gradient k: no exchange among warps, one store.
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


@triton.jit(do_not_specialize=["T", "token_stride"])
def backward_kernel(
    d_hidden_ptr,
    gate_ptr,
    up_ptr,
    neuron_ptr,
    token_ptr,
    d_gate_ptr,
    d_up_ptr,
    d_neuron_ptr,
    d_token_ptr,
    hidden_ptr,
    d_hidden_stride,
    gate_stride,
    up_stride,
    neuron_stride,
    neuron_row,
    token_stride,
    T,
    F,
    K: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    WITH_HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Gradients of one block of neurons and one span of tokens, those of the logits in parts to be summed."""
    neurons, block, span, row, first, end = _place(T, F, BLOCK_F, SPAN)
    start = row * T
    token_ptr += start
    inputs = (
        d_hidden_ptr + start * d_hidden_stride,
        gate_ptr + start * gate_stride,
        up_ptr + start * up_stride,
        token_ptr,
    )
    d_neuron_ptr += span * (K - 1) * F
    d_token_ptr += (block * token_stride + start) * (K - 1)
    outputs = d_gate_ptr + start * F, d_up_ptr + start * F, d_neuron_ptr, d_token_ptr, hidden_ptr + start * F
    pointers = inputs + outputs
    strides = d_hidden_stride, gate_stride, up_stride, token_stride, F
    logits = _load_logits(neuron_ptr + row * neuron_row + neurons, neuron_stride, neurons < F, K)
    if not PER_TOKEN:
        neuron = softmax(logits, K)
        _backward_tiles(pointers, strides, neuron, neurons, first, end, K, "weights", WITH_HIDDEN, BLOCK_T)
    elif _separable(token_ptr, token_stride, first, end, K, SPAN):
        neuron = exponentials(logits, K)
        _backward_tiles(pointers, strides, neuron, neurons, first, end, K, "factors", WITH_HIDDEN, BLOCK_T)
    else:
        _backward_tiles(pointers, strides, logits, neurons, first, end, K, "logits", WITH_HIDDEN, BLOCK_T)
