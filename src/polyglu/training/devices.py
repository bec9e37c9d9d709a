"""What a device can do: compute dtype, peak speed, memory in use; and what of its work counts as the model's."""

import ctypes
import resource
import time
from typing import NamedTuple

import torch

from polyglu.model.architecture import PolychromaticLM

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
    "3090": 71e12,
}
"""Dense bf16 peak in FLOP/s, by a part of the device's name (vendors' data sheets)."""
PEAK_SECONDS = 0.3
"""In which another device's peak is looked for: a system may need that long to give each thread a core of its own."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of ``mallopt`` (glibc's malloc.h)."""


def pick_device(local_rank: int = 0) -> torch.device:
    """The rank's GPU if there is one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def keep_freed_memory() -> None:
    """Have this process keep memory that is freed for the next tensor, where the C library is glibc.

    Of itself, glibc maps each large tensor anew and unmaps it when freed: in every step on a CPU the system then clears
    hundreds of MB, page by page (mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype of matrix products for ``auto``, ``bf16`` or ``fp32``; auto takes bf16 where it is fast."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = any(torch.cpu.get_capabilities().get(name, False) for name in ("amx_bf16", "avx512_bf16"))
        precision = "bf16" if fast else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


class Flops(NamedTuple):
    """FLOPs of forward and backward together, those of recomputation not counted."""

    token: int
    """6 for each parameter (the head's are the embedding's): what MFU usually counts."""
    pair: int
    """What attention adds for each pair of a position and one that it attends to: 12 d for each head and layer, of
    the two products with keys and values. Pairs that causality or documents rule out are not counted."""


def flops_of(model: PolychromaticLM) -> Flops:
    """What a token, and a pair of tokens, costs a model."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Flops(6 * parameters, 12 * config.n_layers * config.n_q_heads * config.head_dim)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s that MFU is a share of: the data sheet's, or on other devices that of a measured matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak
    size = 1024
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + PEAK_SECONDS
    while (start := time.perf_counter()) < end:
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Largest memory in use so far, in bytes: allocated on the GPU, or resident of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
