"""Head and cross-entropy in one: the logits exist a chunk of rows at a time, and once.

The result is a scalar, so its gradient is known up to a factor as soon as its value is. Both are made in forward, while
a chunk of the logits is at hand:

    features [n, D] ──► logits [n, V] ──► loss, and in their place softmax - one-hot ──► d features, d weight += ...

Nothing is computed twice, and what is kept for backward is as large as features and weight. Chunks are large: each one
reads the weight twice, and reads and writes its gradient.

Liger's FusedLinearCrossEntropy has the same design. By default its chunk holds about as many logits as there are
features: for V = 151669, D = 1024 and N = 8192 that is 64 rows, so 128 passes over weight and gradient. In bf16 with
fp32 sums these move 240 GB, 70 ms at the 3.35 TB/s of an H100; 5 chunks here move 9 GB, and their logits, which are
beyond the cache, 15 GB. The products themselves take 13 ms at 600 TFLOP/s. This is arithmetic: on a GPU neither has
been measured here.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from polyglu.data.dataloader import IGNORED

CACHED_LOGITS = 2**17
"""Logits that a core turns into probabilities at a time: 1 MB in fp32 with a copy, which fits its cache."""
ROW_ALIGNMENT = 64
"""Rows of the logits start at multiples of it, in bf16 of 128 bytes: an odd vocabulary, as the published one, would
keep a GPU from its fast matrix products."""

Softmax = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Signature of ``softmax_``."""


class Method(NamedTuple):
    """How a kind of device computes the loss."""

    logits_at_once: int
    """Logits of a chunk at most (but at least a row)."""
    gather: bool
    """Leave most rows without a target out; a GPU would have to wait for their number."""
    softmax_: Softmax


def softmax_(logits: Tensor, index: Tensor, kept: Tensor) -> Tensor:
    """Turn logits into probabilities in place.

    Args:
        logits: ``[n, V]``, of any dtype; the softmax is computed in fp32 at least.
        index: ``[n, 1]``, a column of each row.
        kept: ``[n, 1]``, factor of each row of probabilities.

    Returns:
        Logarithms ``[n, 1]`` of the probabilities at ``index``, without the factor.
    """
    log_p = torch.log_softmax(logits, -1, dtype=kept.dtype)
    at_index = log_p.gather(1, index)
    logits.copy_(log_p.exp_().mul_(kept))
    return at_index


def softmax_in_cache_(logits: Tensor, index: Tensor, kept: Tensor) -> Tensor:
    """``softmax_``, some rows at a time."""
    rows = max(1, CACHED_LOGITS * torch.get_num_threads() // logits.shape[1])
    parts = zip(*(torch.split(tensor, rows) for tensor in (logits, index, kept)), strict=True)
    return torch.cat([softmax_(*part) for part in parts])


def compiled_softmax_(logits: Tensor, index: Tensor, kept: Tensor) -> Tensor:
    """``softmax_`` in two passes over the logits: maximum and sum together, then the probabilities."""
    return _compiled()(logits, index, kept)


@cache
def _compiled() -> Softmax:
    return torch.compile(softmax_)


METHODS = {
    "cpu": Method(logits_at_once=2**24, gather=True, softmax_=softmax_in_cache_),
    "cuda": Method(logits_at_once=2**28, gather=False, softmax_=compiled_softmax_),
}
"""Kind of device -> method. CPU: chunks of 64 MB in fp32; larger ones gained nothing, smaller ones cost passes over the
weight and its gradient. GPU: 512 MB in bf16, 1770 rows of the published vocabulary; such passes then take a fifth of
the products' time, by arithmetic."""


def linear_cross_entropy(
    features: Tensor, weight: Tensor, targets: Tensor, compute_dtype: torch.dtype, method: Method
) -> Tensor:
    """Cross-entropy of the logits ``features @ weight.T``, summed over the targets.

    Args:
        features: ``[N, D]``.
        weight: ``[V, D]``; its gradient has its dtype.
        targets: ``[N]``, ``IGNORED`` where nothing is predicted.
        compute_dtype: of matrix products, whatever autocast says; softmax and loss are at least fp32.
        method: that of the tensors' device.

    Returns:
        Scalar in nats; it can be differentiated once.
    """
    counted = targets != IGNORED
    if method.gather and not counted.all():
        rows = _rows_with_target(counted)
        features, targets = features[rows], targets[rows]
    with torch.autocast(features.device.type, enabled=False):
        if torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad):
            arguments = features, weight, targets, compute_dtype, method
            return LinearCrossEntropy.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
        count, head = _count_chunks(features, weight, method), weight.to(compute_dtype)
        parts = zip(features.chunk(count), targets.chunk(count), strict=True)
        return torch.stack([reference_cross_entropy(x, head, target, compute_dtype) for x, target in parts]).sum()


def reference_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """``linear_cross_entropy`` by autograd, all logits at once."""
    with torch.autocast(features.device.type, enabled=False):
        logits = F.linear(features.to(compute_dtype), weight.to(compute_dtype))  # [N, V]
        return F.cross_entropy(logits.to(_exact(compute_dtype)), targets, ignore_index=IGNORED, reduction="sum")


class LinearCrossEntropy(torch.autograd.Function):
    """Arguments as of ``linear_cross_entropy``; no row is left out."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, compute_dtype: torch.dtype, method: Method
    ) -> Tensor:
        """Loss; the gradients of features and weight are made and kept."""
        count, width = _count_chunks(features, weight, method), len(weight)
        head = weight.to(compute_dtype)
        total = features.new_zeros((), dtype=_exact(compute_dtype))
        d_features, d_weight = torch.empty_like(features), torch.zeros_like(weight)
        buffer = head.new_empty(-(-len(features) // count), -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT)
        buffer[:, width:] = 0  # a CPU's products in bf16 read beyond the rows: what is there must not be NaN
        for part, target, d_part in zip(*(rows.chunk(count) for rows in (features, targets, d_features)), strict=True):
            x = part.to(compute_dtype)
            logits = torch.mm(x, head.T, out=buffer[: len(x), :width])
            total += _loss_and_gradient(logits, target, method.softmax_)
            d_part.copy_(logits @ head)
            _add_product(d_weight, logits.T, x)
        ctx.save_for_backward(d_features, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Gradients of features and weight."""
        d_features, d_weight = ctx.saved_tensors
        return grads[0] * d_features, grads[0] * d_weight, None, None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor, softmax_: Softmax) -> Tensor:
    """Summed loss of logits ``[n, V]``, which become their gradient: zero in a row without a target."""
    counted = (targets != IGNORED)[:, None]
    index = targets[:, None].where(counted, 0)
    kept = counted.to(_exact(logits.dtype))
    log_p = softmax_(logits, index, kept)
    at_targets = torch.arange(len(targets), device=targets.device)[:, None], index
    logits[at_targets] = torch.expm1(log_p).mul_(kept).to(logits.dtype)  # p - 1; scatter_ would copy all logits twice
    return -log_p.where(counted, 0).sum()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, in the total's dtype where the device can."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _rows_with_target(counted: Tensor) -> Tensor:
    """Rows with a target, and so many others that their number is one of a few.

    In bf16 oneDNN compiles code on a CPU for each shape of a product, of which there are three, and keeps it.
    """
    step = max(1, len(counted) // 16)
    wanted = -(-int(counted.sum()) // step) * step
    return counted.to(torch.uint8).argsort(descending=True, stable=True)[:wanted]


def _count_chunks(features: Tensor, weight: Tensor, method: Method) -> int:
    """Chunks of equal height into which the rows are cut."""
    return min(max(1, len(features)), -(-max(1, len(features) * len(weight)) // method.logits_at_once))


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
