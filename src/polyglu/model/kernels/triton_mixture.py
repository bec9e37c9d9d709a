"""The mixture of activations times ``up`` on a CUDA device, fused: weights and branches live in registers only.

With x = gate, u = up, z_k = neuron_k + token_k, w = softmax_k(z), s_k = activation_k(x):

    mix = sum_k w_k s_k    h = mix u
    d u = d h mix    m = d h u    d x = m sum_k w_k s_k'(x)    d z_k = m w_k (s_k - mix)

Instructions limit it as much as memory does, so K exponentials an element are too many: exp(z_k) is the product of a
neuron's factor, made once a program, and a token's, shared by a block of neurons. Gradients of the logits are summed in
fp32 and in a fixed order, over a program's tokens in registers and over programs by torch. They sum to zero over k, so
only the first K - 1 are computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from polyglu.model.kernels.triton_kernels import backward_kernel, forward_kernel


def forward(gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor) -> Tensor:
    """The hidden layer h.

    Args:
        gate: fp32 or bf16 ``[B, T, F]``. Its last dimension is dense, and its tokens lie at equal distances, so that
            ``[B * T, F]`` is a view of it; a half of a ``[B, T, 2 F]`` will do.
        up: likewise, in the same dtype.
        neuron: fp32 ``[K, 1 or B, F]``, contiguous, divided by tau.
        token: fp32 ``[K, B, S]``, contiguous, divided by tau.

    Returns:
        ``[B, T, F]`` in the dtype of ``gate``, contiguous.
    """
    logits, per_token = _logits(neuron, token)
    hidden = torch.empty_like(gate, memory_format=torch.contiguous_format)
    blocks, programs, _ = _blocks(gate, largest_span=128)
    tensors = gate, up, logits, token, hidden
    _launch(forward_kernel, programs, tensors, (gate, up), logits, token, PER_TOKEN=per_token, **blocks)
    return hidden


def backward(
    d_hidden: Tensor, gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor, with_hidden: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what ``forward`` takes, the same bits whenever the inputs are the same.

    Args:
        d_hidden: ``[B, T, F]``, laid out as ``gate`` must be.
        gate: as ``forward`` takes it, like ``up``, ``neuron`` and ``token``.
        up: see ``gate``.
        neuron: see ``gate``.
        token: see ``gate``.
        with_hidden: whether to compute h again, which then need not be kept.

    Returns:
        Gradients of gate, up, neuron and token, and h or an empty tensor.
    """
    rows, columns, d_ff = gate.shape
    logits, per_token = _logits(neuron, token)
    blocks, programs, neuron_blocks = _blocks(gate, largest_span=256)
    d_gate, d_up = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    hidden = torch.empty_like(d_gate) if with_hidden else gate.new_empty(0)
    others = len(neuron) - 1
    d_neuron = neuron.new_empty(rows, programs // neuron_blocks // rows, others, d_ff)  # a part from each program
    d_token = neuron.new_empty(neuron_blocks if per_token else 0, rows, columns, others)
    tensors = d_hidden, gate, up, logits, token, d_gate, d_up, d_neuron, d_token, hidden
    switches = {"PER_TOKEN": per_token, "WITH_HIDDEN": with_hidden}
    _launch(backward_kernel, programs, tensors, (d_hidden, gate, up), logits, token, **switches, **blocks)
    by_row = d_neuron.sum(1).movedim(1, 0)  # [K - 1, B, F]
    by_token = d_token.sum(0).movedim(2, 0) if per_token else by_row.sum(2, keepdim=True)
    return d_gate, d_up, _with_last(by_row.sum_to_size(others, *neuron.shape[1:])), _with_last(by_token), hidden


def _launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor],
    read: Sequence[Tensor],
    logits: Tensor,
    token: Tensor,
    **sizes: int,
) -> None:
    """Start a kernel: its tensors, the strides of the ``[B, T, F]`` that it reads, then what both kernels take."""
    _, columns, d_ff = read[0].shape
    strides = [*map(_stride, read), *_logit_strides(logits, token)]
    with torch.cuda.device_of(read[0]):  # type: ignore[no-untyped-call]  # Triton launches on the current one
        kernel[(programs,)](*tensors, *strides, columns, d_ff, K=len(logits), **sizes)


def _blocks(gate: Tensor, largest_span: int) -> tuple[dict[str, int], int, int]:
    """Compile-time sizes, number of programs, and number of blocks of neurons.

    A warp has one token of a tile and a thread 16 bytes of it: loads are as wide as can be, sums over a token's neurons
    stay within the warp, and what K = 6 takes still fits into the registers. Long spans save work and memory that each
    program takes once; they are cut where too few programs would be left to fill the device, to four sizes at most.
    """
    rows, columns, d_ff = gate.shape
    width = min(32 * 16 // gate.element_size(), triton.next_power_of_2(d_ff))
    neuron_blocks = triton.cdiv(d_ff, width)

    def programs(span: int) -> int:
        count: int = rows * triton.cdiv(columns, span) * neuron_blocks
        return count

    span = largest_span
    while span > 32 and programs(span) < 1024:
        span //= 2
    sizes = {"BLOCK_T": 4, "BLOCK_F": width, "SPAN": span, "num_warps": 4, "enable_fp_fusion": True}
    return sizes, programs(span), neuron_blocks


def _logits(neuron: Tensor, token: Tensor) -> tuple[Tensor, bool]:
    """What the kernel takes for ``neuron``, with a row's one token logit added, and whether logits differ by token."""
    per_token = token.shape[2] > 1
    return neuron if per_token else neuron + token, per_token


def _logit_strides(logits: Tensor, token: Tensor) -> tuple[int, int, int]:
    """From one activation to the next and from one row to the next, then from one activation to the next by token."""
    _, rows, d_ff = logits.shape
    return rows * d_ff, d_ff if rows > 1 else 0, token.shape[1] * token.shape[2]


def _stride(x: Tensor) -> int:
    """From one token to the next."""
    return x.view(-1, x.shape[2]).stride(0)


def _with_last(first: Tensor) -> Tensor:
    """``[K - 1, ...]`` -> ``[K, ...]`` that sum to zero."""
    return torch.cat([first, -first.sum(0, keepdim=True)])
