"""The data order as a pure function: sample ``i`` of a run -> (source, window), from seed, data and mix alone.

    step ──► cumulative quota of each source (exact, never a draw) ──► (source, ordinal) of the step's samples
         ──► shuffled within the step ──► ordinal -> (epoch, place) ──► keyed permutation of the epoch ──► window

A resume is one integer, and any number of ranks sees the same global order. Steps are computed in blocks, for speed;
nothing that is kept between them decides anything.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
ROUNDING = 1e-6
"""Windows within which a target counts as whole, against the rounding of sums of shares."""
BLOCK_SAMPLES = 8192
"""Samples whose places are computed at once."""


@dataclass(frozen=True)
class MixSchedule:
    """Share of each source: constant, then linear to ``end`` over the last part of the run."""

    start: tuple[float, ...]
    """Shares until annealing starts; they sum to 1."""
    end: tuple[float, ...]
    """Shares at ``total_steps``."""
    anneal_start: float
    """Share of the run after which annealing starts."""
    total_steps: int
    """Steps of the run."""

    def at(self, step: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """Shares at one step ``[sources]`` or at many ``[steps, sources]``."""
        left = 1.0 - self.anneal_start
        progress = np.asarray(step, dtype=np.float64)[..., None] / self.total_steps - self.anneal_start
        blend = np.clip(progress / left, 0.0, 1.0) if left > 0 else np.zeros_like(progress)
        return np.asarray(self.start) * (1.0 - blend) + np.asarray(self.end) * blend


class SampleOrder:
    """Which window of which source each sample of a run is.

    Args:
        windows: windows of each source.
        digests: identity of each source's data; other data, other order.
        mix: shares of the sources.
        samples_per_step: samples of a global batch.
        seed: of the run.
    """

    def __init__(
        self, windows: Sequence[int], digests: Sequence[str], mix: MixSchedule, samples_per_step: int, seed: int
    ) -> None:
        self.windows, self.samples_per_step, self.seed = tuple(windows), samples_per_step, seed
        self.mix = mix
        self._source_keys = _keys(f"{seed}/{digest}" for digest in digests)
        self.quotas = self._quotas(np.arange(mix.total_steps))
        """Windows taken from each source before each step ``[steps + 1, sources]``."""
        self._block = lru_cache(maxsize=1)(self._samples)

    def step(self, step: int) -> tuple[Integers, Integers]:
        """Sources and windows ``[samples_per_step]`` of one step's samples, in global order.

        Steps beyond the run, which stand in for data that was passed over, have the shares of its end.

        Raises:
            IndexError: the step is negative.
        """
        if step < 0:
            raise IndexError(f"step {step} of a run")
        steps = max(1, BLOCK_SAMPLES // self.samples_per_step)
        while len(self.quotas) < step + 2:
            more = self._quotas(np.full(self.mix.total_steps, self.mix.total_steps))
            self.quotas = np.vstack([self.quotas, self.quotas[-1] + more[1:]])
        first = step // steps * steps
        sources, windows = self._block(first, min(steps, len(self.quotas) - 1 - first))
        return sources[step % steps], windows[step % steps]

    def sample(self, index: int) -> tuple[int, int]:
        """Source and window of sample ``index``, counted over the whole run."""
        step, place = divmod(index, self.samples_per_step)
        sources, windows = self.step(step)
        return int(sources[place]), int(windows[place])

    def _quotas(self, steps: Integers) -> Integers:
        """Exact quotas ``[steps + 1, sources]`` of successive steps with the mix of the given ones."""
        targets = np.cumsum(self.mix.at(steps), axis=0) * self.samples_per_step
        return cumulative_quotas(np.vstack([np.zeros(len(self.windows)), targets]), self.samples_per_step)

    def _samples(self, first: int, steps: int) -> tuple[Integers, Integers]:
        """Sources and windows ``[steps, samples_per_step]`` from step ``first`` on."""
        quotas = self.quotas[first : first + steps + 1]
        counts = np.diff(quotas, axis=0)  # [steps, sources]
        sources = np.repeat(np.tile(np.arange(len(self.windows)), len(counts)), counts.ravel())
        # The n-th of its source in its step has the ordinal (samples of the source before that step) + n.
        begins = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
        ordinals = np.arange(len(sources)) + np.repeat((quotas[:-1] - begins).ravel(), counts.ravel())
        windows = np.empty_like(ordinals)
        for source in range(len(self.windows)):
            mine = sources == source
            windows[mine] = self._windows(source, ordinals[mine])
        keys = _keys(f"{self.seed}/step/{first + step}" for step in range(len(counts)))
        n = self.samples_per_step
        shuffle = permute(np.tile(np.arange(n), (len(counts), 1)), n, keys[:, None])
        in_order = np.arange(len(counts))[:, None] * n + shuffle
        return sources[in_order], windows[in_order]

    def _windows(self, source: int, ordinals: Integers) -> Integers:
        """Window of the n-th sample drawn from a source: each epoch is a permutation of its own."""
        epochs, places = np.divmod(ordinals, self.windows[source])
        distinct, which = np.unique(epochs, return_inverse=True)
        keys = _keys(f"{self._source_keys[source]}/{epoch}" for epoch in distinct)
        return permute(places, self.windows[source], keys[which])


def cumulative_quotas(targets: NDArray[np.float64], samples_per_step: int) -> Integers:
    """Whole samples of each source up to each step, always less than one sample from the target.

    Each whole sample of a source may be taken once the target's ceiling allows it, and must be taken once the floor
    demands it. Taking the one whose demand comes first always works (earliest deadline first; Tijdeman 1980 gives
    this bound for the chairman assignment problem).

    Args:
        targets: ``[steps + 1, sources]``, cumulative; row ``s`` sums to ``s * samples_per_step``.
        samples_per_step: samples of a step.

    Returns:
        ``[steps + 1, sources]``, never falling; row ``s`` sums to ``s * samples_per_step``.
    """
    floors = np.floor(targets + ROUNDING).astype(np.int64)
    whole = np.ceil(targets - ROUNDING).astype(np.int64) == floors
    spare = np.arange(len(floors)) * samples_per_step - floors.sum(axis=1)
    # Each step's sources by when their next sample is demanded; those that may not have one yet come last.
    demanded = np.stack([np.searchsorted(column, column + 1) for column in floors.T], axis=1)
    ranking = np.argsort(np.where(whole, len(floors) + 1, demanded), axis=1, kind="stable")
    extra = np.zeros_like(whole)  # whether a source has one sample more than its floor
    np.put_along_axis(extra, ranking, np.arange(floors.shape[1]) < spare[:, None], axis=1)
    # That is all, unless a source had one more in the step before and its floor stands still: then it keeps it.
    keeps = np.zeros_like(whole)
    keeps[1:] = ~whole[:-1] & (floors[1:] == floors[:-1])
    steps = np.flatnonzero(keeps.any(axis=1))
    for step, may, ranks, most in zip(
        steps.tolist(), keeps[steps].tolist(), ranking[steps].tolist(), spare[steps].tolist(), strict=True
    ):
        kept = [source for source, had in enumerate(extra[step - 1].tolist()) if had and may[source]]
        if kept:
            chosen = (kept + [source for source in ranks if source not in kept])[:most]
            extra[step] = [source in chosen for source in range(len(may))]
    quotas: Integers = floors + extra
    return quotas


def permute(index: Integers, size: int, key: int | NDArray[np.uint64]) -> Integers:
    """A permutation of ``range(size)`` chosen by ``key``, at the given places only.

    A four-round Feistel network over the next even number of bits; values outside the range are fed through again
    (cycle walking), so nothing of length ``size`` is ever made.

    Args:
        index: places, of any shape.
        size: length of the permutation.
        key: one for all places, or an array that broadcasts to theirs.
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    values = np.asarray(index).astype(np.uint64).ravel()
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), np.shape(index)).ravel()
    outside = np.arange(len(values))
    while len(outside):
        walking, walking_keys = values[outside], keys[outside]
        left, right = walking >> shift, walking & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(right + (walking_keys + np.uint64(round_number))) & mask)
        walking = (left << shift) | right
        values[outside] = walking
        outside = outside[walking >= size]
    return values.astype(np.int64).reshape(np.shape(index))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of 64-bit values (splitmix64's finaliser)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(texts: Iterable[str]) -> NDArray[np.uint64]:
    """A 64-bit key of each text."""
    return np.array([int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in texts], np.uint64)
