"""RMSNorm on a CPU in C++ (``norm.cpp``), with rotary embedding after it if asked for, as one operator.

PyTorch computes it there in several passes over memory, which take about 6 times as long as LayerNorm's one.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from polyglu.model.kernels.compiled import load_library

LEAST = 2**15
"""Numbers from which on the kernel saves more than it takes to call it."""
SERVED = (torch.float32, torch.bfloat16)


class Problem(ctypes.Structure):
    """Arguments, as in ``norm.cpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "heads")),
        *((name, ctypes.c_void_p) for name in ("x", "grad", "weight", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("y", "d_x", "scale", "d_weight")),
        ("eps", ctypes.c_float),
    ]


def norm_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can normalise ``x``, and is worth calling."""
    if (
        x.device.type != "cpu"
        or x.dtype not in SERVED
        or weight.dtype != torch.float32
        or torch.compiler.is_compiling()
    ):
        return False
    return x.numel() >= LEAST and load_library("norm") is not None


@torch.library.custom_op("polyglu::rms_norm", mutates_args=())
def rms_norm_op(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Forward.

    Args:
        x: ``[..., width]``, or ``[..., heads, width]`` with angles; fp32 or bf16.
        weight: ``[width]``, fp32.
        eps: added to the mean square.
        cos: of the rotation after it, fp32 ``[..., 1, width / 2]`` with the leading sizes of ``x``; or None.
        sin: the same.
        dtype: of the result, fp32 or bf16.

    Returns:
        y, of the shape of ``x``, and 1 / sqrt(mean(x^2) + eps), ``[rows]``.
    """
    y, scale = torch.empty(x.shape, dtype=dtype), torch.empty(x.numel() // x.shape[-1])
    problem, _kept = _problem(x, weight, cos, sin, eps=eps, y=y, scale=scale)
    _library().norm_forward(ctypes.byref(problem), x.dtype == torch.bfloat16, dtype == torch.bfloat16)
    return y, scale


@torch.library.custom_op("polyglu::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight`` for one of y."""
    library = _library()
    d_x = torch.empty(x.shape, dtype=x.dtype)
    d_weight = torch.empty(-(-len(scale) // library.rows_at_once()), x.shape[-1])
    grad = grad.contiguous()
    problem, _kept = _problem(x, weight, cos, sin, grad=grad, scale=scale, d_x=d_x, d_weight=d_weight)
    library.norm_backward(ctypes.byref(problem), x.dtype == torch.bfloat16, grad.dtype == torch.bfloat16)
    return d_x, d_weight.sum(0)


def _problem(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float = 0.0, **others: Tensor
) -> tuple[Problem, list[Tensor]]:
    """Arguments, and the tensors they point to: these must outlive the call."""
    tensors = {"x": x.contiguous(), "weight": weight.contiguous(), **others}
    if cos is not None and sin is not None:
        tensors |= {"cos": cos.contiguous(), "sin": sin.contiguous()}
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    heads = 1 if cos is None else x.shape[-2]
    sizes = {"rows": x.numel() // x.shape[-1], "width": x.shape[-1], "heads": heads}
    return Problem(**sizes, **pointers, eps=eps), [*tensors.values()]


def _library() -> ctypes.CDLL:
    library = load_library("norm")
    if library is None:
        raise RuntimeError("the native kernel could not be compiled")
    library.rows_at_once.restype = ctypes.c_int64
    return library


@rms_norm_op.register_fake
def _(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), weight.new_empty(x.numel() // x.shape[-1])


@rms_norm_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, cos, sin, _ = inputs
    ctx.save_for_backward(x, weight, output[1], cos, sin)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    d_x, d_weight = rms_norm_backward_op(grad, *ctx.saved_tensors)
    return d_x, d_weight, None, None, None, None


rms_norm_op.register_autograd(_differentiate, setup_context=_keep)
