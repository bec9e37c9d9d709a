"""The kernels on the CPU are the reference: same results, same gradients, whatever the shape and the values."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from polyglu import PolyGLU
from polyglu.errors import PolygluError
from polyglu.model.activations import ACTIVATIONS
from polyglu.model.config import KernelName
from polyglu.model.kernels import chunked, compiled, decode, native
from polyglu.model.kernels.compiled import load_library
from polyglu.model.kernels.mixture import choose_kernel, gated_mixture_op
from polyglu.model.routing import gated_mixture, projected_mixture

FP32 = {"rtol": 1e-5, "atol": 1e-5}
KERNELS = pytest.mark.parametrize("kernel", ["native", "chunked"])
RAW = pytest.mark.parametrize("kernel", ["native", "chunked", "reference"])


def inputs(
    rows: int, columns: int, d_ff: int, k: int, *, per_row: bool, per_token: bool, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Gate, up, neuron logits and token logits."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns * 100 + d_ff * 10 + k)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    gate, up = random(rows, columns, d_ff), random(rows, columns, d_ff)
    return [gate, up, random(rows if per_row else 1, d_ff, k), random(rows, columns**per_token, k)]


def results(kernel: KernelName, tensors: Sequence[Tensor], tau: float) -> tuple[Tensor, ...]:
    """Output, then the gradient of each input that wants one, for the same random gradient of the output."""
    output = gated_mixture(*tensors, tau, kernel)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(output.dtype)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return output.detach(), *torch.autograd.grad(output, wanted, grad)


def assert_equal_to_reference(kernel: KernelName, tensors: Sequence[Tensor], tau: float, **tolerance: float) -> None:
    actual, expected = (results(one, tensors, tau) for one in (kernel, "reference"))
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 6))


@KERNELS
@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    per_row=st.booleans(),
    per_token=st.booleans(),
    tau=st.sampled_from([0.1, 0.7, 1.0]),
    elements=st.sampled_from([1, 7, 40, 2**16]),
)
def test_any_shape_in_any_chunks(
    kernel: KernelName, shape: tuple[int, int, int, int], per_row: bool, per_token: bool, tau: float, elements: int
) -> None:
    """Vectors that a row of neurons does not fill; chunks of a single token, and ones that do not divide T.

    Gradients grow with 1 / tau, and so do their roundings.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "ELEMENTS_AT_ONCE", elements)
        tensors = inputs(*shape, per_row=per_row, per_token=per_token)
        assert_equal_to_reference(kernel, tensors, tau, rtol=1e-5 / tau, atol=1e-5 / tau)


@KERNELS
@pytest.mark.parametrize(
    ("rows", "columns", "d_ff"),
    [(1, 1, 1), (2, 1, chunked.ELEMENTS_AT_ONCE + 3), (1, 3, chunked.ELEMENTS_AT_ONCE // 2), (2, 173, 384)],
    ids=["one element", "more neurons than a chunk holds", "two tokens a chunk", "demo's width, odd length"],
)
@pytest.mark.parametrize("per_token", [False, True])
def test_shapes_around_the_chunk_size(kernel: KernelName, rows: int, columns: int, d_ff: int, per_token: bool) -> None:
    tensors = inputs(rows, columns, d_ff, 4, per_row=True, per_token=per_token)
    assert_equal_to_reference(kernel, tensors, 0.5, rtol=1e-4, atol=1e-4 * math.sqrt(d_ff / 384 + 1))


@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize(("per_row", "per_token"), [(False, False), (True, False), (False, True), (True, True)])
def test_many_tasks_of_the_native_kernel(k: int, per_row: bool, per_token: bool) -> None:
    """Several blocks of neurons and of positions, none of them full."""
    tensors = inputs(2, 1037, 1030, k, per_row=per_row, per_token=per_token)
    actual, expected = (results(one, tensors, 0.5) for one in ("native", "reference"))
    for ours, theirs in zip(actual, expected, strict=True):
        assert float((ours - theirs).norm() / (theirs.norm() + 1e-12)) < 2e-6


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize(("per_row", "per_token"), [(False, False), (True, False), (False, True), (True, True)])
def test_gradients_are_the_derivatives(k: int, per_row: bool, per_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "ELEMENTS_AT_ONCE", 6)
    tensors = inputs(2, 3, 3, k, per_row=per_row, per_token=per_token, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: gated_mixture(*args, 0.6), tensors)


@KERNELS
@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("per_token", [False, True])
def test_bf16_gate_loses_no_more_than_its_rounding(kernel: KernelName, k: int, per_token: bool) -> None:
    """The kernels compute in fp32 and round once; the reference rounds each branch to bf16."""
    tensors = inputs(2, 37, 48, k, per_row=True, per_token=per_token)
    half = [tensor.detach().bfloat16() if index < 2 else tensor for index, tensor in enumerate(tensors)]
    exact = [tensor.detach().float().requires_grad_() for tensor in half]
    half = [tensor.detach().requires_grad_() for tensor in half]
    true = results("reference", exact, 0.3)
    ours, reference = (results(one, half, 0.3) for one in (kernel, "reference"))
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16] * 3 + [torch.float32] * 2
    for name, a, b, c in zip(("output", "gate", "up", "neuron", "token"), ours, reference, true, strict=True):
        error, reference_error = (float((x.float() - c).norm() / (c.norm() + 1e-12)) for x in (a, b))
        assert error < 4e-3, name  # half a unit of bf16's last place is 2^-9, and the gradient comes in bf16
        assert error <= max(reference_error * 1.01, 1e-6), name


@KERNELS
@pytest.mark.parametrize("scales", [(30.0, 30.0), (300.0, 300.0), (3e4, 3e4), (3e4, 0.1), (0.1, 3e4), (0.0, 0.0)])
@pytest.mark.parametrize("per_token", [False, True])
def test_extreme_logits_at_low_temperature(kernel: KernelName, scales: tuple[float, float], per_token: bool) -> None:
    """Neurons and tokens that are sure of different activations; and ones of each kind beside each other.

    Logits of 1e5 have steps of 1e-2 in fp32: the reference itself is that far from the truth.
    """
    gate, up, neuron, token = inputs(2, 11, 33, 4, per_row=True, per_token=per_token)
    neuron, token = (x.detach() * scale for x, scale in zip((neuron, token), scales, strict=True))
    neuron[:, ::3] /= 1e3
    token[:, ::2] /= 1e3
    tensors = [gate, up, neuron.requires_grad_(), token.requires_grad_()]
    actual = results(kernel, tensors, 0.1)
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    tolerance = 1e-5 + 2e-6 * max(scales) / 0.1 * (min(scales) > 1)
    for ours, theirs in zip(actual, results("reference", wide, 0.1), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=tolerance)


@RAW
def test_a_neuron_with_one_choice_left_is_that_activation(kernel: KernelName) -> None:
    gate = torch.cat([torch.linspace(-9, 9, 61), torch.tensor([1e-4, -1e-4, 0.62, 0.63, 40.0, -40.0])]).view(1, -1, 1)
    gate.requires_grad_()
    for index, activation in enumerate(ACTIVATIONS):
        neuron = torch.full((1, 1, 6), -1e4)
        neuron[..., index] = 1e4
        mixed = gated_mixture(gate, torch.ones_like(gate), neuron, torch.zeros(1, 1, 6), 0.1, kernel)
        expected = activation.function(gate)
        torch.testing.assert_close(mixed, expected, rtol=2e-6, atol=1e-6)
        slope = torch.autograd.grad(expected.sum(), gate)
        torch.testing.assert_close(torch.autograd.grad(mixed.sum(), gate), slope, rtol=2e-6, atol=2e-6)


@KERNELS
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, 90.0, -90.0, 1e30, -1e30, 1e38, -1e38])
@pytest.mark.parametrize("k", [4, 6])
def test_finite_extremes_of_the_gate(kernel: KernelName, value: float, k: int) -> None:
    gate, up, neuron, token = inputs(1, 5, 17, k, per_row=False, per_token=True)
    gate = torch.full_like(gate, value).requires_grad_()
    # Gradients of the logits are sums of such values that cancel: what is left of them is rounding.
    frozen = (gate, (up / (1 + abs(value))).detach().requires_grad_(), neuron.detach(), token.detach())
    assert all(torch.isfinite(tensor).all() for tensor in results(kernel, frozen, 0.5))
    assert_equal_to_reference(kernel, frozen, 0.5, **FP32)


@KERNELS
@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_gate_shows_and_stays_where_it_is(kernel: KernelName, value: float, k: int) -> None:
    """An overflow is not hidden: SiLU and GELU take inf * 0, so the reference gives NaN (or inf) there, as do we."""
    gate, up, neuron, token = inputs(1, 5, 17, k, per_row=False, per_token=True)
    with torch.no_grad():
        gate[0, 2, 3] = value
    others = torch.ones_like(gate, dtype=torch.bool)
    others[0, 2, 3] = False
    frozen = (gate, up, neuron.detach(), token.detach())
    for ours, theirs in zip(*(results(one, frozen, 0.5) for one in (kernel, "reference")), strict=True):
        assert torch.isfinite(ours[others]).all()
        torch.testing.assert_close(ours[others], theirs[others], **FP32)
        assert torch.isfinite(ours[0, 2, 3]) == torch.isfinite(theirs[0, 2, 3])
    assert torch.isfinite(gated_mixture(*frozen, 0.5, kernel)[0, 2, 3]) == (k == 1 and value == -math.inf)


@KERNELS
def test_bf16_keeps_what_is_not_finite(kernel: KernelName) -> None:
    gate = torch.tensor([[[math.nan, math.inf, -math.inf, 3.4e38, 1.0]]]).bfloat16()
    up, neuron, token = torch.ones(1, 1, 5).bfloat16(), torch.zeros(1, 5, 1), torch.zeros(1, 1, 1)
    mixed = gated_mixture(gate, up, neuron, token, 1.0, kernel)  # K = 1: ReLU
    assert torch.equal(torch.nan_to_num(mixed, nan=7.0), torch.nan_to_num(F.relu(gate), nan=7.0))


@KERNELS
def test_negative_zero_stays_a_zero(kernel: KernelName) -> None:
    gate, up, neuron, token = (
        torch.tensor([[[-0.0, 0.0]]]),
        torch.ones(1, 1, 2),
        torch.zeros(1, 2, 4),
        torch.zeros(1, 1, 4),
    )
    assert gated_mixture(gate, up, neuron, token, 0.1, kernel).tolist() == [[[0.0, 0.0]]]


@KERNELS
@pytest.mark.parametrize("layout", ["transposed", "slice", "expanded", "half"])
def test_inputs_need_not_be_contiguous(kernel: KernelName, layout: str) -> None:
    gate, _, neuron, token = inputs(2, 6, 6, 4, per_row=True, per_token=True)
    wide = torch.randn(2, 6, 12)
    with torch.no_grad():
        views = {
            "transposed": gate.mT, "slice": gate[:, ::2, 1:5], "expanded": gate[:, :1].expand(-1, 6, -1),
            "half": wide[..., 6:],
        }  # fmt: skip
    view, up = (views[layout].detach().requires_grad_() for _ in range(2))
    assert not view.is_contiguous()
    columns, d_ff = view.shape[1:]
    tensors = [view, up, *(tensor.detach().requires_grad_() for tensor in (neuron[:, :d_ff], token[:, :columns]))]
    assert_equal_to_reference(kernel, tensors, 0.5, **FP32)
    output = gated_mixture(*tensors, 0.5, kernel)
    expanded = torch.ones(2, 1, 1).expand_as(output)  # as the gradient of a sum comes
    for ours, theirs in zip(
        torch.autograd.grad(output, tensors, expanded), torch.autograd.grad(
            gated_mixture(*tensors, 0.5, "reference"), tensors, expanded), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, **FP32)


@KERNELS
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (2, 3), (0, 1, 3)])
def test_inputs_that_need_no_gradient(kernel: KernelName, frozen: tuple[int, ...]) -> None:
    tensors = inputs(2, 5, 7, 4, per_row=False, per_token=True)
    for index in frozen:
        tensors[index].requires_grad_(False)
    assert_equal_to_reference(kernel, tensors, 0.5, **FP32)


@KERNELS
def test_inputs_are_left_as_they_were(kernel: KernelName) -> None:
    tensors = inputs(2, 5, 7, 6, per_row=True, per_token=True)
    before = [tensor.detach().clone() for tensor in tensors]
    results(kernel, tensors, 0.5)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@KERNELS
def test_no_graph_is_kept_under_no_grad(kernel: KernelName) -> None:
    tensors = inputs(1, 4, 5, 4, per_row=False, per_token=True)
    with torch.no_grad():
        mixed = gated_mixture(*tensors, 0.5, kernel)
    assert mixed.grad_fn is None
    torch.testing.assert_close(mixed, gated_mixture(*tensors, 0.5, "reference").detach(), **FP32)


@KERNELS
def test_second_derivatives_are_refused(kernel: KernelName) -> None:
    """A backward written by hand must not give a wrong second derivative in silence."""
    tensors = inputs(1, 2, 3, 4, per_row=True, per_token=True)
    (first,) = torch.autograd.grad(gated_mixture(*tensors, 0.6, kernel).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="gated_mixture_backward"):
        first.sum().backward()  # type: ignore[no-untyped-call]


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_without_the_kept_mixture(kernel: KernelName, dtype: torch.dtype) -> None:
    """The same output and gradients as with it; gate, up and logits are all that is kept besides the weight."""
    tensors = [tensor.detach() for tensor in inputs(2, 9, 40, 4, per_row=True, per_token=True)]
    tensors = [t.to(dtype) if index < 2 else t for index, t in enumerate(tensors)] + [torch.randn(5, 40)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    kept, outputs = [], []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs.append(projected_mixture(*tensors[:4], 0.5, tensors[4], kernel))
    assert kept.count((2, 9, 40)) == 2
    outputs.append(F.linear(gated_mixture(*tensors[:4], 0.5, kernel), tensors[4].to(dtype)))
    grad = torch.randn(outputs[0].shape).to(dtype)
    gradients = [torch.autograd.grad(output, tensors, grad) for output in outputs]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(outputs[0], outputs[1], **tolerance)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_the_number_of_threads_changes_no_bit() -> None:
    tensors = inputs(2, 700, 1100, 4, per_row=True, per_token=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results("native", tensors, 0.5)
        torch.set_num_threads(3)
        several = results("native", tensors, 0.5)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


@pytest.mark.parametrize("kernel", ["native", "chunked"])
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_layer_is_one_graph(kernel: KernelName) -> None:
    """``fullgraph`` fails where a graph would break; another temperature or batch of values compiles nothing anew."""
    counter = CompileCounterWithBackend("aot_eager")
    layer = PolyGLU(16, 24, kernels=kernel)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for seed, tau in ((0, 1.0), (1, 0.5), (2, 0.1)):
        x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(seed))
        temperature = torch.tensor(tau)
        actual, expected = compiled(x, tau=temperature), layer(x, tau=tau)
        torch.testing.assert_close(actual, expected)
        parameters = list(layer.parameters())
        for ours, theirs in zip(
            torch.autograd.grad(actual.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@KERNELS
def test_the_operator_is_registered_as_pytorch_expects(kernel: str) -> None:
    gate, up, neuron, token = inputs(2, 3, 5, 4, per_row=True, per_token=True)
    first = [(tensor / 0.5).movedim(-1, 0).contiguous().detach().requires_grad_() for tensor in (neuron, token)]
    torch.library.opcheck(gated_mixture_op, (gate, up, *first, kernel))


def test_a_kernel_that_does_not_work_here_is_refused() -> None:
    cpu = torch.device("cpu")
    assert choose_kernel("auto", cpu, torch.float32, 4) == "native"
    assert choose_kernel("auto", cpu, torch.float64, 4) == "chunked"
    with pytest.raises(PolygluError, match=r"model\.kernels: triton .* choose auto"):
        choose_kernel("triton", cpu, torch.float32, 4)
    with pytest.raises(PolygluError, match=r"model\.kernels: native"):
        choose_kernel("native", cpu, torch.float64, 4)


def test_a_factor_of_another_dtype_is_converted() -> None:
    """Kernels read both as one dtype: half of the numbers, or past their end."""
    gate, up, neuron, token = inputs(2, 3, 40, 4, per_row=True, per_token=True)
    for narrow, wide in ((gate.bfloat16(), up), (gate, up.bfloat16())):
        hidden = gated_mixture(narrow, wide, neuron, token, 1.0, "native")
        torch.testing.assert_close(
            hidden, gated_mixture(narrow, wide.to(narrow.dtype), neuron, token, 1.0, "native"), rtol=0, atol=0
        )
        (d_up,) = torch.autograd.grad(hidden.sum(), up)
        assert d_up.dtype == torch.float32 and d_up.abs().max() > 0


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_failed", [])
    load_library.cache_clear()
    yield tmp_path / "polyglu"
    load_library.cache_clear()


@pytest.mark.parametrize("compiler", ["", "false", "no/such/compiler"])
def test_without_a_compiler_another_kernel_serves_which_is_told_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(empty_cache))
    assert choose_kernel("auto", torch.device("cpu"), torch.float32, 4) == "chunked"
    assert not native.available(2) and not decode.available()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no native kernel for the CPU" in caplog.text and (compiler or "g++") in caplog.text
    assert not list(empty_cache.glob("*"))


def test_a_library_that_is_damaged_is_compiled_anew(empty_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_library("decode")
    (library,) = empty_cache.glob("*")
    whole = library.stat().st_size
    library.unlink()  # it is in use: its file must not be written to
    library.write_bytes(b"")
    load_library.cache_clear()
    assert load_library("decode") and not caplog.records
    assert [path.stat().st_size for path in empty_cache.glob("*")] == [whole]


def test_a_folder_that_cannot_be_written_to(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty_cache.write_text("a file in its place")
    assert load_library("decode") and not caplog.records
    assert empty_cache.read_text() == "a file in its place"
    empty_cache.unlink()
    load_library.cache_clear()
    may = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != empty_cache and may(path, mode))
    assert load_library("decode") and not caplog.records
    assert not list(empty_cache.glob("*"))


def test_a_library_is_for_one_kind_of_processor(tmp_path: Path) -> None:
    infos = [
        "processor\t: 0\nmodel name\t: Xeon\ncpu MHz\t\t: 2100\nflags\t\t: avx avx2 avx512f\n\nprocessor\t: 1\n",
        "processor\t: 0\nmodel name\t: Xeon\ncpu MHz\t\t: 2100\nflags\t\t: avx avx2\n",
        "processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd0c\n",
        "processor\t: 0\nFeatures\t: fp asimd sve\nCPU part\t: 0xd0c\n",
        "processor\t: 0\nFeatures\t: fp asimd sve\nCPU part\t: 0xd40\n",
    ]
    told = []
    for info in [*infos, infos[0].replace("2100", "3300")]:  # a clock is no kind
        (tmp_path / "cpuinfo").write_text(info)
        told.append(compiled._processor(tmp_path / "cpuinfo"))
    assert len(set(told)) == len(infos) and told[0] == told[-1]


def test_processes_that_compile_at_once_leave_one_library(empty_cache: Path) -> None:
    code = "from polyglu.model.kernels.compiled import load_library; assert load_library('mixture', 'ACTIVATIONS=3')"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    (library,) = empty_cache.glob("*")
    assert library.name.startswith("mixture_") and library.suffix == ".so"
