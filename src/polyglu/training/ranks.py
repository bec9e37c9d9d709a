"""The processes of a run: what they add up, agree on and wait for.

A process that a launcher (deepspeed, torchrun) started is one rank of several; any other is alone.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from polyglu.errors import EXIT_BAD_INPUT
from polyglu.training.devices import pick_device

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long ranks wait for one that reads and hashes data or checkpoints for all."""


class Ranks:
    """One process among ``world_size``; every method is called by all of them."""

    def __init__(self, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        self.device, self.rank, self.world_size = device, rank, world_size

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in fp64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.add_up(total)
        return [float(value) for value in total]

    def add_up(self, tensor: Tensor) -> None:
        """Sum a tensor on the device over all ranks, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """Each rank's value."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def agree(self, decide: Callable[[], T]) -> T:
        """What ``decide`` returns on rank 0, where alone it is called; it should be small.

        Raises:
            Exception: what ``decide`` raised, on rank 0. The others leave without a word then: rank 0 says it.
        """
        answer: list[Any] = [None, False]
        failure = None
        if self.rank == 0:
            try:
                answer = [decide(), True]
            except Exception as error:
                failure = error
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(answer, device=self.device)
        decided, is_decided = answer
        if not is_decided:
            raise failure or SystemExit(EXIT_BAD_INPUT)
        return decided  # type: ignore[no-any-return]

    def close(self) -> None:
        """Leave the group."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def launched_distributed() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def connect() -> Ranks:
    """Join the other ranks, if there are any, on this process's device."""
    device = pick_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not launched_distributed():
        return Ranks(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(device, torch.distributed.get_rank(), torch.distributed.get_world_size())
