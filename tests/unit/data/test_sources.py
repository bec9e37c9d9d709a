import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from polyglu.config_file import load_config, validate
from polyglu.data.sources import SourcesConfig, TextSource, file_rows, rows
from polyglu.errors import PolygluError

REPOSITORY = Path(__file__).parents[3]
ROWS = [{"text": "one\ntwo"}, {"text": "é🙂"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL + b"\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSONL))
    (tmp_path / "c.v2.jsonl.zst").write_bytes(zstandard.compress(JSONL))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("one\n\ntwo", encoding="utf-8")
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"three"))
    files = sorted(tmp_path.iterdir())
    assert list(file_rows(files)) == ROWS * 4 + [{"text": "one\n\ntwo"}, {"text": "three"}]
    source = TextSource(files=tuple(map(str, files)), output="out")
    assert list(rows(source, None, skip=7)) == [ROWS[1], {"text": "one\n\ntwo"}, {"text": "three"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{oops}\n', "line 2 is not JSON"),
        ("a.jsonl", b'"x"\n', "line 1 is not a JSON object"),
        ("a.jsonl", b"\xff\xfe", "cannot be read as UTF-8"),
        ("a.txt", b"\xff\xfe", "cannot be read as UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(JSONL * 50)[:-20], "cannot be read"),
        ("a.txt.zst", b"not zstandard", "cannot be read"),
        ("a.parquet", b"not parquet", "is not a parquet file"),
        ("a.csv", b"text\nx\n", "of an unknown kind"),
        ("a.parquet.gz", b"", "of an unknown kind"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PolygluError, match=message) as error:
        list(file_rows([tmp_path / name]))
    assert str(tmp_path / name) in str(error.value)


def test_a_missing_file_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match=r"no\.jsonl does not exist"):
        file_rows([tmp_path / "no.jsonl"])


def test_a_source_has_one_origin() -> None:
    for values in ({}, {"dataset": "a/b", "files": ["c.jsonl"]}):
        with pytest.raises(PolygluError, match="give either 'dataset'"):
            validate(TextSource, {"output": "out", **values}, source="test")


def test_a_mistyped_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("sources:\n  math:\n    dataset: a/b\n    output: o\n    max_token: 5\n")
    with pytest.raises(PolygluError, match="unknown key 'sources.math.max_token'; did you mean 'max_tokens'"):
        load_config(SourcesConfig, tmp_path / "s.yaml")


def test_shipped_sources() -> None:
    paper = load_config(SourcesConfig, REPOSITORY / "configs" / "sources.yaml")
    assert {name: (source.dataset, source.config, source.max_tokens) for name, source in paper.sources.items()} == {
        "math": ("nvidia/Nemotron-CC-Math-v1", "4plus", 7_000_000_000),
        "stem": ("nvidia/Nemotron-CC-v2", "High-Quality", 2_500_000_000),
        "code": ("nvidia/Nemotron-CC-Code-v1", None, 500_000_000),
    }
    assert {source.output for source in paper.sources.values()} == {f"data/tokenized/{name}" for name in paper.sources}
    tiny = load_config(SourcesConfig, REPOSITORY / "configs" / "tiny" / "sources.yaml")
    assert list(tiny.sources) == list(paper.sources)
