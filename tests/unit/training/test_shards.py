"""What any set of ranks wrote, any other reads: the same numbers; nothing else than a whole model is taken."""

import io
import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save_file
from saving import KINDS, Malicious

from polyglu.errors import PolygluError
from polyglu.training.shards import WEIGHT, Piece, copied, read_shards, shard_name, write_shard

Cuts = list[tuple[int, int]]
"""Rank and length of each of a parameter's parts, in their order."""


def pieces_of(parameters: dict[str, tuple[Cuts, Cuts]], side: int, rank: int, live: bool) -> list[Piece]:
    """What a rank holds, with the parameters' numbers or with zeros to fill."""
    pieces = []
    for name, both in parameters.items():
        start = 0
        for holder, length in both[side]:
            if holder == rank:
                whole = numbers(name, sum(part for _, part in both[side]))
                tensors = {kind: whole[kind][start : start + length].clone() for kind in KINDS}
                if not live:
                    tensors = {kind: torch.zeros_like(tensor) for kind, tensor in tensors.items()}
                pieces.append(Piece(name, start, tensors))
            start += length
    return pieces


def numbers(name: str, numel: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(name.removeprefix("p.")))
    return {kind: torch.randn(numel, generator=generator) for kind in KINDS}


def cuts(draw: Any, numel: int, n_ranks: int) -> Cuts:
    """A parameter in parts that some ranks hold, at most one each; some hold none of it."""
    holders = draw(st.lists(st.integers(0, n_ranks - 1), min_size=1, max_size=n_ranks, unique=True))
    places = sorted(draw(st.lists(st.integers(0, numel), min_size=len(holders) - 1, max_size=len(holders) - 1)))
    ends = [*places, numel]
    return [(holder, end - start) for holder, start, end in zip(holders, [0, *places], ends, strict=True)]


@st.composite
def partitions(draw: Any) -> tuple[int, int, dict[str, tuple[Cuts, Cuts]]]:
    writers, readers = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    parameters = {f"p.{i}": (cuts(draw, n, writers), cuts(draw, n, readers)) for i, n in enumerate(sizes)}
    return writers, readers, parameters


@settings(max_examples=60, deadline=None)
@given(case=partitions())
def test_any_partition_is_read_by_any_other(tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    writers, readers, parameters = case
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    for rank in range(writers):
        with open(folder / shard_name(rank), "wb") as file:
            write_shard(file, pieces_of(parameters, 0, rank, live=True))
    for rank in range(readers):
        filled, expected = (pieces_of(parameters, 1, rank, live) for live in (False, True))
        read_shards(folder, writers, filled)
        for own, other in zip(filled, expected, strict=True):
            assert (own.name, own.start) == (other.name, other.start)
            assert all(torch.equal(own.tensors[kind], other.tensors[kind]) for kind in KINDS)
    shutil.rmtree(folder)


def test_a_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    """Read with that library's own loader; the header is padded to 8 bytes, so that the numbers are aligned."""
    pieces = [
        Piece("a", 7, {WEIGHT: torch.tensor([1.0, -0.0, float("inf")]), "exp_avg": torch.tensor([float("nan")])}),
        Piece("ünïcode.b", 0, {WEIGHT: torch.arange(5.0)[::1], "exp_avg": torch.empty(0)}),
    ]
    with open(tmp_path / "shard", "wb") as file:
        write_shard(file, pieces)
    data = (tmp_path / "shard").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    read = load(data)
    assert read.keys() == {"weight/a", "exp_avg/a", "weight/ünïcode.b", "exp_avg/ünïcode.b"}
    for piece in pieces:
        for kind, tensor in piece.tensors.items():
            stored = read[f"{kind}/{piece.name}"]
            assert stored.dtype == torch.float32 and stored.numpy().tobytes() == tensor.numpy().tobytes()
    with safe_open(tmp_path / "shard", "pt") as shard:
        assert shard.metadata() == {"a": "7", "ünïcode.b": "0"}


def test_a_copy_stays_as_it_was_and_uses_its_memory_again() -> None:
    live, buffers = torch.arange(4.0), dict[str, torch.Tensor]()
    piece = Piece("a", 2, {WEIGHT: live})
    (first,) = copied([piece], buffers)
    live += 1
    assert first.tensors[WEIGHT].tolist() == [0, 1, 2, 3] and (first.name, first.start) == ("a", 2)
    (second,) = copied([piece], buffers)
    assert second.tensors[WEIGHT].tolist() == [1, 2, 3, 4]
    assert second.tensors[WEIGHT].data_ptr() == first.tensors[WEIGHT].data_ptr() and len(buffers) == 1


def write(folder: Path, *shards: Sequence[tuple[int, int]]) -> None:
    """Shards of a parameter "a" that hold the given ranges."""
    for rank, ranges in enumerate(shards):
        with open(folder / shard_name(rank), "wb") as file:
            write_shard(
                file,
                [Piece("a", start, {WEIGHT: torch.arange(start, end, dtype=torch.float32)}) for start, end in ranges],
            )


@pytest.mark.parametrize(
    "shards",
    [
        [[(0, 5)], [(6, 10)]],
        [[(0, 5)], [(0, 5)]],
        [[(0, 6)], [(5, 10)]],
        [[(0, 4)], [(5, 10)], [(0, 1)]],
        [[(1, 10)]],
        [[(0, 9)]],
        [[]],
    ],
    ids=["hole", "one half twice", "overlap", "hole and overlap", "no beginning", "no end", "nothing"],
)  # fmt: skip
def test_not_each_element_once_is_refused(tmp_path: Path, shards: Any) -> None:
    write(tmp_path, *shards)
    with pytest.raises(PolygluError, match=r"does not hold all of weight/a, each element once"):
        read_shards(tmp_path, len(shards), [Piece("a", 0, {WEIGHT: torch.zeros(10)})])


def test_a_kind_or_a_parameter_that_is_missing_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [(0, 10)])
    for piece in (Piece("a", 0, {"exp_avg": torch.zeros(10)}), Piece("b", 0, {WEIGHT: torch.zeros(10)})):
        (kind,) = piece.tensors
        with pytest.raises(PolygluError, match=f"does not hold all of {kind}/{piece.name}"):
            read_shards(tmp_path, 1, [piece])


def spoiled(kind: str, trace: Path) -> bytes:
    if kind == "pickle":
        return pickle.dumps(Malicious(trace), protocol=2)
    if kind == "torch file":
        buffer = io.BytesIO()
        torch.save({"weight/a": Malicious(trace)}, buffer)
        return buffer.getvalue()
    header: dict[str, Any] = {"weight/a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}
    header["__metadata__"] = {"a": "0"}
    if kind == "no starts":
        del header["__metadata__"]
    elif kind == "start of another kind":
        header["__metadata__"] = {"a": "x"}
    elif kind == "two dimensions":
        header["weight/a"]["shape"] = [2, 5]
    elif kind == "none":
        header["weight/a"] = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    elif kind == "integers":
        header["weight/a"]["dtype"] = "I32"
    elif kind == "beyond the end":
        header["weight/a"]["data_offsets"] = [0, 4000]
    text = json.dumps(header).encode()
    numel = 1 if kind == "none" else 10
    return {"empty": b"", "zeros": bytes(100)}.get(kind, len(text).to_bytes(8, "little") + text + bytes(4 * numel))


@pytest.mark.parametrize(
    "kind",
    ["pickle", "torch file", "empty", "zeros", "no starts", "start of another kind", "two dimensions", "none",
     "integers", "beyond the end"],
)  # fmt: skip
def test_what_is_no_shard_is_refused_and_never_executed(tmp_path: Path, kind: str) -> None:
    (tmp_path / shard_name(0)).write_bytes(spoiled(kind, tmp_path / "trace"))
    with pytest.raises(PolygluError, match=r"shard_00000\.safetensors is no shard of a checkpoint"):
        read_shards(tmp_path, 1, [Piece("a", 0, {WEIGHT: torch.zeros(10)})])
    assert not (tmp_path / "trace").exists()


def test_a_shard_that_is_missing_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [(0, 10)])
    with pytest.raises(PolygluError, match=r"shard_00001\.safetensors is no shard"):
        read_shards(tmp_path, 2, [Piece("a", 0, {WEIGHT: torch.zeros(10)})])


def test_other_tensors_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    save_file({"weight/a": torch.arange(3.0), "other": torch.ones(2)}, tmp_path / shard_name(0), {"a": "0"})
    piece = Piece("a", 1, {WEIGHT: torch.zeros(2)})
    read_shards(tmp_path, 1, [piece])
    assert piece.tensors[WEIGHT].tolist() == [1, 2]
