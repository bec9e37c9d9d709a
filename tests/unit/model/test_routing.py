"""Entropy as a part of the objective: value, gradient and memory; routing stays fp32 under bf16 autocast."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyglu.model import feed_forward, routing
from polyglu.model.config import KernelName, ModelConfig
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.kernels import entropy as kernel
from polyglu.model.model import create_model
from polyglu.model.packing import Packing
from polyglu.model.routing import (
    dynamic_entropy,
    gated_mixture,
    gumbel_noise,
    static_entropy,
    summed_entropy,
)

SMALL = ModelConfig(
    vocab_size=37, d_model=16, d_ff=24, n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=8, seq_length=32,
    routing_scope="causal",
)  # fmt: skip
OFFSET = 256.0
"""Added to all logits it changes no softmax; bf16 cannot tell 256 from 257."""


def logits(
    rows: int, positions: int, d_ff: int, k: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Alpha ``[F, K]`` and token logits ``[B, S, K]`` that want gradients."""
    generator = torch.Generator().manual_seed(rows * 1000 + positions * 100 + d_ff * 10 + k)
    shapes = ((d_ff, k), (rows, positions, k))
    alpha, token = ((torch.randn(shape, generator=generator, dtype=dtype) * scale).requires_grad_() for shape in shapes)
    return alpha, token


def some_positions(rows: int, columns: int) -> Tensor:
    """Bool ``[B, T]``, about two of three."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(columns)) < 0.66


def naive(alpha: Tensor, token: Tensor, counted: Tensor, stride: int) -> Tensor:
    """The definition: each counted position takes the entropy of the nearest looked-at position before it."""
    log_p = F.log_softmax(alpha + token[:, :, None], dim=-1)  # [B, S, F, K]
    entropy = -(log_p.exp() * log_p).sum(-1).mean(-1)  # [B, S]
    if token.shape[1] == 1:
        return (entropy * counted.sum(1, keepdim=True)).sum()
    looked_at = torch.arange(counted.shape[1]) // stride * stride
    return (entropy[:, looked_at] * counted).sum()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 23), st.integers(1, 19), st.integers(1, 6)),
    per_token=st.booleans(),
    looked_at=st.sampled_from([1, 2, 5, 64]),
    elements=st.sampled_from([1, 50, 300, 2**20]),
)
def test_value_and_gradient_are_those_of_the_definition(
    shape: tuple[int, int, int, int], per_token: bool, looked_at: int, elements: int
) -> None:
    rows, columns, d_ff, k = shape
    alpha, token = logits(rows, columns if per_token else 1, d_ff, k)
    counted = some_positions(rows, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "ELEMENTS_AT_ONCE", elements)
        patch.setattr(routing, "ENTROPY_POSITIONS", looked_at)
        actual = summed_entropy(alpha, token, counted)
    expected = naive(alpha, token, counted, stride=math.ceil(columns / looked_at))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.tensor(-0.37)  # as a weighted penalty passes it down
    gradients = (torch.autograd.grad(value, (alpha, token), upstream) for value in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("positions", [1, 5])
def test_gradient_is_the_derivative(k: int, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "ELEMENTS_AT_ONCE", 2 * 3 * k)
    alpha, token = logits(2, positions, 3, k, scale=2.0, dtype=torch.float64)
    counted = torch.tensor([[True, False, True, True, False], [True] * 5])
    assert torch.autograd.gradcheck(lambda *both: summed_entropy(*both, counted), (alpha, token))


@pytest.mark.parametrize("scale", [30.0, 1e4, 1e30, 3e37])
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_extreme_logits_give_finite_gradients(scale: float, k: int) -> None:
    alpha, token = logits(2, 7, 11, k, scale)
    with torch.no_grad():
        token[0, 3] = 0.0
        alpha[5] = 0.0  # one neuron at one position: all alike among the decided
    total = summed_entropy(alpha, token, torch.ones(2, 7, dtype=torch.bool))
    assert 0 <= total.item() <= 14 * math.log(k) + 1e-4
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(total, (alpha, token)))


def test_a_step_along_the_gradient_raises_entropy() -> None:
    alpha, token = logits(1, 4, 5, 4, scale=2.0)
    counted = torch.ones(1, 4, dtype=torch.bool)
    total = summed_entropy(alpha, token, counted)
    d_alpha, d_token = torch.autograd.grad(total, (alpha, token))
    assert summed_entropy(alpha + 0.1 * d_alpha, token, counted) > total
    assert summed_entropy(alpha, token + 0.1 * d_token, counted) > total


@pytest.mark.parametrize("positions", [1, 40])
def test_it_is_the_logged_entropy(positions: int) -> None:
    """What is regularised is what is watched: while all positions are looked at, the mean is the same number."""
    alpha, token = logits(3, positions, 9, 4)
    total = summed_entropy(alpha, token, torch.ones(3, 40, dtype=torch.bool))
    torch.testing.assert_close(total / 120, dynamic_entropy(alpha, token))


@pytest.mark.parametrize("positions", [1, 150])
def test_rows_add_up_however_they_are_batched(positions: int) -> None:
    alpha, token = logits(4, positions, 6, 3)
    counted = some_positions(4, 150)
    whole = summed_entropy(alpha, token, counted)
    rows = [summed_entropy(alpha, token[row : row + 1], counted[row : row + 1]) for row in range(4)]
    torch.testing.assert_close(torch.stack(rows).sum(), whole)


def test_nothing_counted_is_nothing() -> None:
    alpha, token = logits(2, 8, 5, 4)
    total = summed_entropy(alpha, token, torch.zeros(2, 8, dtype=torch.bool))
    assert total.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, (alpha, token)))


def test_only_tensors_of_the_size_of_the_logits_are_kept() -> None:
    alpha, token = logits(2, 50, 30, 4)
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        summed_entropy(alpha, token, torch.ones(2, 50, dtype=torch.bool)).backward()  # type: ignore[no-untyped-call]
    assert kept and max(kept) <= max(alpha.numel(), token.numel())


def test_second_derivatives_of_the_entropy_are_refused() -> None:
    alpha, token = logits(1, 3, 4, 4)
    total = summed_entropy(alpha, token, torch.ones(1, 3, dtype=torch.bool))
    (first,) = torch.autograd.grad(total.square(), alpha, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kernel", ["native", "chunked", "reference"])
def test_mixture_weighs_in_fp32_for_a_bf16_gate(kernel: KernelName) -> None:
    """A constant added to all logits cancels in fp32; rounded to bf16, logits around 256 would all be alike."""
    alpha, token = logits(2, 9, 13, 4)
    gate = torch.randn(2, 9, 13).bfloat16()

    def mixture(alpha: Tensor) -> Tensor:
        return gated_mixture(gate, torch.ones_like(gate), alpha, token, 0.5, kernel)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        near, far = (mixture(alpha[None] + offset) for offset in (0.0, OFFSET))
        rounded = mixture((alpha[None] + OFFSET).bfloat16().float())
    torch.testing.assert_close(far, near, rtol=8e-3, atol=1e-3)  # one step of the output's bf16
    assert (rounded - near).abs().max() > 0.05


def test_entropies_are_fp32_under_bf16_autocast() -> None:
    alpha, token = logits(2, 9, 13, 4)
    counted = torch.ones(2, 9, dtype=torch.bool)

    def entropies(alpha: Tensor) -> list[Tensor]:
        return [static_entropy(alpha).mean(), dynamic_entropy(alpha, token), summed_entropy(alpha, token, counted) / 18]

    plain = entropies(alpha)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shifted, rounded = entropies(alpha + OFFSET), entropies((alpha + OFFSET).bfloat16())
    for expected, actual, coarse in zip(plain, shifted, rounded, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)
        assert abs(coarse - expected) > 1e-2


def test_gumbel_noise_is_fp32_and_finite_under_bf16_autocast() -> None:
    """In bf16 the nearest number below 1 is 0.996: uniform numbers round to 1, and the noise becomes infinite."""
    arguments = (3, torch.arange(8), 2, 256, 4)
    expected = gumbel_noise(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        noise = gumbel_noise(*arguments)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, expected)
    assert torch.isfinite(noise).all()
    uniform = torch.exp(-torch.exp(-noise))
    assert torch.isinf(-torch.log(-torch.log(uniform.bfloat16()))).any()


def test_model_routes_in_fp32_under_bf16_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every logit that reaches the mixture and the log is fp32, and 256 added to alpha moves no feature."""
    seen = []

    def watched(gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor, tau: float, kernel: KernelName) -> Tensor:
        seen.append((gate.dtype, neuron.dtype, token.dtype))
        return gated_mixture(gate, up, neuron, token, tau, kernel)

    monkeypatch.setattr(feed_forward, "gated_mixture", watched)
    model, ids = create_model(SMALL), torch.randint(37, (2, 20))
    noise = gumbel_noise(0, torch.arange(2), 2, SMALL.d_ff, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        near, token_logits = model.features(ids, tau=0.3, gumbel=noise)
        for layer in model.layers:
            assert isinstance(layer.mlp, PolyGLU)
            layer.mlp.alpha += OFFSET
        far, _ = model.features(ids, tau=0.3, gumbel=noise)
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)] * 4
    assert all(logits.dtype == torch.float32 for logits in token_logits)
    torch.testing.assert_close(far, near, rtol=0, atol=0.02)


def test_router_is_fp32_after_its_first_product() -> None:
    """Under bf16 autocast pooling, hidden units and logits lose nothing more; a bf16 ``out`` would be 0.4% coarse."""
    layer, x = PolyGLU(16, 24), torch.randn(2, 20, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer.token_logits(x, Packing.of(x.shape[:2], None, x.device))
        projected = F.linear(x, layer.router.hidden.weight)
    assert projected.dtype == torch.bfloat16
    means = projected.double().cumsum(1) / torch.arange(1, 21)[:, None]
    out = layer.router.out
    expected = F.relu(means + layer.router.hidden.bias) @ out.weight.double().T + out.bias
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
