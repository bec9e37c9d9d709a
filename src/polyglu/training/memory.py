"""The micro batch that fits into memory. Only how a step is cut depends on it: its samples and its sum stay the same.

    rows of a step on a rank ──► divisors: 1, 2, 4, ... ──► try each on all ranks ──► the largest that fits

A try is one forward and backward pass of the run's own model, before the first step, that leaves no trace. A GPU says
when memory is out. A CPU does not, the kernel kills the process: there the peak of a size is forecast from the smaller
one's, and a size is tried only if it will fit.
"""

import gc
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyglu.data.dataloader import MicroBatch
from polyglu.errors import PolygluError
from polyglu.model.config import LoopSection, ModelConfig
from polyglu.training.devices import peak_memory
from polyglu.training.loss import LanguageModelLoss, batch_noise

logger = logging.getLogger(__name__)

CPU_SHARE = 0.8
"""Share of the memory available on a CPU that an automatic size may take; the rest is the data's and the system's."""
GPU_HEADROOM = 0.04
"""Share of a GPU that an automatic size leaves free: for fragments, and for libraries that allocate later."""
CPU_RESERVE = 5
"""On a CPU, sizes of the weights to come: AdamW's moments, whose zeros take memory when first written, and a save's
copy of weights and moments."""

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Ranks(Protocol):
    """What the search asks of the processes of a run."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks; all of them call it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a pass means that memory is out: on a GPU, or refused by the system on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def rows_per_step(settings: LoopSection) -> int:
    """Rows of a step on each rank; under ``micro_batch_size: auto``, ``grad_accum_steps`` says it alone."""
    size = settings.micro_batch_size
    return settings.grad_accum_steps * (1 if size == "auto" else size)


def divisors(rows: int) -> list[int]:
    """Micro batches into which the rows of a step can be cut evenly, ascending."""
    return [size for size in range(1, rows + 1) if rows % size == 0]


def smaller(micro_batch: int, rows: int) -> int | None:
    """The size to go on with when ``micro_batch`` is too large: half, or the next smaller divisor of ``rows``.

    None when ``micro_batch`` is 1.
    """
    if micro_batch % 2 == 0:
        return micro_batch // 2
    return max((size for size in divisors(rows) if size < micro_batch), default=None)


def choose_micro_batch(rows: int, start: int | None, fits: Callable[[int], bool]) -> int:
    """Search for a micro batch that fits.

    The automatic search ascends: a forecast needs the smaller sizes, only one try fails, and the tries together cost
    little more than the largest. Bisection would save little and begin with passes far beyond the memory.

    Args:
        rows: rows of a step on each rank.
        start: the largest size wanted, a divisor of ``rows``; None: the largest divisor that fits.
        fits: whether a size fits; it is called with divisors of ``rows``.

    Raises:
        PolygluError: not even one row fits.
    """
    size: int | None
    if start is None:
        size = max(itertools.takewhile(fits, divisors(rows)), default=None)
    else:
        size = start
        while size is not None and not fits(size):
            size = smaller(size, rows)
    if size is None:
        raise PolygluError(out_of_memory())
    return size


def out_of_memory() -> str:
    """What to say when a micro batch of one row is too large."""
    return (
        "training.micro_batch_size: not even 1 row fits into memory; set training.activation_checkpointing: full, "
        "or choose a shorter model.seq_length or a smaller model."
    )


def fit_micro_batch(
    settings: LoopSection, loss: LanguageModelLoss, ranks: Ranks, tau: float, reserve_bytes: int
) -> int:
    """The micro batch to train with, the same on all ranks, each of which calls it before the first step.

    A configured size is tried as it is and made smaller only when memory is out; ``auto`` takes the largest that
    leaves some memory free.

    Args:
        settings: size wanted and rows of a step.
        loss: the run's model with its loss, on its device; it is left as it was.
        ranks: the processes of the run.
        tau: routing temperature.
        reserve_bytes: of the device, that the engine will allocate later: buffers other than weights and gradients.

    Raises:
        PolygluError: not even one row fits.
    """
    rows, wanted = rows_per_step(settings), settings.micro_batch_size
    device = next(loss.parameters()).device
    weights = sum(parameter.nbytes for parameter in loss.parameters())
    held = resident_memory() + weights  # with the gradients
    if wanted == "auto" and device.type == "cuda":
        reserve_bytes += int(GPU_HEADROOM * torch.cuda.get_device_properties(device).total_memory)

    sizes = []

    def fits(size: int) -> bool:
        tried = max((other for other in divisors(rows) if other < size), default=None)
        if wanted == "auto" and device.type == "cpu" and tried is not None:
            peak = forecast(held, peak_memory(device), tried, size) + CPU_RESERVE * weights
            if ranks.sum([float(peak > memory_limit())])[0]:
                return False
        sizes.append(size)
        return not ranks.sum([float(not trial(loss, size, tau, reserve_bytes))])[0]

    size = choose_micro_batch(rows, None if wanted == "auto" else wanted, fits)
    if len(sizes) > 1:
        torch.compiler.reset()  # compiled code that serves several sizes is slower than what is made for one
    if wanted != size:
        announce(wanted, size, rows)
    return size


def announce(wanted: int | Literal["auto"], size: int, rows: int) -> None:
    """Say how a step is cut, if not as configured, and that nothing else changes."""
    reason = "auto" if wanted == "auto" else f"{wanted} does not fit into memory"
    logger.log(
        logging.INFO if wanted == "auto" else logging.WARNING,
        "training.micro_batch_size: %s; now %d, accumulated %d times: the same %d rows on each rank make a step, and "
        "the data and its order stay as they are",
        reason,
        size,
        rows // size,
        rows,
    )


def trial(loss: LanguageModelLoss, rows: int, tau: float, reserve_bytes: int) -> bool:
    """Whether a micro batch of ``rows`` rows fits beside ``reserve_bytes`` that are to come.

    Weights, their gradients, hooks, random numbers and the measured peak of a GPU are left as they were.
    """
    fits = True
    try:
        _forward_backward(loss, rows, tau, reserve_bytes)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        fits = False  # and no more in here: the error holds the frames of the pass, and they its tensors
    if not fits:
        gc.collect()  # frames that hold each other
    device = next(loss.parameters()).device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return fits


def _forward_backward(loss: LanguageModelLoss, rows: int, tau: float, reserve_bytes: int) -> None:
    """One pass, on stand-ins that share the weights' memory and are known to no engine, optimiser or hook.

    They have gradients already, as in the later micro batches of a step, which need the most.
    """
    config, device = loss.model.config, next(loss.parameters()).device
    reserved = torch.empty(reserve_bytes, dtype=torch.uint8, device=device)
    stand_ins: dict[str, Tensor] = {name: nn.Parameter(weight.detach()) for name, weight in loss.named_parameters()}
    for stand_in in stand_ins.values():
        stand_in.grad = torch.empty_like(stand_in).zero_()  # zeros_like would leave memory unused on a CPU
    batch = long_documents(config, rows).to(device)
    parts = functional_call(loss, stand_ins, (batch, tau, batch_noise(config, batch, seed=0)))
    ((parts.loss + parts.penalty) / batch.n_targets).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del reserved


def long_documents(config: ModelConfig, rows: int) -> MicroBatch:
    """The micro batch that needs the most: attention spans its rows, and the first has two documents, as others have.

    Were each row one document, less could be kept, and code be compiled that serves such batches alone.
    """
    length = config.seq_length
    ids = (torch.arange(rows * length) % config.vocab_size).view(rows, length)
    bounds = sorted({0, 1, *range(length, rows * length + 1, length)})
    return MicroBatch(ids, ids, torch.tensor(bounds, dtype=torch.int32), torch.arange(rows))


def forecast(held: int, peak: int, tried: int, size: int) -> int:
    """Peak memory of a size: what is ``held`` anyway, and the rest of the peak at ``tried`` in proportion.

    All in bytes. Rather too high: some of what a pass adds does not grow, and what grows does so with the rows.
    """
    return held + max(0, peak - held) * size // tried


def memory_limit() -> int:
    """Bytes that this process may grow to: its share of what is available to the ranks of this machine."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return resident_memory() + int(CPU_SHARE * available_memory() / local_ranks)


def resident_memory() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping: of the machine, or of the tightest control group around this process.

    Args:
        root: where ``proc`` and ``sys`` are mounted.
    """
    machine = 1024 * _fields(root / "proc/meminfo")["MemAvailable"]
    return min([machine, *_group_memory(root)])


def _group_memory(root: Path) -> Iterable[int]:
    """Bytes left in each control group with a limit, of version 2 or 1, from the process's own to the outermost."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            mount, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in kinds.split(","):
            mount, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / limit).exists() and (text := (folder / limit).read_text().strip()) != "max":
                # Cached file pages count as used, but are given up when memory is short.
                cached = _fields(folder / "memory.stat").get("inactive_file", 0)
                yield int(text) - int((folder / used).read_text()) + cached
            if folder == mount:
                break


def _fields(path: Path) -> dict[str, int]:
    """First number of each line of a file of the kernel, by the name before it."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1}
