"""The chunked mixture on the CPU is the reference: same results, same gradients, whatever the shape and the values."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyglu.model.kernels import cpu
from polyglu.model.routing import mix_activations, mix_reference

FP32 = {"rtol": 1e-5, "atol": 1e-5}


def inputs(
    rows: int, columns: int, d_ff: int, k: int, *, per_row: bool, per_token: bool, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Gate, neuron logits and token logits."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns * 100 + d_ff * 10 + k)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    return [random(rows, columns, d_ff), random(rows if per_row else 1, d_ff, k), random(rows, columns**per_token, k)]


def results(mixture: object, tensors: Sequence[Tensor], tau: float) -> tuple[Tensor, ...]:
    """Output, then the gradient of each input that wants one, for the same random gradient of the output."""
    output = mixture(*tensors, tau)  # type: ignore[operator]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(output.dtype)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return output.detach(), *torch.autograd.grad(output, wanted, grad)


def assert_equal_to_reference(tensors: Sequence[Tensor], tau: float, **tolerance: float) -> None:
    actual, expected = (results(mixture, tensors, tau) for mixture in (mix_activations, mix_reference))
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 19), st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    per_row=st.booleans(),
    per_token=st.booleans(),
    tau=st.sampled_from([0.1, 0.7, 1.0]),
    elements=st.sampled_from([1, 7, 40, 2**16]),
)
def test_any_shape_in_any_chunks(
    shape: tuple[int, int, int, int], per_row: bool, per_token: bool, tau: float, elements: int
) -> None:
    """Chunks of a single token (elements < F), ones that do not divide T, and one for the whole row."""
    before, cpu.ELEMENTS_AT_ONCE = cpu.ELEMENTS_AT_ONCE, elements
    try:
        assert_equal_to_reference(inputs(*shape, per_row=per_row, per_token=per_token), tau, **FP32)
    finally:
        cpu.ELEMENTS_AT_ONCE = before


@pytest.mark.parametrize(
    ("rows", "columns", "d_ff"),
    [(1, 1, 1), (2, 1, cpu.ELEMENTS_AT_ONCE + 3), (1, 3, cpu.ELEMENTS_AT_ONCE // 2), (2, 173, 384)],
    ids=["one element", "more neurons than a chunk holds", "two tokens a chunk", "demo's width, odd length"],
)
@pytest.mark.parametrize("per_token", [False, True])
def test_shapes_around_the_chunk_size(rows: int, columns: int, d_ff: int, per_token: bool) -> None:
    tensors = inputs(rows, columns, d_ff, 4, per_row=True, per_token=per_token)
    assert_equal_to_reference(tensors, 0.5, rtol=1e-4, atol=1e-4 * math.sqrt(d_ff / 384 + 1))


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize(("per_row", "per_token"), [(False, False), (True, False), (False, True), (True, True)])
def test_gradients_are_the_derivatives(k: int, per_row: bool, per_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ELEMENTS_AT_ONCE", 6)
    tensors = inputs(2, 3, 3, k, per_row=per_row, per_token=per_token, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: mix_activations(*args, 0.6), tensors)


@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("per_token", [False, True])
def test_bf16_gate_loses_no_more_than_its_rounding(k: int, per_token: bool) -> None:
    """The chunked path computes in fp32 and rounds once; the reference rounds each branch to bf16."""
    tensors = inputs(2, 37, 48, k, per_row=True, per_token=per_token)
    exact = [tensor.detach().bfloat16().float() if index == 0 else tensor for index, tensor in enumerate(tensors)]
    exact[0].requires_grad_()
    half = [exact[0].detach().bfloat16().requires_grad_(), *tensors[1:]]
    true = results(mix_reference, exact, 0.3)
    ours, reference = (results(mixture, half, 0.3) for mixture in (mix_activations, mix_reference))
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for name, a, b, c in zip(("output", "gate", "neuron", "token"), ours, reference, true, strict=True):
        error, reference_error = (float((x.float() - c).norm() / (c.norm() + 1e-12)) for x in (a, b))
        assert error < 4e-3, name  # half a unit of bf16's last place is 2^-9, and the gradient comes in bf16
        assert error <= max(reference_error * 1.01, 1e-6), name


@pytest.mark.parametrize("scale", [30.0, 300.0, 3e4])
@pytest.mark.parametrize("per_token", [False, True])
def test_extreme_logits_at_low_temperature(scale: float, per_token: bool) -> None:
    gate, neuron, token = inputs(2, 11, 13, 4, per_row=True, per_token=per_token)
    tensors = [gate, (neuron * scale).detach().requires_grad_(), (token * scale).detach().requires_grad_()]
    assert all(torch.isfinite(tensor).all() for tensor in results(mix_activations, tensors, 0.1))
    assert_equal_to_reference(tensors, 0.1, **FP32)


def test_a_neuron_with_one_choice_left_is_that_activation() -> None:
    gate = torch.linspace(-4, 4, 21).view(1, 21, 1).requires_grad_()
    for index, activation in enumerate(cpu.ACTIVATIONS):
        neuron = torch.full((1, 1, 6), -1e4)
        neuron[..., index] = 1e4
        mixed = mix_activations(gate, neuron, torch.zeros(1, 1, 6), 0.1)
        torch.testing.assert_close(mixed, activation.function(gate))
        slope = torch.autograd.grad(activation.function(gate).sum(), gate)
        torch.testing.assert_close(torch.autograd.grad(mixed.sum(), gate), slope)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, 90.0, -90.0, 1e30, -1e30, 1e38, -1e38])
def test_finite_extremes_of_the_gate(value: float) -> None:
    gate, neuron, token = inputs(1, 5, 17, 4, per_row=False, per_token=True)
    gate = torch.full_like(gate, value).requires_grad_()
    # Gradients of the logits are sums of such values that cancel: what is left of them is rounding.
    frozen = (gate, neuron.detach(), token.detach())
    assert all(torch.isfinite(tensor).all() for tensor in results(mix_activations, frozen, 0.5))
    assert_equal_to_reference(frozen, 0.5, **FP32)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_gate_shows_and_stays_where_it_is(value: float) -> None:
    """An overflow is not hidden: SiLU and GELU take inf * 0, so the reference gives NaN (or inf) there, as do we."""
    gate, neuron, token = inputs(1, 5, 17, 4, per_row=False, per_token=True)
    with torch.no_grad():
        gate[0, 2, 3] = value
    others = torch.ones_like(gate, dtype=torch.bool)
    others[0, 2, 3] = False
    frozen = (gate, neuron.detach(), token.detach())
    for ours, theirs in zip(
        *(results(mixture, frozen, 0.5) for mixture in (mix_activations, mix_reference)), strict=True
    ):
        assert torch.isfinite(ours[others]).all()
        torch.testing.assert_close(ours[others], theirs[others], **FP32)
        assert torch.isfinite(ours[0, 2, 3]) == torch.isfinite(theirs[0, 2, 3])
    assert not torch.isfinite(mix_activations(*frozen, 0.5)[0, 2, 3])


def test_negative_zero_stays_a_zero() -> None:
    gate, neuron, token = torch.tensor([[[-0.0, 0.0]]]), torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)
    assert mix_activations(gate, neuron, token, 0.1).tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize("layout", ["transposed", "slice", "expanded"])
def test_gate_need_not_be_contiguous(layout: str) -> None:
    gate, neuron, token = inputs(2, 6, 6, 4, per_row=True, per_token=True)
    with torch.no_grad():
        views = {"transposed": gate.mT, "slice": gate[:, ::2, 1:5], "expanded": gate[:, :1].expand(-1, 6, -1)}
    view = views[layout].detach().requires_grad_()
    assert not view.is_contiguous()
    columns, d_ff = view.shape[1:]
    tensors = [view, *(tensor.detach().requires_grad_() for tensor in (neuron[:, :d_ff], token[:, :columns]))]
    assert_equal_to_reference(tensors, 0.5, **FP32)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1)])
def test_inputs_that_need_no_gradient(frozen: tuple[int, ...]) -> None:
    tensors = inputs(2, 5, 7, 4, per_row=False, per_token=True)
    for index in frozen:
        tensors[index].requires_grad_(False)
    assert_equal_to_reference(tensors, 0.5, **FP32)


def test_inputs_are_left_as_they_were() -> None:
    tensors = inputs(2, 5, 7, 6, per_row=True, per_token=True)
    before = [tensor.detach().clone() for tensor in tensors]
    results(mix_activations, tensors, 0.5)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


def test_no_graph_is_kept_under_no_grad() -> None:
    tensors = inputs(1, 4, 5, 4, per_row=False, per_token=True)
    with torch.no_grad():
        mixed = mix_activations(*tensors, 0.5)
    assert mixed.grad_fn is None
    torch.testing.assert_close(mixed, mix_reference(*tensors, 0.5).detach(), **FP32)


def test_second_derivatives_are_refused() -> None:
    """A backward written by hand must not give a wrong second derivative in silence."""
    tensors = inputs(1, 2, 3, 4, per_row=True, per_token=True)
    (first,) = torch.autograd.grad(mix_activations(*tensors, 0.6).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
