import json
from pathlib import Path

import numpy as np
import pytest

from polyglu.data.chunks import open_source
from polyglu.data.inspect import main
from polyglu.data.sources import TextSource
from polyglu.data.statistics import scan_documents
from polyglu.data.tokenize_dataset import tokenize_source
from polyglu.data.tokenizer import train_bpe
from polyglu.errors import PolygluError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = [f"document {index} [bold]{'x' * index}" for index in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_bpe(texts, 280, tmp_path / "bpe")
    source = TextSource(files=(str(tmp_path / "a.jsonl"),), output=str(tmp_path / "out"))
    tokenize_source(source, tokenizer, chunk_tokens=100)
    return tmp_path / "out"


def test_lengths_count_every_token_across_chunks(folder: Path) -> None:
    source = open_source(folder)
    lengths = scan_documents(source).lengths
    tokens = source.read(0, source.n_tokens)
    assert len(lengths) == 40 and lengths.sum() == source.n_tokens
    assert (tokens[np.cumsum(lengths) - 1] == source.eos_id).all()


def test_shows_documents_counts_and_chunks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(folder, documents=2, tokenizer=None, verify=True)
    shown = capsys.readouterr().out
    assert "document 0 [bold]" in shown and "document 39 [bold]xxx" in shown
    assert "chunk_00000.bin" in shown and f"{open_source(folder).n_tokens:,}" in shown


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    train_bpe(["something else"] * 5, 262, tmp_path / "other")
    with pytest.raises(PolygluError, match="is not the one"):
        main(folder, documents=1, tokenizer=str(tmp_path / "other"), verify=False)


def test_verify_refuses_a_flipped_bit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunk = folder / "chunk_00001.bin"
    content = bytearray(chunk.read_bytes())
    content[17] ^= 1
    chunk.write_bytes(content)
    main(folder, documents=0, tokenizer=None, verify=False)
    assert "bad records" in capsys.readouterr().out
    with pytest.raises(PolygluError, match="chunk_00001.bin has other bytes"):
        main(folder, documents=0, tokenizer=None, verify=True)
