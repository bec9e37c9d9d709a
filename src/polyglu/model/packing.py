"""Where documents begin and end inside the rows of a batch. Documents never see each other.

row 0: [ a a a a | b b ]      cu_seqlens over the flattened rows: 0 4 6 | 6+3 ... = [0, 4, 6, 9, 12]
row 1: [ c c c | d d d ]      lengths: [4, 2, 3, 3]      positions: 0 1 2 3 0 1 0 1 2 0 1 2
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Positions whose running mean is one matrix product."""
STEPS = ((256, 16), (2**62, 64))
"""Documents of fewer tokens -> their length is rounded up to a multiple. Attention is called once for each length; and
for every shape of a bf16 product, oneDNN compiles code on a CPU and keeps it, about a megabyte."""


class Stacks(NamedTuple):
    """Documents of a batch, padded to a few lengths and stacked by them.

    A padded place repeats the last token of its document. To causal attention that is nothing: the document does not
    look at what comes later, and of what comes later nothing is taken.
    """

    tokens: Tensor
    """``[places]`` int64: which token stands there, stack after stack."""
    places: Tensor
    """``[N]`` int64: where each token stands."""
    shapes: tuple[tuple[int, int], ...]
    """Of each stack: documents, and places of each."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Stacks":
        """For tokens of documents that lie one after another."""
        by_length: dict[int, list[int]] = {}
        for document, length in enumerate(lengths):
            step = next(step for limit, step in STEPS if length < limit)
            by_length.setdefault(-(-length // step) * step, []).append(document)
        own = torch.tensor(lengths)
        starts = own.cumsum(0) - own
        tokens, moved, first = [], torch.empty_like(starts), 0
        for length, documents in sorted(by_length.items()):
            start, last = starts[documents, None], (starts + own)[documents, None] - 1
            tokens.append((start + torch.arange(length)).minimum(last).flatten())
            moved[documents] = first + length * torch.arange(len(documents)) - starts[documents]
            first += length * len(documents)
        places = torch.arange(sum(lengths)) + moved.repeat_interleave(own, output_size=sum(lengths))
        shapes = tuple((len(documents), length) for length, documents in sorted(by_length.items()))
        return cls(torch.cat(tokens).to(device), places.to(device), shapes)

    def stack(self, x: Tensor) -> list[Tensor]:
        """``[N, ...]`` -> ``[documents, places, ...]`` of each stack."""
        stacked = torch.split(_rows(x, self.tokens), [documents * length for documents, length in self.shapes])
        return [part.view(*shape, *x.shape[1:]) for part, shape in zip(stacked, self.shapes, strict=True)]

    def unstack(self, stacks: Sequence[Tensor]) -> Tensor:
        """Back to ``[N, ...]``."""
        return _rows(torch.cat([stack.flatten(0, 1) for stack in stacks]), self.places)


@dataclass(frozen=True)
class Packing:
    """Documents of a batch of ``B`` rows and ``T`` columns, flattened to ``N = B * T`` tokens.

    All but ``lengths`` is made on the device, from bounds that are copied there without waiting.
    """

    lengths: tuple[int, ...]
    """Tokens of each document, in order; they sum to N. For the host: code that is compiled must not read it."""
    cu_seqlens: Tensor
    """``[documents + 1]`` int32 on the batch's device: where each document begins, and N."""
    max_length: int
    """Tokens of the longest document; at least 2, for kernels take queries of one token for decoding."""
    positions: Tensor
    """``[N]`` int64: position of each token in its document."""
    last: Tensor
    """``[N]`` int64: index of the last token of each token's document."""
    whole_rows: bool
    """Every row is one document."""
    within: Tensor
    """fp32 ``[B, T / BLOCK, BLOCK, BLOCK]``, T rounded up: 1 where a block's row may look at its column."""
    before: Tensor
    """fp32 ``[B, T, T / BLOCK]``: 1 where a position may look at the last document of an earlier block."""

    @classmethod
    def of(cls, shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> "Packing":
        """Documents of rows ``[B, T]``; without ``cu_seqlens`` each row is one document.

        A ``cu_seqlens`` on the CPU is read without waiting for the device.

        Raises:
            ValueError: cu_seqlens does not rise from 0 to B * T, or a document crosses the end of a row.
        """
        rows, columns = shape
        tokens = rows * columns
        bounds = list(range(0, tokens + 1, columns)) if cu_seqlens is None else cu_seqlens.tolist()
        lengths = tuple(end - start for start, end in pairwise(bounds))
        if bounds[:1] != [0] or bounds[-1] != tokens or min(lengths, default=0) <= 0:
            raise ValueError(f"cu_seqlens must rise from 0 to {tokens} (rows * columns), got {bounds[:8]}...")
        if not set(range(0, tokens + 1, columns)) <= set(bounds):
            raise ValueError("cu_seqlens: a document crosses the end of a row")
        on_host = torch.tensor(bounds, dtype=torch.int32, pin_memory=device.type == "cuda")
        on_device = on_host.to(device, non_blocking=True)
        index = torch.arange(tokens, device=device)
        document = torch.searchsorted(on_device, index, right=True)  # from 1 on
        positions, last = index - on_device[document - 1], on_device[document].long() - 1
        within, before = _masks(positions.view(rows, columns))
        return cls(
            lengths=lengths,
            cu_seqlens=on_device,
            max_length=max(2, *lengths),
            positions=positions,
            last=last,
            whole_rows=len(lengths) == rows,
            within=within,
            before=before,
        )

    @cached_property
    def stacks(self) -> Stacks:
        """Its documents, stacked by length."""
        return Stacks.of(self.lengths, self.positions.device)

    def running_mean(self, x: Tensor) -> Tensor:
        """Mean of ``[B, T, R]`` over the document up to and including each position: the same shape.

        Sums inside blocks, and over earlier blocks of which the document is the last one: matrix products with zeros
        and ones, whose shapes do not depend on the documents. What a zero meets adds nothing, not even a rounding.
        """
        rows, columns, width = x.shape
        blocks = F.pad(x, (0, 0, 0, -columns % BLOCK)).view(rows, -1, BLOCK, width)
        inside = self.within.to(x.dtype) @ blocks  # [B, T / BLOCK, BLOCK, R]
        earlier = self.before.to(x.dtype) @ inside[:, :, -1]  # [B, T, R]
        total = inside.flatten(1, 2)[:, :columns] + earlier
        return total / (self.positions.view(rows, columns, 1) + 1)


def pack_rows(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Put documents behind each other: input ids ``[1, N]``, and their bounds ``[documents + 1]`` on the CPU."""
    bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32)
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return flat[None].to(device), bounds


def groups_of_tokens(
    lengths: Sequence[int], max_tokens: int, max_rows: int | None = None, first: Sequence[int] | None = None
) -> Iterator[slice]:
    """Cut rows, in order, into groups of at most ``max_tokens`` tokens and ``max_rows`` rows; a longer row is alone.

    Args:
        lengths: tokens of each row.
        max_tokens: of a group.
        max_rows: of a group.
        first: tokens of a row that begins a group, if that is more: with no row before it, it shares nothing.
    """
    start, total = 0, 0
    for index, (length, whole) in enumerate(zip(lengths, first or lengths, strict=True)):
        begins = index > start and (total + length > max_tokens or index - start == max_rows)
        if begins:
            yield slice(start, index)
            start, total = index, 0
        total += whole if begins else length
    if start < len(lengths):
        yield slice(start, len(lengths))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``; as an embedding, whose backward is faster."""
    return F.embedding(index, x.flatten(1)).view(-1, *x.shape[1:])


def _masks(positions: Tensor) -> tuple[Tensor, Tensor]:
    """``within`` and ``before`` for positions ``[B, T]``: a token looks back as far as its position in the document."""
    rows, columns = positions.shape
    index = torch.arange(columns, device=positions.device)
    block = torch.arange(BLOCK, device=positions.device)
    distance = block[:, None] - block  # [BLOCK, BLOCK]
    reach = F.pad(positions, (0, -columns % BLOCK)).view(rows, -1, BLOCK, 1)
    within = (distance >= 0) & (distance <= reach)
    ends = torch.arange(BLOCK - 1, within.shape[1] * BLOCK, BLOCK, device=positions.device)  # of the blocks
    distance = index[:, None] - ends  # [T, T / BLOCK]
    before = (distance > 0) & (distance <= positions[:, :, None])
    return within.float(), before.float()
