"""A feed-forward layer alone, forward and backward.

whole        with its matrix products: from x to y and back to the gradients of x and all weights
elementwise  gate, up -> h and back, without matrix products. GB/s are of the bytes that must move: forward reads gate
             and up and writes h, backward reads dh, gate and up and writes d gate and d up. "of copy" is the time of a
             copy that moves as many bytes in the same round, as a share of the case's time

Routing is as in training: K = 4, noise [B, F, K], a row is one document. "kernel" is the operator alone, from logits
that are divided by tau and in its own order; "fused" makes these too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from measure import as_table, told
from rich.table import Table
from torch import Tensor
from turns import Build, Case, Group, Row, Rows, Stopwatch, compare, measure_groups, peak, ratios, start_seconds

from polyglu.model.config import KernelName, RoutingScope
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.kernels.mixture import gated_mixture_op
from polyglu.model.layers import GLU
from polyglu.model.packing import Packing
from polyglu.model.routing import gated_mixture, gumbel_noise
from polyglu.training.devices import compute_dtype

K, TAU = 4, 0.5
SWIGLU, COMPILED, LIGER, COPY = "SwiGLU", "SwiGLU, compiled", "SwiGLU, Liger", "copy"
MOVED = {"forward": 3, "backward": 5}
"""Tensors [N, F] that must move."""


@dataclass(frozen=True)
class Shape:
    d_model: int
    d_ff: int
    rows: int
    columns: int
    precision: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.precision, self.device)

    def random(self, width: int) -> Tensor:
        """``[rows, columns, width]`` in the compute dtype."""
        return torch.randn(self.rows, self.columns, width, dtype=self.dtype, device=self.device)

    def noise(self) -> Tensor:
        return gumbel_noise(0, torch.arange(self.rows, device=self.device), 1, self.d_ff, K)[0]

    def __str__(self) -> str:
        return f"{self.precision}, D={self.d_model} F={self.d_ff} N={self.rows}x{self.columns}"


def cpu_shape() -> list[Shape]:
    return [Shape(512, 2048, 4, 512, precision, torch.device("cpu")) for precision in ("fp32", "bf16")]


def gpu_shape() -> list[Shape]:
    return [Shape(1024, 4096, rows, 4096, "bf16", torch.device("cuda")) for rows in (2, 4)]


def measure(shapes: Sequence[Shape], seconds: float) -> dict[str, Rows]:
    groups = {}
    for shape in shapes:
        groups[f"whole, {shape}"] = Group(2, partial(measure_whole, shape))
        groups[f"elementwise, {shape}"] = Group(1, partial(measure_elementwise, shape))
    return measure_groups(groups, seconds)


def measure_whole(shape: Shape, seconds: float) -> Rows:
    on_gpu = shape.device.type == "cuda"
    builds: dict[str, Build] = {
        SWIGLU: partial(swiglu, shape),
        "fused, causal": partial(polyglu, shape, "causal"),
        "fused, sequence": partial(polyglu, shape, "sequence"),
        "reference, causal": partial(polyglu, shape, "causal", "reference"),
        COMPILED: partial(swiglu, shape, compiled=True),
    }
    if on_gpu:
        builds |= {LIGER: partial(liger, shape), "fused, causal, compiled": partial(polyglu, shape, compiled=True)}
    rows = compare(builds, shape.device, seconds, calls=10 if on_gpu else 1, ahead=True, alone=not on_gpu)
    if not on_gpu:
        rows[COMPILED].pop("peak_mb", None)  # it is the compiler's
    return rows


def measure_elementwise(shape: Shape, seconds: float) -> Rows:
    on_gpu = shape.device.type == "cuda"
    builds: dict[str, Build] = {
        COPY: partial(copy, shape),
        SWIGLU: partial(elementwise, shape, silu_mul),
        "kernel, causal": partial(kernel, shape, "causal"),
        "kernel, sequence": partial(kernel, shape, "sequence"),
        "fused, causal": partial(mixture, shape, "causal", "auto"),
        "reference, causal": partial(mixture, shape, "causal", "reference"),
        COMPILED: partial(compiled_elementwise, shape),
    }
    if on_gpu:
        builds[LIGER] = lambda: elementwise(shape, liger_function(), overwrites=True)
    rows = compare(builds, shape.device, seconds, calls=10 if on_gpu else 3, ahead=True, alone=not on_gpu)
    tensor = shape.rows * shape.columns * shape.d_ff * shape.dtype.itemsize
    for row in rows.values():
        row["bytes"] = {stretch: count * tensor for stretch, count in MOVED.items()}
    return rows


def swiglu(shape: Shape, compiled: bool = False) -> Case:
    layer = GLU(shape.d_model, shape.d_ff).to(shape.device)
    return whole(shape, layer, torch.compile(layer) if compiled else layer)


def liger(shape: Shape) -> Case:
    activate, layer = liger_function(), GLU(shape.d_model, shape.d_ff).to(shape.device)
    return whole(shape, layer, lambda x: layer.down_proj(activate(layer.gate_proj(x), layer.up_proj(x))))


def liger_function() -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply  # type: ignore[no-any-return]


def polyglu(shape: Shape, scope: RoutingScope = "causal", kernels: KernelName = "auto", compiled: bool = False) -> Case:
    layer = PolyGLU(shape.d_model, shape.d_ff, K, scope, kernels).to(shape.device)
    packing = Packing.of(torch.Size((shape.rows, shape.columns)), None, shape.device)  # a model makes it once a batch
    noise = shape.noise()

    def forward(x: Tensor) -> Tensor:
        return layer.combine(x, layer.token_logits(x, packing), TAU, noise)

    return whole(shape, layer, torch.compile(forward) if compiled else forward)


def whole(shape: Shape, layer: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> Case:
    x, grad = shape.random(shape.d_model).requires_grad_(), shape.random(shape.d_model)
    inputs = [x, *layer.parameters()]

    def case(watch: Stopwatch) -> None:
        watch.start()
        with torch.autocast(shape.device.type, dtype=torch.bfloat16, enabled=shape.dtype == torch.bfloat16):
            y = forward(x)
        watch.lap("forward")
        torch.autograd.grad(y, inputs, grad)
        watch.lap("backward")

    return case


def kernel(shape: Shape, scope: RoutingScope) -> Case:
    neuron, token = (logits.movedim(-1, 0).contiguous() / TAU for logits in random_logits(shape, scope))
    return elementwise(shape, lambda *tensors: gated_mixture_op(*tensors, "auto"), [neuron, token])


def mixture(shape: Shape, scope: RoutingScope, kernels: KernelName) -> Case:
    return elementwise(shape, lambda *tensors: gated_mixture(*tensors, TAU, kernels), random_logits(shape, scope))


def random_logits(shape: Shape, scope: RoutingScope) -> list[Tensor]:
    """Of neurons ``[B, F, K]`` and tokens ``[B, S, K]``."""
    width = 1 if scope == "sequence" else shape.columns
    return [shape.noise(), torch.randn(shape.rows, width, K, device=shape.device)]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def compiled_elementwise(shape: Shape) -> Case:
    return elementwise(shape, torch.compile(silu_mul))


def elementwise(
    shape: Shape, forward: Callable[..., Tensor], logits: Sequence[Tensor] = (), overwrites: bool = False
) -> Case:
    """``overwrites``: backward puts gradients in the place of gate and up, which are then put back, untimed."""
    gate, up, grad = (shape.random(shape.d_ff) for _ in range(3))
    originals = [gate.clone(), up.clone()] if overwrites else []
    inputs = [tensor.requires_grad_() for tensor in (gate, up, *logits)]

    def case(watch: Stopwatch) -> None:
        with torch.no_grad():
            for tensor, original in zip(inputs, originals, strict=False):
                tensor.copy_(original)
        watch.start()
        hidden = forward(*inputs)
        watch.lap("forward")
        torch.autograd.grad(hidden, inputs, grad)
        watch.lap("backward")

    return case


def copy(shape: Shape) -> Case:
    """Into new memory, as the others' results."""
    sources = {
        stretch: torch.zeros(shape.rows * shape.columns * shape.d_ff * count // 2, dtype=shape.dtype).to(shape.device)
        for stretch, count in MOVED.items()
    }

    def case(watch: Stopwatch) -> None:
        watch.start()
        for stretch, source in sources.items():
            source.clone()
            watch.lap(stretch)

    return case


def tables(results: dict[str, Rows]) -> list[Table]:
    def milliseconds(stretch: str) -> Callable[[Row, Rows], str]:
        return lambda row, rows: told([1e3 * value for value in row["seconds"][stretch]])

    def times(row: Row, rows: Rows) -> str:
        return told(ratios(row, rows.get(SWIGLU)))

    def rate(stretch: str) -> Callable[[Row, Rows], str]:
        return lambda row, rows: told([row["bytes"][stretch] / 1e9 / value for value in row["seconds"][stretch]], 0)

    def of_copy(stretch: str) -> Callable[[Row, Rows], str]:
        return lambda row, rows: told(ratios(rows.get(COPY), row, stretch))

    common = {"forward ms": milliseconds("forward"), "backward ms": milliseconds("backward"), "of SwiGLU": times}
    ends = {"start s": start_seconds, "peak MB": peak}
    rates = {f"{stretch} GB/s": rate(stretch) for stretch in MOVED} | {
        f"{stretch} of copy": of_copy(stretch) for stretch in MOVED
    }
    of_kind = {kind: {k: v for k, v in results.items() if k.startswith(kind)} for kind in ("whole", "elementwise")}
    return [
        as_table("Feed-forward layer, whole", of_kind["whole"], common | ends),
        as_table("Feed-forward layer, elementwise part", of_kind["elementwise"], common | rates),
    ]
