"""Where documents begin and end inside the rows of a batch. Documents never see each other.

row 0: [ a a a a | b b ]      cu_seqlens over the flattened rows: 0 4 6 | 6+3 ... = [0, 4, 6, 9, 12]
row 1: [ c c c | d d d ]      lengths: [4, 2, 3, 3]      positions: 0 1 2 3 0 1 0 1 2 0 1 2
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Documents of a batch of ``B`` rows and ``T`` columns, flattened to ``N = B * T`` tokens."""

    lengths: tuple[int, ...]
    """Tokens of each document, in order; they sum to N."""
    cu_seqlens: Tensor
    """``[documents + 1]`` int32 on the batch's device: where each document begins, and N."""
    positions: Tensor
    """``[N]`` int64: position of each token in its document."""
    whole_rows: bool
    """Every row is one document."""

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @classmethod
    def of(cls, shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> "Packing":
        """Documents of rows ``[B, T]``; without ``cu_seqlens`` each row is one document.

        A ``cu_seqlens`` on the CPU is read without waiting for the device.

        Raises:
            ValueError: cu_seqlens does not rise from 0 to B * T, or a document crosses the end of a row.
        """
        rows, columns = shape
        bounds = list(range(0, rows * columns + 1, columns)) if cu_seqlens is None else cu_seqlens.tolist()
        lengths = tuple(end - start for start, end in zip(bounds, bounds[1:], strict=False))
        if bounds[:1] != [0] or bounds[-1] != rows * columns or min(lengths, default=0) <= 0:
            raise ValueError(f"cu_seqlens must rise from 0 to {rows * columns} (rows * columns), got {bounds[:8]}...")
        if not set(range(0, rows * columns + 1, columns)) <= set(bounds):
            raise ValueError("cu_seqlens: a document crosses the end of a row")
        starts = torch.tensor(bounds, dtype=torch.int32)
        per_document = torch.tensor(lengths)
        positions = torch.arange(rows * columns) - torch.repeat_interleave(starts[:-1].long(), per_document)
        return cls(
            lengths=lengths,
            cu_seqlens=starts.to(device, non_blocking=True),
            positions=positions.to(device, non_blocking=True),
            whole_rows=len(lengths) == rows,
        )
