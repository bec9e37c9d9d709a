import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_sealed

from polyglu.data.chunk_writer import ChunkWriter, DocumentBatch
from polyglu.data.chunks import TokenSource, open_source
from polyglu.data.manifest import new_manifest
from polyglu.errors import PolygluError

EOS = 9
TOKENIZER = {"name": "toy", "fingerprint": "f" * 64, "vocab_size": 10, "eos_id": EOS}


def batch_of(documents: list[list[int]]) -> DocumentBatch:
    return DocumentBatch(
        tokens=np.array([token for document in documents for token in [*document, EOS]], np.uint32),
        ends=np.cumsum([len(document) + 1 for document in documents]),
        row_of=np.arange(len(documents)),
        positions=np.stack([np.array([0, 0, row]) for row in range(len(documents))]),
        bad=(),
    )


def write(folder: Path, documents: list[list[int]], chunk_tokens: int = 5) -> TokenSource:
    writer = ChunkWriter(folder, new_manifest(TOKENIZER, {"files": []}, chunk_tokens), ["a"])
    writer.add(batch_of(documents))
    writer.finish()
    writer.close()
    return open_source(folder)


DOCUMENTS = [[1, 2], [3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6], [], [7], [8, 8]]
FLAT = [token for document in DOCUMENTS for token in [*document, EOS]]


@settings(deadline=None, max_examples=40)
@given(chunk_tokens=st.integers(1, 25), data=st.data())
def test_read_across_chunks(tmp_path_factory: pytest.TempPathFactory, chunk_tokens: int, data: st.DataObject) -> None:
    source = write(tmp_path_factory.mktemp("chunks"), DOCUMENTS, chunk_tokens)
    start = data.draw(st.integers(0, len(FLAT)))
    stop = data.draw(st.integers(start, len(FLAT)))
    assert source.n_tokens == len(FLAT)
    assert source.read(start, stop).tolist() == FLAT[start:stop]
    assert source.read(start, stop).dtype == np.uint32
    sizes = [chunk["tokens"] for chunk in source.manifest["chunks"]]
    assert all(size == chunk_tokens for size in sizes[:-1]) and 0 < sizes[-1] <= chunk_tokens


def test_bytes_are_little_endian_uint32(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS)
    data = b"".join((tmp_path / f"chunk_{index:05d}.bin").read_bytes() for index in range(5))
    assert data == b"".join(token.to_bytes(4, "little") for token in FLAT)


def test_manifest_counts(tmp_path: Path) -> None:
    source = write(tmp_path, DOCUMENTS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["tokens"] == sum(chunk["tokens"] for chunk in manifest["chunks"]) == len(FLAT)
    assert manifest["documents"] == sum(chunk["documents"] for chunk in manifest["chunks"]) == len(DOCUMENTS)
    assert (source.eos_id, source.vocab_size, source.name) == (EOS, 10, tmp_path.name)


def test_digest_identifies_the_content(tmp_path: Path) -> None:
    first, same = write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", DOCUMENTS)
    other = write(tmp_path / "c", [[1], *DOCUMENTS[1:]])
    assert first.digest == same.digest != other.digest


def test_out_of_range_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, DOCUMENTS)
    with pytest.raises(PolygluError, match="are not in it"):
        source.read(0, len(FLAT) + 1)


def change(folder: Path, old: str, new: str) -> None:
    text = (folder / "manifest.json").read_text()
    assert old in text
    (folder / "manifest.json").write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "chunk_00001.bin").unlink(), r"chunk_00001\.bin is missing"),
        (lambda folder: (folder / "chunk_00001.bin").write_bytes(b"1" * 16), "has 16 bytes, expected 20"),
        (lambda folder: (folder / "chunk_00001.bin").write_bytes(b"1" * 19), "has 19 bytes, expected 20"),
        (lambda folder: (folder / "manifest.json").unlink(), "holds no tokenised data"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "is not a manifest"),
        (lambda folder: (folder / "manifest.json").write_text('{"format_version": 1}'), "is not a manifest"),
        (lambda folder: write_sealed(folder, {"chunks": []}), "lacks 'bad_records'"),
        (lambda folder: change(folder, '"documents": 5', '"documents": 6'), "was changed after it was written"),
        (lambda folder: change(folder, '"complete": true', '"complete": false'), "was changed after it was written"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path, DOCUMENTS)
    damage(tmp_path)
    with pytest.raises(PolygluError, match=message):
        open_source(tmp_path)


def test_unfinished_and_empty_data_are_refused(tmp_path: Path) -> None:
    writer = ChunkWriter(tmp_path / "a", new_manifest(TOKENIZER, {}, 2), ["a"])
    writer.add(batch_of([[1, 2, 3]]))
    writer.close()
    with pytest.raises(PolygluError, match="was interrupted"):
        open_source(tmp_path / "a")
    writer = ChunkWriter(tmp_path / "b", new_manifest(TOKENIZER, {}, 2), [])
    writer.finish()
    writer.close()
    with pytest.raises(PolygluError, match="holds no tokens"):
        open_source(tmp_path / "b")
