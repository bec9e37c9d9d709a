"""RMSNorm's kernel on the CPU is the reference: same results and gradients, rotated or not, whatever the shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyglu.model.architecture import KernelRMSNorm
from polyglu.model.config import KernelName
from polyglu.model.kernels import norm
from polyglu.model.kernels.norm import norm_serves, rms_norm_op
from polyglu.model.layers import Rope


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel serves small inputs too."""
    monkeypatch.setattr(norm, "LEAST", 0)


def angles(*shape: int) -> Rope:
    angle = torch.rand(*shape, generator=torch.Generator().manual_seed(2)) * 6
    return angle.cos(), angle.sin()


def results(kernels: KernelName, x: Tensor, rope: Rope | None, autocast: bool = False) -> list[Tensor]:
    """Output and gradients of input and weight."""
    layer = KernelRMSNorm(x.shape[-1], 1e-6, kernels)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x, rope)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.weight), grad)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3), columns=st.sampled_from([1, 2, 7, 300]), heads=st.integers(1, 4),
    half=st.integers(1, 40), rotated=st.booleans(), scale=st.sampled_from([1e-4, 1.0, 1e4]),
)  # fmt: skip
def test_any_shape(rows: int, columns: int, heads: int, half: int, rotated: bool, scale: float) -> None:
    """Vectors that a row does not fill, and more rows than a task has."""
    x = scale * torch.randn(rows, columns, heads, 2 * half, generator=torch.Generator().manual_seed(half))
    rope = angles(rows, columns, 1, half) if rotated else None
    ours, theirs = (results(kernels, x, rope) for kernels in ("native", "reference"))
    for actual, expected in zip(ours, theirs, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=3e-6 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [True, False])
def test_bf16(dtype: torch.dtype, rotated: bool) -> None:
    """What autocast gives: one rounding of the exact result, each way."""
    x = torch.randn(2, 50, 3, 24).to(dtype)
    rope = angles(2, 50, 1, 12) if rotated else None
    ours, theirs = (results(kernels, x, rope, autocast=True) for kernels in ("native", "reference"))
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-2, atol=1e-2)


def test_odd_width_without_rotation() -> None:
    x = torch.randn(5, 33)
    for actual, expected in zip(results("native", x, None), results("reference", x, None), strict=True):
        torch.testing.assert_close(actual, expected)


def test_layouts_that_are_not_dense() -> None:
    x = torch.randn(4, 12, 6, 16).transpose(1, 2)[:, ::2]
    for actual, expected in zip(results("native", x, None), results("reference", x, None), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_row_of_zeros_and_numbers_that_are_not_finite() -> None:
    x = torch.randn(4, 8)
    x[1], x[2, 3], x[3, 0] = 0, float("nan"), float("inf")
    for actual, expected in zip(results("native", x, None), results("reference", x, None), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_threads_do_not_change_a_bit() -> None:
    x, rope, before = torch.randn(2, 700, 2, 32), angles(2, 700, 1, 16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results("native", x, rope)
        torch.set_num_threads(3)
        assert all(map(torch.equal, one, results("native", x, rope)))
    finally:
        torch.set_num_threads(before)


def test_the_operator_is_registered_as_pytorch_expects() -> None:
    x, weight = torch.randn(2, 3, 2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    torch.library.opcheck(rms_norm_op, (x, weight, 1e-6, None, None, torch.float32))
    torch.library.opcheck(rms_norm_op, (x, weight, 1e-6, *angles(2, 3, 1, 4), torch.bfloat16))


def test_what_the_kernel_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 8), torch.ones(8)
    assert norm_serves(x, weight) and norm_serves(x.bfloat16(), weight)
    assert not norm_serves(x.double(), weight) and not norm_serves(x, weight.double())
    assert not norm_serves(x.to("meta"), weight)
    monkeypatch.setattr(norm, "LEAST", 33)
    assert not norm_serves(x, weight)
    monkeypatch.setattr(norm, "LEAST", 0)
    monkeypatch.setattr(norm, "load_library", lambda name: None)  # no compiler
    assert not norm_serves(x, weight)
