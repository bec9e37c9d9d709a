"""The embedded corpus as tokens, made once."""

import json
from functools import partial
from pathlib import Path

import pytest

from polyglu.data import embedded_tokens
from polyglu.data.chunks import open_source
from polyglu.data.embedded import write_embedded_corpus
from polyglu.data.embedded_tokens import SOURCES, make_embedded_data
from polyglu.errors import PolygluError


def test_trained_and_held_out_tokens_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"n_math": 60, "n_sft": 10, "n_test": 5, "stem_characters": 60_000, "code_characters": 300_000}
    written = []

    def write(folder: Path) -> None:
        written.append(folder)
        partial(write_embedded_corpus, **sizes)(folder)

    monkeypatch.setattr(embedded_tokens, "write_embedded_corpus", write)
    make_embedded_data(tmp_path, 300)
    make_embedded_data(tmp_path, 300)
    assert written == [tmp_path / "raw"]
    names = [*SOURCES, *(f"heldout_{name}" for name in SOURCES)]
    opened = {name: open_source(tmp_path / "tokenized" / name) for name in names}
    assert len({source.manifest["tokenizer"]["fingerprint"] for source in opened.values()}) == 1
    assert all(source.manifest["documents"] == len(lines(tmp_path, name)) for name, source in opened.items())
    with pytest.raises(PolygluError, match="holds embedded data of .*300.*, model.vocab_size is 400; give another"):
        make_embedded_data(tmp_path, 400)


def lines(folder: Path, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"raw/{name}.jsonl").read_text().splitlines()]
