"""The gated mixture on a CPU in C++ (``mixture.cpp``): a library for each K."""

import ctypes

import torch
from torch import Tensor

from polyglu.model.kernels.compiled import load_library


class Problem(ctypes.Structure):
    """Arguments, as in ``mixture.cpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "F", "S", "neuron_rows")),
        *((name, ctypes.c_int64) for name in ("gate_stride", "up_stride", "grad_stride")),
        *((name, ctypes.c_void_p) for name in ("gate", "up", "grad", "neuron", "token")),
        *((name, ctypes.c_void_p) for name in ("hidden", "d_gate", "d_up", "d_neuron", "d_token")),
    ]


def available(k: int) -> bool:
    """Whether a compiler is here that makes the library of K activations."""
    return _library(k) is not None


def forward(gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor) -> Tensor:
    """See ``mixture.gated_mixture_op``; fp32 or bf16."""
    hidden = torch.empty(gate.shape, dtype=gate.dtype)
    problem = _problem(gate, up, neuron, token, hidden=hidden)
    _loaded(len(neuron)).mixture_forward(ctypes.byref(problem), gate.dtype == torch.bfloat16)
    return hidden


def backward(
    d_hidden: Tensor, gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor, with_hidden: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``mixture.gated_mixture_backward_op``; fp32 or bf16."""
    library, (rows, columns, d_ff), k = _loaded(len(neuron)), gate.shape, len(neuron)
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    hidden = torch.empty(gate.shape if with_hidden else (0,), dtype=gate.dtype)
    d_neuron = torch.empty(rows, -(-columns // library.positions_at_once()), k, d_ff)
    per_token = token.shape[2] == columns
    d_token = torch.empty(-(-d_ff // library.neurons_at_once()) if per_token else 0, k, rows, columns)
    problem = _problem(
        gate, up, neuron, token, grad=d_hidden, d_gate=d_gate, d_up=d_up, d_neuron=d_neuron, d_token=d_token,
        **({"hidden": hidden} if with_hidden else {}),
    )  # fmt: skip
    library.mixture_backward(ctypes.byref(problem), gate.dtype == torch.bfloat16)
    by_row = d_neuron.sum(1).transpose(0, 1)  # [K, B, F]
    summed = by_row if neuron.shape[1] == rows else by_row.sum(1, keepdim=True)
    return d_gate, d_up, summed.contiguous(), d_token.sum(0) if per_token else by_row.sum(2, keepdim=True), hidden


def _problem(gate: Tensor, up: Tensor, neuron: Tensor, token: Tensor, **others: Tensor) -> Problem:
    rows, columns, d_ff = gate.shape
    grad = others.get("grad", gate)
    return Problem(
        B=rows, T=columns, F=d_ff, S=token.shape[2], neuron_rows=neuron.shape[1],
        gate_stride=gate.stride(1), up_stride=up.stride(1), grad_stride=grad.stride(1),
        gate=gate.data_ptr(), up=up.data_ptr(), neuron=neuron.data_ptr(), token=token.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in others.items()},
    )  # fmt: skip


def _library(k: int) -> ctypes.CDLL | None:
    """For K activations; None if it cannot be had here."""
    library = load_library("mixture", f"ACTIVATIONS={k}")
    for name in ("neurons_at_once", "positions_at_once") if library else ():
        getattr(library, name).restype = ctypes.c_int64
    return library


def _loaded(k: int) -> ctypes.CDLL:
    library = _library(k)
    if library is None:
        raise RuntimeError("the native kernel could not be compiled")
    return library
