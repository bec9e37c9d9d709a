"""What Triton kernels compute in fp32 registers: activations, their derivatives, softmax. K values are a tuple of K."""

# Triton's language, which has Python's syntax and other types.
# mypy: ignore-errors

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter knows no assembly."""
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_2_PI = tl.constexpr(2.5066282746310002)
LOG2_SQRT_2_PI = tl.constexpr(1.3257480647361593)
ROUNDER = tl.constexpr(1.5 * 2**23)
"""Added and taken away again, it rounds to whole numbers."""


@triton.jit
def hardware(name: tl.constexpr, x):
    """The device's own 1 / x, sin or cos: one instruction or two; Triton's division takes eight, its sine a hundred."""
    if not INTERPRETED:
        y = tl.inline_asm_elementwise(name + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    elif name == "rcp":
        y = 1.0 / x
    elif name == "sin":
        y = tl.sin(x)
    else:
        y = tl.cos(x)
    return y


@triton.jit
def branches(x, K: tl.constexpr):
    """Values and derivatives of the first K of ``ACTIVATIONS``; those that are not used cost nothing.

    exp2 is one instruction, unlike exp, and flushes the tiniest results to zero. An infinite x makes it 0 or infinity,
    which the formulas carry to what PyTorch gives, NaN included.
    """
    dead = x <= 0  # false for NaN
    square = x * x
    values = (tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL),)
    slopes = (tl.where(dead, 0.0, 1.0),)
    if K > 1:
        e = tl.exp2(x * -LOG2_E)
        odd = x * (1.0 + square * (square * 0.12876421 - 0.33324571))  # near 0, where the other form cancels
        tanh = tl.where(square < 0.0625, odd, 2.0 * hardware("rcp", 1.0 + e * e) - 1.0)
        values += (tanh,)
        slopes += (1.0 - tanh * tanh,)
    if K > 2:
        sigmoid = hardware("rcp", 1.0 + e)
        values += (x * sigmoid,)
        slopes += (sigmoid + x * sigmoid * (1.0 - sigmoid),)
    if K > 3:
        density = tl.exp2(square * (-0.5 * LOG2_E) - LOG2_SQRT_2_PI)  # of the normal distribution
        t = hardware("rcp", 1.0 + 0.2316419 * tl.abs(x))  # Abramowitz and Stegun 26.2.17: within 7.5e-8
        series = -0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))
        tail = density * t * (0.319381530 + t * series)
        cumulative = tl.where(dead, tail, 1.0 - tail)
        values += (x * cumulative,)
        slopes += (cumulative + x * density,)
    if K > 4:
        # Within 6.7e-7. Where fp32 numbers are further apart than periods, it is just some value in [-1, 1].
        turns = (x * 0.15915494 + ROUNDER) - ROUNDER
        angle = x - turns * 6.28125 - turns * 1.9353072e-3
        values += (hardware("sin", angle),)
        slopes += (hardware("cos", angle),)
    if K > 5:
        gaussian = (SQRT_2_PI * density) * (SQRT_2_PI * density)
        values += (gaussian,)
        slopes += (-2.0 * x * gaussian,)
    return values, slopes


@triton.jit
def total(values, K: tl.constexpr):
    """Their sum."""
    result = values[0]
    for k in tl.static_range(1, K):
        result += values[k]
    return result


@triton.jit
def weighted_sum(weights, values, K: tl.constexpr):
    """sum_k weights_k values_k."""
    result = weights[0] * values[0]
    for k in tl.static_range(1, K):
        result += weights[k] * values[k]
    return result


@triton.jit
def exponentials(logits, K: tl.constexpr):
    """exp(logit - largest)."""
    largest = logits[0]
    for k in tl.static_range(1, K):
        largest = tl.maximum(largest, logits[k])
    results = ()
    for k in tl.static_range(K):
        results += (tl.exp2((logits[k] - largest) * LOG2_E),)
    return results


@triton.jit
def softmax(logits, K: tl.constexpr):
    """Weights that sum to 1."""
    numerators = exponentials(logits, K)
    inverse = hardware("rcp", total(numerators, K))
    weights = ()
    for k in tl.static_range(K):
        weights += (numerators[k] * inverse,)
    return weights
