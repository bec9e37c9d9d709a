"""From token chunks to packed batches: documents masked, mix exact, resume by one integer.

    TokenSource (chunks on disk) ─┐
    SampleOrder.step(s) ──────────┴─► windows of seq_length + 1 tokens ──► MicroBatch (one per accumulation step)

A window's inputs are its first ``seq_length`` tokens, its targets the same moved by one. A document ends with EOS;
what follows is another document, which attention, positions and routing keep apart. EOS itself predicts nothing:
nothing of the next document precedes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyglu.data.chunks import Tokens, TokenSource
from polyglu.data.order import Integers, MixSchedule, SampleOrder
from polyglu.errors import PolygluError

IGNORED = -100
"""Target of a position that is not trained."""


@dataclass(frozen=True)
class MicroBatch:
    """What one device feeds forward at once: B rows of T tokens."""

    input_ids: Tensor
    """``[B, T]`` int64."""
    targets: Tensor
    """``[B, T]`` int64, ``IGNORED`` where nothing is predicted."""
    cu_seqlens: Tensor
    """``[documents + 1]`` int32 on the CPU: bounds of the documents in the flattened rows."""
    sample_ids: Tensor
    """``[B]`` int64: index of each row's sample in the run."""

    @property
    def n_targets(self) -> int:
        """Positions that are trained."""
        return int((self.targets != IGNORED).sum())

    @property
    def attention_pairs(self) -> int:
        """Pairs of a position and one of its document that it attends to, itself included."""
        lengths = self.cu_seqlens.long().diff()
        return int((lengths * (lengths + 1) // 2).sum())

    def pin_memory(self) -> "MicroBatch":
        """The batch in page-locked memory, from which ``to`` copies without holding up the host."""
        return MicroBatch(
            self.input_ids.pin_memory(), self.targets.pin_memory(), self.cu_seqlens, self.sample_ids.pin_memory()
        )

    def to(self, device: torch.device) -> "MicroBatch":
        """The batch on a device; ``cu_seqlens`` stays, for it is read by the host."""
        tensors = (self.input_ids, self.targets, self.sample_ids)
        input_ids, targets, sample_ids = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return MicroBatch(input_ids, targets, self.cu_seqlens, sample_ids)


class TokenLoader:
    """Batches of any step of a run, for one rank.

    Args:
        sources: open sources, in the order of the mix.
        mix: shares of the sources over the run.
        seq_length: T.
        rows: rows of a micro batch, B.
        accumulation: micro batches of a step on each rank.
        rank: this process.
        world_size: processes.
        seed: of the run.
        vocab_size: rows of the model's embedding.

    Raises:
        PolygluError: a source with a share is shorter than one window.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        mix: MixSchedule,
        *,
        seq_length: int,
        rows: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        vocab_size: int,
    ) -> None:
        self.sources, self.seq_length, self.vocab_size = sources, seq_length, vocab_size
        windows = [(source.n_tokens - 1) // seq_length for source in sources]
        for source, count, first, last in zip(sources, windows, mix.start, mix.end, strict=True):
            if count < 1 and (first > 0 or last > 0):
                raise PolygluError(
                    f"{source.folder}: {source.n_tokens} tokens are less than one window of seq_length + 1 = "
                    f"{seq_length + 1}; tokenise more data or choose a shorter model.seq_length."
                )
        micro, row = np.indices((accumulation, rows))
        self._places = (micro * world_size + rank) * rows + row  # [accumulation, B], this rank's in the global order
        self._eos_ids = np.array([source.eos_id for source in sources])
        samples_per_step = rows * accumulation * world_size
        digests = [source.digest for source in sources]
        self.order = SampleOrder([max(1, count) for count in windows], digests, mix, samples_per_step, seed)
        self.identity: dict[str, Any] = {
            "sources": {source.name: source.digest for source in sources},
            "mix": [list(mix.start), list(mix.end), mix.anneal_start],
            "total_steps": mix.total_steps,
            "seq_length": seq_length,
            "samples_per_step": samples_per_step,
            "seed": seed,
        }

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's micro batches of one step.

        Raises:
            PolygluError: a token id outside the vocabulary, or a chunk that has become shorter.
        """
        sources, windows = (values[self._places] for values in self.order.step(step))
        sample_ids = step * self.order.samples_per_step + self._places
        return pack_windows(self._read(sources, windows), self._eos_ids[sources], sample_ids)

    def _read(self, sources: Integers, windows: Integers) -> Tokens:
        """Tokens ``[accumulation, B, T + 1]`` of windows ``[accumulation, B]`` of the given sources."""
        tokens = np.empty((*windows.shape, self.seq_length + 1), dtype=np.uint32)
        starts = windows * self.seq_length
        rows = tokens.reshape(-1, self.seq_length + 1)
        for into, source, start in zip(rows, sources.ravel().tolist(), starts.ravel().tolist(), strict=True):
            self.sources[source].read_into(into, start)
        if tokens.max() >= self.vocab_size:
            micro, row, column = np.argwhere(tokens >= self.vocab_size)[0]
            raise PolygluError(
                f"{self.sources[sources[micro, row]].folder}: token {starts[micro, row] + column} has id "
                f"{tokens[micro, row, column]}, outside the model's vocab_size {self.vocab_size}; the data was made "
                "with another tokenizer or is damaged."
            )
        return tokens


def pack_windows(tokens: Tokens, eos_ids: Integers, sample_ids: Integers) -> list[MicroBatch]:
    """Windows as micro batches, all at once, for one by one takes longer than reading them.

    Args:
        tokens: ``[micro batches, B, T + 1]``.
        eos_ids: ``[micro batches, B]``; a document ends after each of them in its row.
        sample_ids: ``[micro batches, B]``.
    """
    inputs, targets = tokens[..., :-1].astype(np.int64), tokens[..., 1:].astype(np.int64)
    ends = tokens[..., :-1] == eos_ids[..., None].astype(np.uint32)
    targets.reshape(-1)[np.flatnonzero(ends)] = IGNORED
    ends[..., -1] = True  # a row's end ends its last document too
    micro, place = np.divmod(np.flatnonzero(ends), inputs[0].size)
    bounds = np.zeros(len(micro) + len(tokens), dtype=np.int32)  # each micro batch's begin with 0
    bounds[np.arange(len(micro)) + micro + 1] = place + 1
    cu_seqlens = torch.split(torch.from_numpy(bounds), (np.bincount(micro) + 1).tolist())
    input_ids, target_ids, samples = (torch.from_numpy(array).unbind() for array in (inputs, targets, sample_ids))
    return [MicroBatch(*parts) for parts in zip(input_ids, target_ids, cu_seqlens, samples, strict=True)]
