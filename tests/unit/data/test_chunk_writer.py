import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu import files
from polyglu.data.chunk_writer import ChunkWriter, DocumentBatch, end_cursor
from polyglu.data.chunks import open_source
from polyglu.data.manifest import new_manifest, read_manifest
from polyglu.data.quarantine import EMPTY, SPECIAL_TOKEN_TEXT, BadRecord
from polyglu.errors import PolygluError

EOS = 9
TOKENIZER = {"name": "toy", "fingerprint": "f" * 64, "vocab_size": 10, "eos_id": EOS}
Row = list[int] | None
"""Tokens of a row's document, or no document."""
Place = tuple[int, int, int]


def positions_of(rows: list[Row]) -> list[Place]:
    """Rows spread over files and row groups of a few rows each."""
    return [(index // 10, index // 5 % 2, index % 5) for index in range(len(rows))]


def batch_of(rows: list[Row], places: list[Place]) -> DocumentBatch:
    documents = [(index, [*row, EOS]) for index, row in enumerate(rows) if row is not None]
    bad = [BadRecord(index, EMPTY, 0) for index, row in enumerate(rows) if row is None]
    odd = [BadRecord(index, SPECIAL_TOKEN_TEXT, 1) for index, row in enumerate(rows) if row and row[0] == 7]
    return DocumentBatch(
        tokens=np.array([token for _, document in documents for token in document], np.uint32),
        ends=np.cumsum([len(document) for _, document in documents], dtype=np.int64),
        row_of=np.array([index for index, _ in documents], np.int64),
        positions=np.array(places, np.int64).reshape(-1, 3),
        bad=sorted([*bad, *odd], key=lambda record: record.row),
    )


def run(folder: Path, rows: list[Row], chunk_tokens: int, sizes: list[int], budget: int | None, stop: int) -> bool:
    """Write rows from where the folder ends, in batches of the given sizes; give up after ``stop`` batches."""
    manifest = read_manifest(folder) or new_manifest(TOKENIZER, {"files": []}, chunk_tokens)
    cursor = end_cursor(manifest)
    places = positions_of(rows)
    start = sum(place < (cursor["file"], cursor["row_group"], cursor["row"]) for place in places)
    writer = ChunkWriter(folder, manifest, [f"file {index}" for index in range(len(rows))])
    try:
        while start < len(rows):
            if not stop:
                return False
            stop -= 1
            size = sizes[start % len(sizes)]
            if not writer.add(batch_of(rows[start : start + size], places[start : start + size]), budget):
                break
            start += size
        writer.finish()
        return True
    finally:
        writer.close()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


rows_of_a_source = st.lists(st.none() | st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(
    rows=rows_of_a_source,
    chunk_tokens=st.integers(1, 30),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    budget=st.none() | st.integers(1, 200),
    stops=st.lists(st.integers(0, 6), max_size=6),
)
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Row],
    chunk_tokens: int,
    sizes: list[int],
    budget: int | None,
    stops: list[int],
) -> None:
    """Neither stops nor the sizes of batches change a byte, and the bytes are those of the documents."""
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    assert run(whole, rows, chunk_tokens, [3], budget, 10**9)
    for stop in [*stops, 10**9]:
        if run(broken, rows, chunk_tokens, sizes, budget, stop):
            break
    assert content(broken) == content(whole)
    taken: list[int] = []
    used = len(rows)
    for index, row in enumerate(rows):
        if row is not None and budget is not None and len(taken) + len(row) + 1 > budget:
            used = index
            break
        taken += [*row, EOS] if row is not None else []
    manifest = read_manifest(whole)
    assert manifest is not None
    assert (manifest["rows"], manifest["tokens"], manifest["documents"]) == (used, len(taken), taken.count(EOS))
    if taken:
        source = open_source(whole)
        assert source.read(0, source.n_tokens).tolist() == taken
        sizes_found = [chunk["tokens"] for chunk in manifest["chunks"]]
        assert all(size == chunk_tokens for size in sizes_found[:-1]) and 0 < sizes_found[-1] <= chunk_tokens
    lines = (whole / "quarantine.jsonl").read_text().splitlines() if (whole / "quarantine.jsonl").exists() else []
    places = positions_of(rows)
    assert [json.loads(line) for line in lines] == [
        {"file": f"file {file}", "row_group": group, "row": number, "kind": kind, "bytes": size, "kept": kept}
        for row, (file, group, number) in zip(rows[:used], places, strict=False)
        for kind, size, kept in (
            [(EMPTY, 0, False)] if row is None else [(SPECIAL_TOKEN_TEXT, 1, True)] if row[:1] == [7] else []
        )
    ]


def test_nothing_is_written_before_the_first_record(tmp_path: Path) -> None:
    writer = ChunkWriter(tmp_path / "new", new_manifest(TOKENIZER, {}, 5), [])
    writer.close()
    assert not (tmp_path / "new").exists()


def test_another_text_than_before_is_refused(tmp_path: Path) -> None:
    run(tmp_path, [[1, 2, 3, 4, 5, 6], [1]], 4, [1], None, 1)
    manifest = read_manifest(tmp_path)
    assert manifest is not None and end_cursor(manifest)["tokens"] == 4
    with pytest.raises(PolygluError, match="begun with another text"):
        run(tmp_path, [[1, 2]], 4, [1], None, 10)


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_whole_chunks_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, failure: int
) -> None:
    rows: list[Row] = [[index % 9] * (index % 7) if index % 4 else None for index in range(30)]
    assert run(tmp_path / "whole", rows, 11, [4], None, 10**9)
    real: Callable[..., Any] = getattr(files.os, operation)
    for attempt in range(1000):
        calls = 0

        def fail(*arguments: Any, limit: int = attempt) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise OSError(failure, "broken")
            return real(*arguments)

        folder = tmp_path / f"broken_{attempt}"
        monkeypatch.setattr(files.os, operation, fail)
        try:
            done = run(folder, rows, 11, [4], None, 10**9)
        except PolygluError as error:
            done = False
            assert "finished chunks are kept" in str(error) and "broken" in str(error)
        monkeypatch.setattr(files.os, operation, real)
        if done:
            break
        assert not list(folder.glob("*.tmp"))
        manifest = read_manifest(folder)
        listed = [chunk["file"] for chunk in manifest["chunks"]] if manifest else []
        assert all((folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in listed)
        assert run(folder, rows, 11, [5], None, 10**9)
        assert content(folder) == content(tmp_path / "whole")
    assert attempt > 5
