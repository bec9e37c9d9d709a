"""The gated mixture on a CPU in C++ (``mixture.cpp``), compiled on this machine when first used.

A library is compiled for one K and one processor, in about a second, and kept in ``$XDG_CACHE_HOME/polyglu`` (default
``~/.cache/polyglu``) under a name that tells source, compiler, flags and processor. It is written elsewhere and then
renamed: processes that compile at the same time do not wait for each other, and a kill leaves nothing half written.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
SECONDS = 120
"""A compiler that takes longer is taken for one that hangs."""


class Problem(ctypes.Structure):
    """Arguments, as in ``mixture.cpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "F", "S", "neuron_rows")),
        *((name, ctypes.c_int64) for name in ("gate_stride", "up_stride", "grad_stride")),
        *((name, ctypes.c_void_p) for name in ("gate", "up", "grad", "neuron", "token")),
        *((name, ctypes.c_void_p) for name in ("hidden", "d_gate", "d_up", "d_neuron", "d_token")),
    ]


def available() -> bool:
    """Whether a compiler is here that makes the library."""
    return _library(1) is not None


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


def _loaded(k: int) -> ctypes.CDLL:
    library = _library(k)
    if library is None:
        raise RuntimeError("the native kernel could not be compiled")
    return library


@cache
def _library(k: int) -> ctypes.CDLL | None:
    """The library for K activations; None if it cannot be had here."""
    try:
        library = ctypes.CDLL(str(_compiled(k)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.warning("no native kernel for the CPU, a slower one is used: %s", said.strip()[-400:])
        return None
    for name in ("neurons_at_once", "positions_at_once"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def _compiled(k: int) -> Path:
    """Path of the library, compiled if it is not there yet.

    Raises:
        OSError: no compiler, or no folder to write to.
        subprocess.SubprocessError: the compiler failed.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise FileNotFoundError(f"none of the compilers {', '.join(COMPILERS)} is installed")
    source = files("polyglu.model.kernels").joinpath("mixture.cpp").read_text()
    command = [*compiler.split(), *FLAGS, f"-DACTIVATIONS={k}"]
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([source, *command, version, _processor()]).encode()).hexdigest()
    path = _cache_folder() / f"mixture_{k}_{key[:32]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run(
                [*command, "-x", "c++", "-", "-o", str(made)],
                input=source, capture_output=True, text=True, check=True, timeout=SECONDS,
            )  # fmt: skip
            made.replace(path)
    return path


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "polyglu"


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may serve machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return platform.machine() + "".join(line for line in lines[:40] if line.startswith(("model name", "flags")))
