from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EOS, random_documents, write_token_source

from polyglu.data.chunks import open_source
from polyglu.data.dataloader import IGNORED, MicroBatch, TokenLoader, pack_windows
from polyglu.data.order import MixSchedule
from polyglu.errors import PolygluError

T = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    return [write_token_source(root / name, random_documents(rng, size)) for name, size in (("a", 5000), ("b", 2100))]


def loader(
    folders: list[Path], rank: int = 0, world_size: int = 1, rows: int = 2, accumulation: int = 4, **changes: int
):
    settings = {"seq_length": T, "seed": 0, "vocab_size": 64} | changes
    return TokenLoader(
        [open_source(folder) for folder in folders],
        MixSchedule(start=(0.7, 0.3), end=(0.9, 0.1), anneal_start=0.5, total_steps=30),
        rows=rows,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        **settings,
    )


def rows_of(batches: list[MicroBatch]) -> dict[int, tuple[list[int], list[int]]]:
    return {
        int(sample): (inputs.tolist(), targets.tolist())
        for batch in batches
        for sample, inputs, targets in zip(batch.sample_ids, batch.input_ids, batch.targets, strict=True)
    }


@pytest.mark.parametrize(
    ("world_size", "rows", "accumulation"), [(2, 2, 2), (4, 2, 1), (8, 1, 1), (1, 8, 1), (2, 1, 4)]
)
def test_any_number_of_ranks_sees_the_same_samples(
    folders: list[Path], world_size: int, rows: int, accumulation: int
) -> None:
    alone = loader(folders)
    ranks = [loader(folders, rank, world_size, rows, accumulation) for rank in range(world_size)]
    for step in (0, 7, 29):
        together: dict[int, tuple[list[int], list[int]]] = {}
        for rank in ranks:
            mine = rows_of(rank.step(step))
            assert not together.keys() & mine.keys()  # no two ranks read the same
            together |= mine
        assert together == rows_of(alone.step(step))


def test_a_window_is_what_lies_on_disk(folders: list[Path]) -> None:
    sources = [open_source(folder) for folder in folders]
    run = loader(folders)
    for index, (inputs, targets) in rows_of(run.step(3)).items():
        source, window = run.order.sample(index)
        tokens = sources[source].read(window * T, window * T + T + 1).tolist()
        assert inputs == tokens[:-1]
        assert all(target in (IGNORED, token) for target, token in zip(targets, tokens[1:], strict=True))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=4))
def test_documents_end_after_eos_and_eos_predicts_nothing(rows: list[list[int]]) -> None:
    batch = pack_windows(np.array(rows), np.zeros(len(rows), dtype=np.int64), torch.arange(len(rows)))
    flat, bounds = batch.input_ids.flatten().tolist(), set(batch.cu_seqlens.tolist())
    assert bounds == {0} | {index + 1 for index, token in enumerate(flat) if token == EOS or (index + 1) % 8 == 0}
    for row, inputs, targets in zip(rows, batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        expected = [IGNORED if token == EOS else following for token, following in zip(row, row[1:], strict=False)]
        assert (inputs, targets) == (row[:-1], expected)


def test_epoch_reads_each_window_once(folders: list[Path]) -> None:
    write = loader(folders[:1] * 2)  # one source twice still is two sources of their own order
    assert write.order.windows == (312, 312)


def test_token_outside_the_vocabulary_is_named(folders: list[Path]) -> None:
    with pytest.raises(PolygluError, match=r"token \d+ has id \d+, outside the model's vocab_size 10"):
        for step in range(30):
            loader(folders, vocab_size=10).step(step)


def test_less_than_one_window_is_refused(tmp_path: Path) -> None:
    folder = write_token_source(tmp_path / "short", [1] * T)
    with pytest.raises(PolygluError, match=r"short: 16 tokens are less than one window of seq_length \+ 1 = 17"):
        loader([folder, folder])
    enough = write_token_source(tmp_path / "enough", [1] * (T + 1))
    loader([enough, enough]).step(0)
