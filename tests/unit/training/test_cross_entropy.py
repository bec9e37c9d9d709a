"""Head and cross-entropy without all logits: against plain autograd, at the edges, and what they hold in memory."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from polyglu.data.dataloader import IGNORED
from polyglu.training import cross_entropy
from polyglu.training.cross_entropy import (
    METHODS,
    Method,
    _rows_with_target,
    linear_cross_entropy,
    reference_cross_entropy,
    softmax_,
)

IN_CACHE, WHOLE = METHODS["cpu"], Method(2**24, gather=False, softmax_=softmax_)
"""What runs on a CPU; and on a GPU, but for the compilation."""
BOTH = pytest.mark.parametrize("method", [IN_CACHE, WHOLE], ids=["in_cache", "whole"])
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(n: int, width: int, vocabulary: int, ignored: float = 0.3, dtype: torch.dtype = torch.float32) -> Inputs:
    """Features, weight and targets, of which a part is ignored."""
    generator = torch.Generator().manual_seed(n + vocabulary)
    features = torch.randn(n, width, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    targets = torch.randint(vocabulary, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = IGNORED
    return features.requires_grad_(), weight.requires_grad_(), targets


def with_gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, of)]


def ours(given: Inputs, dtype: torch.dtype, method: Method, factor: float = 1.0) -> list[Tensor]:
    return with_gradients(factor * linear_cross_entropy(*given, dtype, method), *given[:2])


def reference(given: Inputs, dtype: torch.dtype, factor: float = 1.0) -> list[Tensor]:
    return with_gradients(factor * reference_cross_entropy(*given, dtype), *given[:2])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 23), width=st.integers(1, 9), vocabulary=st.integers(1, 150), ignored=st.sampled_from([0, 0.5, 1]),
    at_once=st.sampled_from([1, 64, 500, 10**9]), cached=st.sampled_from([1, 300, 10**9]),
    method=st.sampled_from([IN_CACHE, WHOLE]), factor=st.sampled_from([1.0, 0.01]),
)  # fmt: skip
def test_any_cut_of_any_size_equals_the_reference(
    n: int, width: int, vocabulary: int, ignored: float, at_once: int, cached: int, method: Method, factor: float
) -> None:
    """Chunks that hold less than a row, or do not divide the rows, or all; no row, no target, one row."""
    given = inputs(n, width, vocabulary, ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CACHED_LOGITS", cached)
        actual = ours(given, torch.float32, method._replace(logits_at_once=at_once), factor)
    for mine, true in zip(actual, reference(given, torch.float32, factor), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


@BOTH
def test_gradients_are_derivatives_in_fp64(method: Method) -> None:
    features, weight, targets = inputs(7, 3, 11, dtype=torch.float64)
    cut = method._replace(logits_at_once=25)
    assert torch.autograd.gradcheck(
        lambda x, w: 0.3 * linear_cross_entropy(x, w, targets, torch.float64, cut), (features, weight)
    )


@BOTH
@pytest.mark.parametrize("at_once", [10**9, 3000])
def test_bf16_is_as_exact_as_autograd_in_bf16(method: Method, at_once: int) -> None:
    """Autograd rounds the logits' gradient as well, and the product that is the weight's gradient."""
    features, weight, targets = inputs(200, 64, 131)
    given = features, (weight.detach() / 8).requires_grad_(), targets
    exact = reference(given, torch.float32)
    actual = ours(given, torch.bfloat16, method._replace(logits_at_once=at_once))
    theirs = reference(given, torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in actual)
    assert abs(actual[0] - exact[0]) <= 1.05 * abs(theirs[0] - exact[0]) + 1e-5 * exact[0]
    for mine, other, true in zip(actual[1:], theirs[1:], exact[1:], strict=True):
        assert 0 < (mine - true).norm() <= 1.05 * (other - true).norm() <= 0.02 * true.norm()


@BOTH
def test_sums_of_many_chunks_are_fp32(method: Method) -> None:
    """A sum kept in bf16 would lose most of the small terms."""
    features, weight = torch.ones(600, 1), torch.zeros(2, 1, requires_grad=True)
    loss = linear_cross_entropy(
        features, weight, torch.zeros(600).long(), torch.bfloat16, method._replace(logits_at_once=2)
    )
    assert loss.item() == pytest.approx(600 * math.log(2), rel=1e-5)
    assert torch.autograd.grad(loss, weight)[0].flatten().tolist() == [-300.0, 300.0]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_surrounding_autocast_changes_nothing(method: Method, dtype: torch.dtype) -> None:
    features, weight, targets = inputs(9, 5, 11)

    def losses() -> tuple[Tensor, Tensor]:
        return (
            linear_cross_entropy(features, weight, targets, dtype, method),
            reference_cross_entropy(features, weight, targets, dtype),
        )

    outside = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses()
    for one, other in zip(inside, outside, strict=True):
        found, wanted = (with_gradients(loss, features, weight) for loss in (one, other))
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@BOTH
def test_large_logits(method: Method) -> None:
    """Up to 1e4 on both sides: certain, certainly wrong, and undecided."""
    features = torch.tensor([[1e4], [-1e4], [1e4], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.999]], requires_grad=True)
    given = features, weight, torch.tensor([0, 0, 2, 1])
    actual = ours(given, torch.float32, method)
    assert actual[0].item() == pytest.approx(2e4 + 10 + math.log(3), rel=1e-5)
    for mine, true in zip(actual, reference(given, torch.float32), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-3)


@BOTH
def test_ignored_rows_add_exactly_nothing(method: Method) -> None:
    features, weight, targets = inputs(40, 5, 11, ignored=0.5)
    kept = targets != IGNORED
    loss, d_features, d_weight = ours((features, weight, targets), torch.float32, method)
    assert d_features[~kept].eq(0).all() and d_features[kept].ne(0).any(1).all()
    alone = features[kept].detach().requires_grad_(), weight, targets[kept]
    for mine, other in zip((loss, d_features[kept], d_weight), ours(alone, torch.float32, method), strict=True):
        torch.testing.assert_close(mine, other)
    nothing = ours((features, weight, torch.full_like(targets, IGNORED)), torch.float32, method)
    assert all(tensor.eq(0).all() for tensor in nothing)


@BOTH
def test_other_negative_targets_are_refused(method: Method) -> None:
    features, weight, _ = inputs(3, 5, 11)
    for bad in (-1, 11):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(features, weight, torch.tensor([0, bad, 1]), torch.float32, method)


@BOTH
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_a_factor_of_nan_reaches_the_gradient(method: Method, ignored: float) -> None:
    """So the loop bars a step, even where it has no target."""
    features, weight, targets = inputs(6, 3, 5, ignored)
    _, d_features, d_weight = ours((features, weight, targets), torch.float32, method, math.nan)
    assert d_weight.isnan().all() and d_features[targets != IGNORED].isnan().all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_are_not_hidden(method: Method, dtype: torch.dtype, bad: float) -> None:
    features, weight, targets = inputs(6, 3, 5, ignored=0)
    with torch.no_grad():
        features[2, 1] = bad
    loss, d_features, d_weight = ours((features, weight, targets), dtype, method)
    assert not loss.isfinite() and not d_features[2].isfinite().any() and not d_weight.isfinite().all()
    with torch.no_grad():
        assert not linear_cross_entropy(features, weight, targets, dtype, method).isfinite()


@BOTH
@pytest.mark.parametrize("at_once", [10**9, 64])
def test_without_gradient_only_the_loss_is_made(method: Method, at_once: int) -> None:
    features, weight, targets = inputs(30, 5, 11)
    cut = method._replace(logits_at_once=at_once)
    expected = linear_cross_entropy(features, weight, targets, torch.float32, cut)
    for frozen in (True, False):
        with torch.set_grad_enabled(not frozen), Largest() as seen:
            plain = (features, weight) if frozen else (features.detach(), weight.detach())
            loss = linear_cross_entropy(*plain, targets, torch.float32, cut)
        torch.testing.assert_close(loss, expected.detach())
        assert not loss.requires_grad and "addmm_" not in seen.names
    assert expected.requires_grad


@BOTH
def test_one_of_both_may_be_frozen(method: Method) -> None:
    features, weight, targets = inputs(30, 5, 11)
    _, d_features, d_weight = ours((features, weight, targets), torch.float32, method)
    loss = linear_cross_entropy(features.detach(), weight, targets, torch.float32, method)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], d_weight)
    loss = linear_cross_entropy(features, weight.detach(), targets, torch.float32, method)
    assert torch.equal(torch.autograd.grad(loss, features)[0], d_features)


def test_a_second_derivative_is_refused() -> None:
    features, weight, targets = inputs(3, 5, 11)
    loss = linear_cross_entropy(features, weight, targets, torch.float32, IN_CACHE)
    (gradient,) = torch.autograd.grad(loss * loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Largest(TorchDispatchMode):
    """Looks at every operation: its name, and the size of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.names, self.casts = 0, set[str](), list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
            if name == "_to_copy":
                self.casts.append(out.numel())
        return out


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_more_logits_than_a_chunk(method: Method, dtype: torch.dtype) -> None:
    """Neither made nor kept; and the weight is cast once, not for each of the eight chunks."""
    features, weight, targets = inputs(256, 4, 1024, ignored=0)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = linear_cross_entropy(features, weight, targets, dtype, method._replace(logits_at_once=2**15))
        loss.backward()  # type: ignore[no-untyped-call]
    assert 1024 * 4 < seen.numel <= 2**15
    assert sum(kept) <= 256 * 4 + 1024 * 4 + 256  # the gradients; where the rows are that have a target
    assert seen.casts.count(weight.numel()) == (dtype == torch.bfloat16)
    with Largest() as plain:
        reference_cross_entropy(features, weight, targets, dtype)
    assert plain.numel == 2**18


def test_a_cpu_leaves_ignored_rows_out() -> None:
    features, weight, targets = inputs(256, 4, 1024, ignored=0.9)
    with Largest() as seen:
        linear_cross_entropy(features, weight, targets, torch.float32, IN_CACHE)
    assert seen.numel == 1024 * -(-int((targets != IGNORED).sum()) // 16) * 16 < 2**16


@pytest.mark.parametrize(("rows", "most"), [(1, 2), (7, 8), (256, 17), (300, 18)])
def test_products_have_few_shapes_however_many_targets_there_are(rows: int, most: int) -> None:
    """A CPU's library keeps code for each."""
    seen = set()
    for count in range(rows + 1):
        counted = torch.zeros(rows, dtype=torch.bool)
        counted[torch.randperm(rows)[:count]] = True
        kept = _rows_with_target(counted)
        assert set(counted.nonzero().flatten().tolist()) <= set(kept.tolist()) and len(kept.unique()) == len(kept)
        seen.add(len(kept))
    assert len(seen) <= most and max(seen) == rows


def test_what_lies_beyond_the_rows_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that holds NaN: a product of 64 rows and 37 columns in bf16 reads it on some processors."""
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size: self.new_full(size, math.nan))
    given = inputs(64, 16, 37)
    for dtype in (torch.float32, torch.bfloat16):
        assert all(tensor.isfinite().all() for tensor in ours(given, dtype, IN_CACHE))


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_softmax_equals_the_eager_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    compiled = torch.compile(softmax_, backend="aot_eager")
    for rows in (9, 4):
        buffer = torch.randn(rows, 64, generator=generator).to(dtype)
        again, index = buffer.clone(), torch.randint(37, (rows, 1), generator=generator)
        kept = torch.ones(rows, 1).index_fill(0, torch.tensor([1]), 0)
        expected = softmax_(buffer[:, :37], index, kept)
        torch.testing.assert_close(compiled(again[:, :37], index, kept), expected)
        torch.testing.assert_close(again, buffer)
        assert again[1, :37].eq(0).all() and again[0, :37].float().sum().item() == pytest.approx(1, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the method of a GPU")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_agrees(dtype: torch.dtype) -> None:
    features, weight, targets = inputs(300, 64, 1001)
    exact = reference((features, weight, targets), torch.float32)
    given = *(tensor.detach().cuda().requires_grad_() for tensor in (features, weight)), targets.cuda()
    cut = METHODS["cuda"]._replace(logits_at_once=70_000)
    for mine, true in zip(ours(given, dtype, cut), exact, strict=True):  # type: ignore[arg-type]
        error = (mine.float().cpu() - true).norm() / true.norm()
        assert error < (1e-3 if dtype == torch.float32 else 2e-2)
