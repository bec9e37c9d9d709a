from pathlib import Path

import pytest

from polyglu.config_file import load_config, validate
from polyglu.data.sources import Shard, SourcesConfig, TextSource, parse_shard
from polyglu.errors import PolygluError

REPOSITORY = Path(__file__).parents[3]


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


def test_shards() -> None:
    assert (parse_shard("0/4"), parse_shard("3/4")) == (Shard(0, 4), Shard(3, 4))
    for text in ("4/4", "0/0", "-1/4", "1", "1/", "a/b", "1/4/5"):
        with pytest.raises(PolygluError, match="must be i/N with i from 0 to N - 1"):
            parse_shard(text)
