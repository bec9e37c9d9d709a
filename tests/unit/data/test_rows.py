import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from polyglu.data.data_file import local_file
from polyglu.data.rows import file_rows
from polyglu.errors import PolygluError

ROWS = [{"messages": [{"role": "user", "content": "é"}], "n": 1}, {"messages": [], "n": 2}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def test_rows_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL + b"\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSONL))
    (tmp_path / "c.v2.json.zst").write_bytes(zstandard.compress(JSONL))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    assert list(file_rows([local_file(path) for path in sorted(tmp_path.iterdir())])) == ROWS * 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{oops}\n', "line 2 is not JSON"),
        ("a.jsonl", b'"x"\n', "line 1 is not a JSON object"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.parquet", b"not parquet", "cannot be read as Parquet"),
        ("a.txt", b"text", "has no rows"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PolygluError, match=message) as error:
        list(file_rows([local_file(tmp_path / name)]))
    assert str(tmp_path / name) in str(error.value)
