"""The data order as a pure function: sample ``i`` of a run -> (source, window), from seed, data and mix alone.

    step ──► cumulative quota of each source (exact, never a draw) ──► (source, ordinal) of the step's samples
         ──► shuffled within the step ──► ordinal -> (epoch, place) ──► keyed permutation of the epoch ──► window

Nothing is remembered between steps: a resume is one integer, and any number of ranks sees the same global order.
"""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
ROUNDING = 1e-6
"""Windows within which a target counts as whole, against the rounding of sums of shares."""


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
        self.total_steps = mix.total_steps
        self._keys = [_key(f"{seed}/{digest}") for digest in digests]
        shares = mix.at(np.arange(mix.total_steps))
        targets = np.vstack([np.zeros(len(self.windows)), np.cumsum(shares, axis=0) * samples_per_step])
        self.quotas = cumulative_quotas(targets, samples_per_step)

    def step(self, step: int) -> tuple[Integers, Integers]:
        """Sources and windows ``[samples_per_step]`` of one step's samples, in global order."""
        before, after = self.quotas[step], self.quotas[step + 1]
        sources = np.repeat(np.arange(len(self.windows)), after - before)
        ordinals = np.concatenate([np.arange(first, last) for first, last in zip(before, after, strict=True)])
        windows = np.empty_like(ordinals)
        for source in np.unique(sources):
            mine = sources == source
            windows[mine] = self._window(int(source), ordinals[mine])
        shuffle = permute(np.arange(len(sources)), len(sources), _key(f"{self.seed}/step/{step}"))
        return sources[shuffle], windows[shuffle]

    def sample(self, index: int) -> tuple[int, int]:
        """Source and window of sample ``index``, counted over the whole run."""
        step, place = divmod(index, self.samples_per_step)
        sources, windows = self.step(step)
        return int(sources[place]), int(windows[place])

    def _window(self, source: int, ordinals: Integers) -> Integers:
        """Window of the n-th sample drawn from a source: each epoch is a permutation of its own."""
        size = self.windows[source]
        epochs, places = np.divmod(ordinals, size)
        result = np.empty_like(ordinals)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            result[mine] = permute(places[mine], size, _key(f"{self._keys[source]}/{epoch}"))
        return result


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
    ceilings = np.ceil(targets - ROUNDING).astype(np.int64).tolist()
    demands = [floors[:, source].tolist() for source in range(targets.shape[1])]
    taken = [0] * len(demands)
    quotas = np.zeros_like(floors)
    for step, due in enumerate(floors.tolist()):
        taken = [max(now, least) for now, least in zip(taken, due, strict=True)]
        spare = step * samples_per_step - sum(taken)
        if spare:
            allowed = [source for source, most in enumerate(ceilings[step]) if taken[source] < most]
            allowed.sort(key=lambda source: bisect_left(demands[source], taken[source] + 1, lo=step))
            for source in allowed[:spare]:
                taken[source] += 1
        quotas[step] = taken
    return quotas


def permute(index: Integers, size: int, key: int) -> Integers:
    """A permutation of ``range(size)`` chosen by ``key``, at the given places only.

    A four-round Feistel network over the next even number of bits; values outside the range are fed through again
    (cycle walking), so nothing of length ``size`` is ever made.
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = np.uint64((1 << half) - 1)
    values = np.asarray(index).astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(right + np.uint64((key + round_number) & 0xFFFFFFFFFFFFFFFF)) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= size
    return values.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of 64-bit values (splitmix64's finaliser)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
