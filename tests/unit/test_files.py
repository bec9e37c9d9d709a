"""Files are whole or not there."""

import errno
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyglu.errors import PolygluError
from polyglu.files import append_rows, read_json, read_rows, sha256, write_atomically, write_json, write_text


@pytest.mark.parametrize("size", [0, 1, 2**20 + 7])
def test_digest_is_that_of_the_bytes_on_disk(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    path = tmp_path / "new" / "folders" / "file.bin"
    digest = write_atomically(path, lambda file: file.write(data))
    assert path.read_bytes() == data
    assert digest == sha256(path) == hashlib.sha256(data).hexdigest()
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_a_write_that_is_cut_off_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")

    def cut_off(file: BinaryIO) -> None:
        file.write(b"half of wh")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, cut_off)
    assert path.read_text() == "before"
    write_text(path, "after")  # what the cut-off write left behind is no obstacle
    assert path.read_text() == "after"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


class FullDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: bytes) -> int:
        self.left -= len(bytes(data))
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@pytest.mark.parametrize("left", [0, 1, 100, 700, 1000])
def test_a_full_disk_is_named_whoever_writes(tmp_path: Path, left: int) -> None:
    """``torch.save`` raises an error of its own where a write has failed."""
    path = tmp_path / "file.pt"
    with pytest.raises(OSError, match=r"No space left on device: '.*/file\.pt'") as raised:
        write_atomically(path, lambda file: torch.save({"a": torch.ones(2)}, FullDisk(file, left)))
    assert raised.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_errors_that_are_no_refusal_stay_as_they_are(tmp_path: Path) -> None:
    def broken(file: BinaryIO) -> None:
        try:
            raise FileNotFoundError("another's business")
        except OSError:
            raise ValueError("a fault") from None

    with pytest.raises(ValueError, match="a fault"):
        write_atomically(tmp_path / "file", broken)
    with pytest.raises(FileNotFoundError, match="'elsewhere'"):
        write_atomically(tmp_path / "file", lambda file: os.stat("elsewhere"))
    assert not list(tmp_path.iterdir())


def test_what_went_wrong_is_told_though_its_trace_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "file", lambda file: 1 // 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.tmp"]


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def look(file: BinaryIO) -> None:
        file.write(b"first half, ")
        file.flush()
        assert not path.exists()
        file.write(b"second half")

    write_atomically(path, look)
    assert path.read_text() == "first half, second half"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=json_values)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_json_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    first = write_json(tmp_path / "a.json", {"x": 1, "y": "Grüße"})
    assert first == write_json(tmp_path / "b.json", {"y": "Grüße", "x": 1})
    assert "Grüße" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b'{"a": 1', "is not valid JSON"), (b"\xff\xfe", "is not valid JSON")],
)
def test_missing_and_damaged_json_is_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolygluError, match=rf"value\.json {message}"):
        read_json(path)


def test_rows_are_read_while_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    append_rows(path, [{"step": 1}, {"step": 2}])
    path.write_bytes(path.read_bytes() + b'{"step": 3, "train/')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_a_name_that_is_not_utf8_is_written_and_read_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff\\udcff.pt")
    write_json(tmp_path / "a.json", {name: name})
    assert read_json(tmp_path / "a.json") == {name: name}
