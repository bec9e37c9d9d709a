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
from numpy.typing import NDArray
from torch import Tensor

from polyglu.data.chunks import TokenSource
from polyglu.data.order import MixSchedule, SampleOrder
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

    def to(self, device: torch.device) -> "MicroBatch":
        """The batch on a device; ``cu_seqlens`` stays, for it is read by the host."""
        tensors: tuple[Tensor, ...] = (self.input_ids, self.targets, self.sample_ids)
        if device.type == "cuda":
            tensors = tuple(tensor.pin_memory() for tensor in tensors)
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
        self.sources, self.seq_length, self.rows, self.accumulation = sources, seq_length, rows, accumulation
        self.rank, self.world_size, self.vocab_size = rank, world_size, vocab_size
        windows = [(source.n_tokens - 1) // seq_length for source in sources]
        for source, count, first, last in zip(sources, windows, mix.start, mix.end, strict=True):
            if count < 1 and (first > 0 or last > 0):
                raise PolygluError(
                    f"{source.folder}: {source.n_tokens} tokens are less than one window of seq_length + 1 = "
                    f"{seq_length + 1}; tokenise more data or choose a shorter model.seq_length."
                )
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
            PolygluError: a token id outside the vocabulary.
        """
        sources, windows = self.order.step(step)
        batches = []
        for micro in range(self.accumulation):
            first = (micro * self.world_size + self.rank) * self.rows
            places = range(first, first + self.rows)
            tokens = np.stack([self._window(sources[place], windows[place]) for place in places])
            ids = torch.arange(first, first + self.rows) + step * self.order.samples_per_step
            eos = [self.sources[sources[place]].eos_id for place in places]
            batches.append(pack_windows(tokens, np.array(eos), ids))
        return batches

    def _window(self, source_index: int, window: int) -> NDArray[np.int64]:
        source = self.sources[source_index]
        start = int(window) * self.seq_length
        tokens = source.read(start, start + self.seq_length + 1).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            position = start + int(tokens.argmax())
            raise PolygluError(
                f"{source.folder}: token {position} has id {tokens.max()}, outside the model's vocab_size "
                f"{self.vocab_size}; the data was made with another tokenizer or is damaged."
            )
        return tokens


def pack_windows(tokens: NDArray[np.int64], eos_ids: NDArray[np.int64], sample_ids: Tensor) -> MicroBatch:
    """Rows ``[B, T + 1]`` of tokens as a micro batch; a document ends after each row's ``eos_ids[row]``."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
    ends = inputs == eos_ids[:, None]
    targets[ends] = IGNORED
    ends[:, -1] = True  # a row's end ends its last document too
    bounds = np.concatenate([[0], np.flatnonzero(ends) + 1])
    return MicroBatch(
        input_ids=torch.from_numpy(inputs.copy()),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        sample_ids=sample_ids,
    )
