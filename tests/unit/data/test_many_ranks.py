"""A run of 1,024 ranks, simulated: who reads what, in which order, and in which shares."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import random_documents, write_token_source

from polyglu.data.chunks import TokenSource, open_source
from polyglu.data.dataloader import TokenLoader
from polyglu.data.order import MixSchedule, SampleOrder

RANKS = 1024
MIX = MixSchedule(start=(0.70, 0.25, 0.05), end=(0.85, 0.10, 0.05), anneal_start=0.8, total_steps=40)
T = 16


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[TokenSource]:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    sizes = {"math": 30_000, "stem": 9_000, "code": 2_100}
    return [
        open_source(write_token_source(folder / name, random_documents(rng, size), chunk_tokens=7_000))
        for name, size in sizes.items()
    ]


def loader(sources: list[TokenSource], rank: int, world_size: int, rows: int, accumulation: int, seed: int):
    return TokenLoader(
        sources,
        MIX,
        seq_length=T,
        rows=rows,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        seed=seed,
        vocab_size=64,
    )


@settings(max_examples=4, deadline=None, phases=[Phase.generate])  # to shrink a thousand ranks takes minutes
@given(
    rows=st.integers(1, 2), accumulation=st.integers(1, 2), step=st.integers(0, 39), seed=st.integers(0, 99),
    some=st.lists(st.integers(0, RANKS - 1), min_size=3, max_size=3),
)  # fmt: skip
def test_1024_ranks_read_the_samples_of_one_rank_each_once(
    sources: list[TokenSource], rows: int, accumulation: int, step: int, seed: int, some: list[int]
) -> None:
    """Micro batch by micro batch, rank by rank, row by row: what a single rank reads in the same step."""
    ranks = [loader(sources, rank, RANKS, rows, accumulation, seed) for rank in range(RANKS)]
    own = {rank: ranks[rank].step(step) for rank in some}
    assert all(rank.identity == ranks[0].identity for rank in ranks)
    for rank in ranks[1:]:
        rank.order = ranks[0].order  # the same, by its identity; computed once, for the sake of time
    steps = [rank.step(step) for rank in ranks]
    for rank, batches in own.items():
        for mine, shared in zip(batches, steps[rank], strict=True):
            assert torch.equal(mine.sample_ids, shared.sample_ids) and torch.equal(mine.input_ids, shared.input_ids)

    alone = loader(sources, 0, 1, 8, RANKS * rows * accumulation // 8, seed).step(step)
    together = [batches[micro] for micro in range(accumulation) for batches in steps]
    for name in ("sample_ids", "input_ids", "targets"):
        assert torch.equal(*(torch.cat([getattr(batch, name) for batch in cut]) for cut in (together, alone)))
    size = RANKS * rows * accumulation
    assert torch.cat([batch.sample_ids for batch in together]).tolist() == list(range(step * size, (step + 1) * size))


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 4), accumulation=st.integers(1, 4), seed=st.integers(0, 99))
def test_shares_of_a_thousand_ranks_stay_within_one_window(rows: int, accumulation: int, seed: int) -> None:
    samples = RANKS * rows * accumulation
    run = SampleOrder([5_000_000, 900_000, 170_000], ["a", "b", "c"], MIX, samples, seed)
    target, drawn = np.zeros(3), np.zeros(3, dtype=int)
    for step in range(MIX.total_steps):
        annealed = max(0.0, (step / 40 - 0.8) / 0.2)
        target += [samples * (a + (b - a) * annealed) for a, b in zip(MIX.start, MIX.end, strict=True)]
        drawn += np.bincount(run.step(step)[0], minlength=3)
        assert drawn.sum() == samples * (step + 1)
        assert np.abs(drawn - target).max() < 1 + 1e-5
