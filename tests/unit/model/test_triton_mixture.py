"""The fused Triton kernels are the reference, run by Triton's interpreter on the CPU; and they compile for a GPU.

A function is interpreted or compiled according to ``TRITON_INTERPRET`` when it is decorated. So the kernels under test
are copies of their own, imported while that is set, and nothing else in the process sees them. Triton itself may have
been imported before: of its own decorated functions the kernels use two, which are swapped for the module's tests.
"""

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from polyglu.model.activations import ACTIVATIONS  # noqa: E402

MODULES = [f"polyglu.model.kernels.triton_{name}" for name in ("branches", "kernels", "mixture")]
NAMES = ("hidden", "gate", "up", "neuron", "token")


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    package = importlib.import_module("polyglu.model.kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in MODULES:
            patch.setitem(sys.modules, name, ModuleType(name))  # so that what was there comes back, or nothing
            patch.setattr(package, name.rpartition(".")[2], None, raising=False)
            del sys.modules[name]
        for name in ("sum", "max"):
            patch.setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))
        with np.errstate(all="ignore"):
            yield importlib.import_module(MODULES[-1])


def inputs(
    rows: int,
    columns: int,
    d_ff: int,
    k: int,
    *,
    per_row: bool = True,
    per_token: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Gradient of the output, gate, up, neuron logits and token logits."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns * 100 + d_ff * 10 + k)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tiles = [random(rows, columns, d_ff).to(dtype) for _ in range(3)]
    return [*tiles, random(k, rows if per_row else 1, d_ff), random(k, rows, columns if per_token else 1)]


def reference(d_hidden: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Output and gradients in fp64."""
    gate, up, neuron, token = (tensor.double().requires_grad_() for tensor in tensors)
    weights = torch.softmax(neuron[:, :, None, :] + token[:, :, :, None], dim=0)
    branches = torch.stack([activation.function(gate) for activation in ACTIVATIONS[: len(neuron)]])
    hidden = (weights * branches).sum(0) * up
    return [hidden.detach(), *torch.autograd.grad(hidden, [gate, up, neuron, token], d_hidden.double())]


def results(kernels: ModuleType, tensors: list[Tensor]) -> list[Tensor]:
    *gradients, again = kernels.backward(*tensors, True)
    hidden = kernels.forward(*tensors[1:])
    torch.testing.assert_close(
        again, hidden, rtol=1e-6 if hidden.dtype == torch.float32 else 8e-3, atol=1e-7, equal_nan=True
    )
    return [hidden, *gradients]


def assert_equal_to_reference(kernels: ModuleType, tensors: list[Tensor], tolerance: float = 1e-5) -> None:
    """Errors relative to a tensor's largest value; bf16 results may be a unit off, as the interpreter cuts off."""
    for name, ours, theirs in zip(NAMES, results(kernels, tensors), reference(*tensors), strict=True):
        assert ours.shape == theirs.shape and ours.is_contiguous(), name
        unit = 2**-7 if ours.dtype == torch.bfloat16 else 0.0
        error = (ours.double() - theirs).abs() - unit * theirs.abs()
        assert float(error.max()) <= tolerance * float(theirs.abs().max().clamp(min=0.1)), name


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize(("per_row", "per_token"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_number_of_activations(kernels: ModuleType, k: int, per_row: bool, per_token: bool) -> None:
    assert_equal_to_reference(kernels, inputs(2, 5, 17, k, per_row=per_row, per_token=per_token))


@pytest.mark.parametrize(
    ("rows", "columns", "d_ff"), [(1, 1, 1), (3, 1, 130), (1, 9, 1), (2, 33, 33), (1, 67, 130), (1, 2, 260)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shapes_that_fill_no_tile(kernels: ModuleType, rows: int, columns: int, d_ff: int, dtype: torch.dtype) -> None:
    """Two or three spans of tokens and blocks of neurons, the last of them with little in it."""
    assert_equal_to_reference(kernels, inputs(rows, columns, d_ff, 4, dtype=dtype))


@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("per_token", [False, True])
def test_bf16_is_rounded_once(kernels: ModuleType, k: int, per_token: bool) -> None:
    tensors = inputs(2, 7, 40, k, per_token=per_token, dtype=torch.bfloat16)
    ours = results(kernels, tensors)
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert_equal_to_reference(kernels, tensors)


@pytest.mark.parametrize(("neuron_scale", "token_scale"), [(300, 5), (3e4, 5), (5, 300), (300, 300), (3e4, 3e4)])
@pytest.mark.parametrize("per_token", [False, True])
def test_extreme_logits(kernels: ModuleType, neuron_scale: float, token_scale: float, per_token: bool) -> None:
    """Tokens close together are taken apart from their neurons, tokens far from each other are not."""
    d_hidden, gate, up, neuron, token = inputs(2, 6, 17, 4, per_token=per_token)
    tensors = [d_hidden, gate, up, neuron * neuron_scale, token * token_scale]
    assert all(torch.isfinite(tensor).all() for tensor in results(kernels, tensors))
    # A logit of 1e5 has no more than two digits after the point; then neighbours differ in weight.
    assert_equal_to_reference(kernels, tensors, 1e-5 if neuron_scale + token_scale < 1e4 else 2e-3)


def test_spans_of_both_kinds_in_one_call(kernels: ModuleType) -> None:
    d_hidden, gate, up, neuron, token = inputs(2, 67, 5, 4)
    token[:, 0, 40] *= 200
    token[:, 1, :30] *= 200
    assert_equal_to_reference(kernels, [d_hidden, gate, up, neuron * 3, token])


@pytest.mark.parametrize("distance", [31.9, 32.1])
def test_factors_at_their_limit(kernels: ModuleType, distance: float) -> None:
    """Neurons that would undo what the token prefers."""
    d_hidden, gate, up, neuron, token = inputs(1, 2, 9, 3)
    token[:] = torch.tensor([0, -distance, distance])[:, None, None]
    neuron[:] = torch.stack([torch.linspace(-90, 0, 9), torch.linspace(0, 10, 9), torch.linspace(-90, -50, 9)])[:, None]
    assert_equal_to_reference(kernels, [d_hidden, gate, up, neuron, token])


def test_shared_logit_offsets_do_not_matter(kernels: ModuleType) -> None:
    d_hidden, gate, up, neuron, token = inputs(1, 5, 9, 4)
    moved = [d_hidden, gate, up, neuron + 4096, token - 8192]
    for ours, theirs in zip(results(kernels, moved), reference(*moved), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("k", range(1, 7))
def test_each_activation_alone_over_the_range(kernels: ModuleType, k: int) -> None:
    """Values and slopes for one-hot weights; near 0 tanh keeps its relative accuracy."""
    points = torch.cat([torch.linspace(-12, 12, 301), torch.logspace(-30, 0, 31), -torch.logspace(-30, 0, 31)])
    gate = points.view(1, 1, -1)
    neuron = torch.full((k, 1, gate.shape[2]), -1e4)
    neuron[-1] = 0
    tensors = [torch.ones_like(gate), gate, torch.ones_like(gate), neuron, torch.zeros(k, 1, 1)]
    hidden, slope = results(kernels, tensors)[:2]
    true_hidden, true_slope = reference(*tensors)[:2]
    torch.testing.assert_close(hidden.double(), true_hidden, rtol=2e-6 if k <= 4 else 1e-6, atol=3e-7 if k > 2 else 0)
    torch.testing.assert_close(slope.double(), true_slope, rtol=2e-6, atol=6e-7)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, 90.0, -90.0, 1e30, -1e30, 1e38, -1e38])
def test_finite_extremes_of_the_gate(kernels: ModuleType, value: float) -> None:
    d_hidden, gate, up, neuron, token = inputs(1, 5, 9, 4)
    tensors = [d_hidden, torch.full_like(gate, value), up, neuron, token]
    ours = results(kernels, tensors)
    assert all(torch.isfinite(tensor).all() for tensor in ours[:3])
    for mine, theirs in zip(ours[:3], reference(*tensors)[:3], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("per_token", [False, True])
def test_infinite_gate_shows_and_stays_where_it_is(kernels: ModuleType, value: float, k: int, per_token: bool) -> None:
    tensors = inputs(1, 5, 9, k, per_token=per_token)
    tensors[1][0, 2, 3] = value
    for ours, theirs in zip(results(kernels, tensors)[:3], reference(*tensors)[:3], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6, equal_nan=True)
    ours, theirs = results(kernels, tensors)[3], reference(*tensors)[3]
    if k == 1:  # nothing to choose from: zero, without a look at the gate
        theirs = torch.zeros_like(theirs)
    assert torch.isfinite(ours[:, :, :3]).all() and torch.isfinite(ours[:, :, 4:]).all()
    assert torch.isfinite(ours[:, :, 3]).all() == torch.isfinite(theirs[:, :, 3]).all()


def test_halves_of_one_tensor(kernels: ModuleType) -> None:
    d_hidden, gate, up, neuron, token = inputs(3, 7, 20, 4)
    first, second = torch.cat([gate, up], dim=2).chunk(2, dim=2)
    padded = torch.cat([d_hidden, d_hidden[..., :3]], dim=2)[..., :20]
    assert not any(tensor.is_contiguous() for tensor in (first, second, padded))
    expected = results(kernels, [d_hidden, gate, up, neuron, token])
    for ours, theirs in zip(results(kernels, [padded, first, second, neuron, token]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_layout_without_equal_distances_is_refused(kernels: ModuleType) -> None:
    _, gate, up, neuron, token = inputs(2, 8, 4, 2)
    with pytest.raises(RuntimeError, match="view"):
        kernels.forward(gate[:, :6], up[:, :6], neuron, token[:, :, :6].contiguous())


def test_same_bits_every_time_and_inputs_as_they_were(kernels: ModuleType) -> None:
    tensors = inputs(2, 9, 17, 4)
    before = [tensor.clone() for tensor in tensors]
    first, second = results(kernels, tensors), results(kernels, tensors)
    assert all(torch.equal(a, b) for a, b in zip([*first, *tensors], [*second, *before], strict=True))


def test_hidden_only_on_demand(kernels: ModuleType) -> None:
    tensors = inputs(1, 3, 5, 4)
    *gradients, nothing = kernels.backward(*tensors, False)
    assert nothing.shape == (0,) and nothing.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(gradients, results(kernels, tensors)[1:], strict=True))


def test_interpreted_copies_stay_here(kernels: ModuleType) -> None:
    assert kernels.forward_kernel.__class__ is InterpretedFunction


@pytest.mark.parametrize(("k", "dtype"), [(4, "bf16"), (6, "fp32")])
def test_what_is_interpreted_compiles_without_spills(k: int, dtype: str) -> None:
    """For an H100, by the compiler that Triton carries, in a process of its own; no GPU is needed."""
    script = Path(__file__).with_name("compile_triton_mixture.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = subprocess.run(
        [sys.executable, str(script), str(k), dtype], env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert len(lines) == 6 and all("STACK:0" in line for line in lines), lines
