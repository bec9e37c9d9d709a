import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EOS, random_documents, write_token_source

from polyglu.data import chunks
from polyglu.data.chunks import TokenSource, open_source
from polyglu.data.dataloader import IGNORED, MicroBatch, TokenLoader, pack_windows
from polyglu.data.order import MixSchedule
from polyglu.errors import PolygluError
from polyglu.model.packing import Packing

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


def write_chunks(folder: Path, tokens: np.ndarray, sizes: Sequence[int], eos_id: int) -> TokenSource:
    """Tokens in chunks of the given sizes, over and over: merged data has short chunks in the middle."""
    folder.mkdir()
    listed, start = [], 0
    while start < len(tokens):
        data = tokens[start : start + sizes[len(listed) % len(sizes)]].astype("<u4")
        (folder / f"chunk_{len(listed):05d}.bin").write_bytes(data.tobytes())
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        listed.append({"file": f"chunk_{len(listed):05d}.bin", "tokens": len(data), "sha256": digest})
        start += len(data)
    tokenizer = {"fingerprint": "f", "vocab_size": 64, "eos_id": eos_id}
    return TokenSource(folder.name, folder, {"tokens": len(tokens), "chunks": listed, "tokenizer": tokenizer})


@dataclass(frozen=True)
class Run:
    """A random run: its sources, their tokens, and loaders of it for any cut of its steps of 8 or 16 samples."""

    tokens: list[np.ndarray]
    sources: list[TokenSource]
    mix: MixSchedule
    seq_length: int
    samples: int
    seed: int

    def loader(self, world_size: int = 1, rank: int = 0, rows: int = 1) -> TokenLoader:
        return TokenLoader(
            self.sources,
            self.mix,
            seq_length=self.seq_length,
            rows=rows,
            accumulation=self.samples // world_size // rows,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            vocab_size=64,
        )


@st.composite
def runs(draw: st.DrawFn, root: Path) -> Run:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    number, seq_length, tokens, sources = draw(st.integers(1, 4)), draw(st.integers(1, 24)), [], []
    folder = root / str(len(list(root.iterdir())))
    folder.mkdir()
    for index in range(number):
        # The tokens differ between sources, and so does the token that ends a document.
        tokens.append(
            rng.integers(index * 16, index * 16 + draw(st.integers(2, 16)), draw(st.integers(seq_length + 1, 900)))
        )
        sizes = draw(st.lists(st.integers(1, 300), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 20))
        sources.append(write_chunks(folder / str(index), tokens[-1], sizes, eos_id=index * 16))
    first, last = rng.dirichlet(np.ones(number)), rng.dirichlet(np.ones(number))
    steps, anneal_start = draw(st.integers(1, 12)), draw(st.floats(0, 1))
    mix = MixSchedule(tuple(first), tuple(last), anneal_start, steps)
    return Run(tokens, sources, mix, seq_length, draw(st.sampled_from([8, 16])), draw(st.integers(0, 99)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def equal(left: MicroBatch, right: MicroBatch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in vars(left))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_number_of_ranks_sees_the_same_samples(root: Path, data: st.DataObject) -> None:
    """The ranks' rows, put in the global order, are those of one rank that does it all."""
    run = data.draw(runs(root))
    step = data.draw(st.integers(0, run.mix.total_steps - 1))
    alone = run.loader().step(step)
    for world_size in (1, 2, 4, 8):
        rows = data.draw(st.sampled_from([size for size in (1, 2, 4, 8, 16) if run.samples % (size * world_size) == 0]))
        ranks = [run.loader(world_size, rank, rows).step(step) for rank in range(world_size)]
        together = list(chain.from_iterable(zip(*ranks, strict=True)))  # micro batch by micro batch, rank by rank
        ids = torch.cat([batch.sample_ids for batch in together])
        assert ids.tolist() == list(range(step * run.samples, (step + 1) * run.samples))
        for name in ("input_ids", "targets"):
            assert torch.equal(*(torch.cat([getattr(one, name) for one in cut]) for cut in (together, alone)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_restore_at_every_step_continues_the_sequence(root: Path, data: st.DataObject) -> None:
    run = data.draw(runs(root))
    whole = run.loader(rows=2)
    sequence = [whole.step(step) for step in range(run.mix.total_steps)]
    for start in range(run.mix.total_steps):
        restored = run.loader(rows=2)
        for step in range(start, min(start + 3, run.mix.total_steps)):
            assert all(equal(*pair) for pair in zip(restored.step(step), sequence[step], strict=True))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_steps_beyond_the_run_are_the_same_for_any_number_of_ranks(root: Path, data: st.DataObject) -> None:
    """They stand in for data that a return to a checkpoint passed over; their samples are numbered on."""
    run = data.draw(runs(root))
    step = run.mix.total_steps + data.draw(st.integers(0, 2 * run.mix.total_steps))
    (alone,) = run.loader(rows=run.samples).step(step)
    assert alone.sample_ids.tolist() == list(range(step * run.samples, (step + 1) * run.samples))
    ranks = [run.loader(2, rank, 2).step(step) for rank in range(2)]
    together = list(chain.from_iterable(zip(*ranks, strict=True)))
    for name in ("input_ids", "targets", "sample_ids"):
        assert torch.equal(torch.cat([getattr(one, name) for one in together]), getattr(alone, name))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_are_what_lies_on_disk_and_no_boundary_is_missed(root: Path, data: st.DataObject) -> None:
    """Inputs, targets, bounds and positions, recomputed token by token from the tokens that were written."""
    run = data.draw(runs(root))
    rows = data.draw(st.sampled_from([1, 2, 4]))
    loader, length = run.loader(rows=rows), run.seq_length
    assert loader.order.windows == tuple((len(tokens) - 1) // length for tokens in run.tokens)
    for batch in loader.step(data.draw(st.integers(0, run.mix.total_steps - 1))):
        inputs, targets, positions, bounds = [], [], [], [0]
        for sample in batch.sample_ids.tolist():
            source, window = loader.order.sample(sample)
            position = 0
            for place in range(window * length, (window + 1) * length):
                token, following = run.tokens[source][place : place + 2].tolist()
                document_ends = token == run.sources[source].eos_id
                inputs.append(token)
                targets.append(IGNORED if document_ends else following)
                positions.append(position)
                position = 0 if document_ends else position + 1
                if document_ends or place + 1 == (window + 1) * length:
                    bounds.append(len(inputs))
        assert batch.input_ids.flatten().tolist() == inputs
        assert batch.targets.flatten().tolist() == targets
        assert batch.n_targets == len(inputs) - targets.count(IGNORED)
        assert batch.cu_seqlens.tolist() == bounds
        packing = Packing.of(batch.input_ids.shape, batch.cu_seqlens, torch.device("cpu"))
        assert packing.positions.tolist() == positions
        assert batch.input_ids.shape == (rows, length) and batch.input_ids.is_contiguous()
        assert (batch.input_ids.dtype, batch.targets.dtype, batch.sample_ids.dtype) == (torch.int64,) * 3
        assert batch.cu_seqlens.dtype == torch.int32


def open_files(folder: Path) -> int:
    return sum(link.is_symlink() and link.readlink().is_relative_to(folder) for link in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files under /proc")
def test_few_of_many_chunks_are_open(tmp_path: Path) -> None:
    folder = write_token_source(tmp_path / "many", range(1, 64), chunk_tokens=3)
    source = open_source(folder)
    TokenLoader(
        [source], MixSchedule((1.0,), (1.0,), 1.0, 5), seq_length=4, rows=1, accumulation=1, rank=0, world_size=1,
        seed=0, vocab_size=64,
    )  # fmt: skip
    assert open_files(folder) == 0
    with patch.object(chunks, "OPEN_CHUNKS", 4):
        assert [source.read(at, at + 3).tolist() for at in range(60)] == [[at + 1, at + 2, at + 3] for at in range(60)]
    assert open_files(folder) == 4
    del source
    assert open_files(folder) == 0


def test_a_chunk_that_has_gone_is_named(tmp_path: Path) -> None:
    folder = write_token_source(tmp_path / "gone", [1] * 40, chunk_tokens=20)
    source = open_source(folder)
    (folder / "chunk_00001.bin").unlink()
    assert source.read(0, 20).tolist() == [1] * 20
    with pytest.raises(FileNotFoundError) as raised:
        source.read(0, 21)
    assert str(raised.value.filename).endswith("gone/chunk_00001.bin")


def test_a_chunk_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    folder = write_token_source(tmp_path / "cut", [1] * 40, chunk_tokens=20)
    source = open_source(folder)
    with open(folder / "chunk_00000.bin", "r+b") as file:
        file.truncate(48)
    assert source.read(5, 12).tolist() == [1] * 7
    for start in (5, 12, 15):
        with pytest.raises(PolygluError, match=r"cut/chunk_00000\.bin is shorter than when it was opened; restore"):
            source.read(start, start + 10)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=4))
def test_documents_end_after_eos_and_eos_predicts_nothing(rows: list[list[int]]) -> None:
    windows = np.array([rows], dtype=np.uint32)
    (batch,) = pack_windows(windows, np.zeros((1, len(rows)), dtype=np.int64), np.arange(len(rows))[None])
    flat, bounds = batch.input_ids.flatten().tolist(), set(batch.cu_seqlens.tolist())
    assert bounds == {0} | {index + 1 for index, token in enumerate(flat) if token == EOS or (index + 1) % 8 == 0}
    for row, inputs, targets in zip(rows, batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        expected = [IGNORED if token == EOS else following for token, following in zip(row, row[1:], strict=False)]
        assert (inputs, targets) == (row[:-1], expected)


def test_token_outside_the_vocabulary_is_named(folders: list[Path]) -> None:
    message = r"(\w+): token (\d+) has id (\d+), outside the model's vocab_size 62; .* another tokenizer or is damaged"
    with pytest.raises(PolygluError, match=message) as raised:
        for step in range(30):
            loader(folders, vocab_size=62).step(step)
    name, place, token = re.search(message, str(raised.value)).groups()  # type: ignore[union-attr]
    assert open_source(folders[0].parent / name).read(int(place), int(place) + 1).tolist() == [int(token)]
    assert int(token) >= 62


def test_less_than_one_window_is_refused(tmp_path: Path) -> None:
    folder = write_token_source(tmp_path / "short", [1] * T)
    with pytest.raises(PolygluError, match=r"short: 16 tokens are less than one window of seq_length \+ 1 = 17"):
        loader([folder, folder])
    enough = write_token_source(tmp_path / "enough", [1] * (T + 1))
    loader([enough, enough]).step(0)
