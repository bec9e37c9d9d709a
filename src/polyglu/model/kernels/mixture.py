"""The gated mixture of a PolyGLU layer as one operator, with its implementations: no branch ever reaches memory.

    h = (sum_k w_k activation_k(gate)) * up        w = softmax_k(neuron + token logits)

| kernel | where | how |
|---|---|---|
| ``triton`` | CUDA, fp32 and bf16 | one pass each way (``triton_mixture``) |
| ``native`` | CPU, fp32 and bf16, with a C++ compiler | one pass each way (``native``, ``mixture.cpp``) |
| ``chunked`` | anywhere | PyTorch, some tokens at a time, so that the branches stay in the cache (``chunked``) |

Kept for backward: gate, up and the logits. For a gradient d of h, with s_k = activation_k(gate), m = sum_k w_k s_k:

    d up = d m        d gate = d up sum_k w_k s_k'(gate)        d logit_k = d up w_k (s_k - m)

Registered with PyTorch, so that ``torch.compile`` keeps one graph. Shapes: B rows, T positions, F neurons, K
activations, S = T where routing depends on the position, else 1.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from polyglu.errors import PolygluError
from polyglu.model.kernels import chunked, native


def choose_kernel(wanted: str, device: torch.device, dtype: torch.dtype, k: int) -> str:
    """The kernel to use for K activations on a device; ``auto`` takes the fastest that works there.

    Raises:
        PolygluError: the kernel that is wanted does not work there.
    """
    works = {"chunked": True, "triton": False, "native": False}
    if dtype in (torch.float32, torch.bfloat16):
        works["triton"] = device.type == "cuda" and triton_installed()
        works["native"] = device.type == "cpu" and wanted in ("auto", "native") and native.available(k)
    if wanted == "auto":
        return "triton" if works["triton"] else "native" if works["native"] else "chunked"
    if not works.get(wanted, False):
        raise PolygluError(
            f"model.kernels: {wanted} does not work here ({device.type}, {dtype}): triton needs CUDA and the triton "
            "package, native a CPU and a C++ compiler; choose auto."
        )
    return wanted


@cache
def triton_installed() -> bool:
    """Whether kernels can be compiled for a GPU."""
    return importlib.util.find_spec("triton") is not None


def _implementation(wanted: str, gate: Tensor, neuron: Tensor) -> Any:
    """Module with ``forward`` and ``backward``. Chosen inside the operator, where no compiler looks."""
    kernel = choose_kernel(wanted, gate.device, gate.dtype, len(neuron))
    if kernel == "triton":
        from polyglu.model.kernels import triton_mixture  # Triton is not everywhere

        return triton_mixture
    return {"chunked": chunked, "native": native}[kernel]


@torch.library.custom_op("polyglu::gated_mixture", mutates_args=())
def gated_mixture_op(gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor, kernel: str) -> Tensor:
    """Forward.

    Args:
        gate: ``[B, T, F]``.
        up: ``[B, T, F]``; of another dtype it is converted, for kernels read both as one.
        neuron: logits divided by the temperature, ``[K, 1 or B, F]``; fp32 (fp64 for an fp64 gate).
        token: the same, ``[K, B, S]``.
        kernel: which implementation.

    Returns:
        h, ``[B, T, F]`` in the dtype of ``gate``.
    """
    forward = _implementation(kernel, gate, neuron).forward
    hidden: Tensor = forward(_rows(gate), _rows(up.to(gate.dtype)), neuron.contiguous(), token.contiguous())
    return hidden


@torch.library.custom_op("polyglu::gated_mixture_backward", mutates_args=())
def gated_mixture_backward_op(
    d_hidden: Tensor, gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor, kernel: str, with_hidden: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward for a gradient of h, ``[B, T, F]``.

    Returns:
        Gradients of gate, up, neuron and token logits; and h itself, if asked for, else an empty tensor.
    """
    backward = _implementation(kernel, gate, neuron).backward
    wide = (_rows(tensor.to(gate.dtype)) for tensor in (d_hidden, gate, up))
    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = backward(
        *wide, neuron.contiguous(), token.contiguous(), with_hidden
    )
    return gradients


def _rows(x: Tensor) -> Tensor:
    """``[B, T, F]`` with dense neurons and one distance between positions, as halves of a wider tensor have too."""
    rows_follow = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    dense = x.shape[2] == 1 or x.stride(2) == 1
    overlap = x.shape[1] > 1 and x.stride(1) < x.shape[2]
    return x if rows_follow and dense and not overlap else x.contiguous()


@gated_mixture_op.register_fake
def _(gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor, kernel: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@gated_mixture_backward_op.register_fake
def _(
    d_hidden: Tensor, gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor, kernel: str, with_hidden: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_gate, d_up = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    hidden = gate.new_empty(gate.shape if with_hidden else (0,))
    return d_gate, d_up, torch.empty_like(neuron), torch.empty_like(token), hidden


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, _ = gated_mixture_backward_op(d_hidden, *ctx.saved_tensors, ctx.kernel, False)
    return *gradients, None


gated_mixture_op.register_autograd(_differentiate, setup_context=_keep)


class RecomputedHidden(torch.autograd.Function):
    """h and the projection after it, of which only gate, up and logits are kept: backward makes h anew on its way."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor, weight: Tensor, kernel: str
    ) -> Tensor:
        """``W h``: ``[B, T, D]`` for a weight ``[D, F]`` in the dtype of ``gate``; the rest as in the operator."""
        ctx.save_for_backward(gate, up, neuron, token, weight)
        ctx.kernel = kernel
        hidden: Tensor = gated_mixture_op(gate, up, neuron, token, kernel)
        return hidden @ weight.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs."""
        *inputs, weight = ctx.saved_tensors
        *gradients, hidden = gated_mixture_backward_op(grads[0] @ weight, *inputs, ctx.kernel, True)
        d_weight = grads[0].flatten(0, 1).mT @ hidden.flatten(0, 1)
        return *gradients, d_weight, None
