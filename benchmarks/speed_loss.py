"""Head and cross-entropy alone, forward and backward, from features [N, D] and the head's fp32 weight [V, D].

TFLOP/s are of 6 N D V: forward, and backward to features and weight. What a case computes twice does not count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from measure import as_table, told
from rich.table import Table
from torch import Tensor
from turns import Build, Case, Group, Row, Rows, Stopwatch, compare, measure_groups, peak, ratios, start_seconds

from polyglu.training.cross_entropy import METHODS, linear_cross_entropy, reference_cross_entropy
from polyglu.training.devices import compute_dtype

OURS, FULL = "ours", "full logits"


@dataclass(frozen=True)
class Shape:
    d_model: int
    vocabulary: int
    tokens: int
    precision: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.precision, self.device)

    @property
    def flops(self) -> int:
        return 6 * self.tokens * self.d_model * self.vocabulary

    def __str__(self) -> str:
        return f"{self.precision}, D={self.d_model} V={self.vocabulary} N={self.tokens}"


def cpu_shape() -> list[Shape]:
    return [Shape(512, 16_384, 2048, precision, torch.device("cpu")) for precision in ("fp32", "bf16")]


def gpu_shape() -> list[Shape]:
    return [Shape(1024, 151_669, 8192, "bf16", torch.device("cuda"))]


def measure(shapes: Sequence[Shape], seconds: float) -> dict[str, Rows]:
    return measure_groups({str(shape): Group(1, partial(measure_shape, shape)) for shape in shapes}, seconds)


def measure_shape(shape: Shape, seconds: float) -> Rows:
    builds: dict[str, Build] = {OURS: partial(ours, shape), FULL: partial(full_logits, shape)}
    if shape.device.type == "cuda":
        builds |= {"full logits, compiled": partial(full_logits, shape, True), "Liger": partial(liger, shape)}
    rows = compare(builds, shape.device, seconds, alone=shape.device.type == "cpu")
    for row in rows.values():
        row["flops"] = shape.flops
    return rows


def ours(shape: Shape) -> Case:
    method = METHODS[shape.device.type]
    return case_of(shape, lambda x, weight, targets: linear_cross_entropy(x, weight, targets, shape.dtype, method))


def full_logits(shape: Shape, compiled: bool = False) -> Case:
    function = torch.compile(reference_cross_entropy) if compiled else reference_cross_entropy
    return case_of(shape, lambda x, weight, targets: function(x, weight, targets, shape.dtype))


def liger(shape: Shape) -> Case:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # As ours: the head is cast once, not for each chunk, and gradients are summed in fp32. Options: bias, classes'
        # weights, ignored target, scale of log Z squared, smoothing, reduction, cap, return of log Z, dtype of sums
        options = None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32
        result = LigerFusedLinearCrossEntropyFunction.apply(x, weight.to(x.dtype), targets, *options)
        return result[0] if isinstance(result, tuple) else result  # releases differ

    return case_of(shape, loss)


def case_of(shape: Shape, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Case:
    with shape.device:
        x = torch.randn(shape.tokens, shape.d_model, dtype=shape.dtype).requires_grad_()
        weight = (0.02 * torch.randn(shape.vocabulary, shape.d_model)).requires_grad_()
        targets = torch.randint(shape.vocabulary, (shape.tokens,))

    def case(watch: Stopwatch) -> None:
        watch.start()
        torch.autograd.grad(loss(x, weight, targets) / shape.tokens, [x, weight])
        watch.lap("loss")

    return case


def tables(results: dict[str, Rows]) -> list[Table]:
    def milliseconds(row: Row, rows: Rows) -> str:
        return told([1e3 * value for value in row["seconds"]["total"]])

    def rate(row: Row, rows: Rows) -> str:
        return told([row["flops"] / 1e12 / value for value in row["seconds"]["total"]])

    columns = {
        "ms": milliseconds,
        "of full logits": lambda row, rows: told(ratios(row, rows.get(FULL))),
        "TFLOP/s": rate,
        "start s": start_seconds,
        "peak MB": peak,
    }
    return [as_table("Head and cross-entropy", results, columns)]
