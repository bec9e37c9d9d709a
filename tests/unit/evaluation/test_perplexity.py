import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import write_token_source

from polyglu.errors import PolygluError
from polyglu.estimates import ratio_estimate
from polyglu.evaluation.perplexity import perplexity
from polyglu.inference import Inference


def measure(opened: Inference, source: Path, max_tokens: int = 10_000, batch_size: int = 3) -> dict[str, Any]:
    return perplexity(opened.model, opened.tokenizer, opened.tau, source, max_tokens=max_tokens, batch_size=batch_size)


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_equals_a_plain_loop_over_documents(opened: Inference, run: Any, tmp_path: Path) -> None:
    texts = [*run.texts, "née 日本", ""]
    nats, n_tokens = 0.0, 0
    for text in texts[:-1]:
        tokens = [opened.tokenizer.eos_id, *opened.tokenizer.encode(text)]
        with torch.inference_mode():
            logits = opened.model(torch.tensor([tokens[:-1]]), tau=opened.tau)[0]
        nats += float(F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum"))
        n_tokens += len(tokens) - 1
    source = write_texts(tmp_path / "texts.jsonl", texts)
    for batch_size in (1, 7):
        found = measure(opened, source, batch_size=batch_size)
        assert found["perplexity"] == pytest.approx(math.exp(nats / n_tokens), rel=1e-4)
        assert (found["tokens"], found["documents"]) == (n_tokens, len(run.texts) + 1)
        n_bytes = sum(len(text.encode()) for text in texts)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)


def test_chunks_give_what_their_texts_give(
    opened: Inference, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyglu.data.held_out.READ_TOKENS", 10)  # documents span several reads
    texts = [*run.texts, "Question: 1 + 1 =\n" * 30, "日本 née"]
    ids = [token for text in texts for token in (*opened.tokenizer.encode(text), opened.tokenizer.eos_id)]
    folder = write_token_source(
        tmp_path / "chunks", ids, vocab_size=300, chunk_tokens=37, fingerprint=opened.tokenizer.fingerprint
    )
    expected = measure(opened, write_texts(tmp_path / "texts.jsonl", texts))
    found = measure(opened, folder)
    assert found.pop("each") == expected.pop("each") and found == pytest.approx(expected)


def test_intervals_are_over_documents(opened: Inference, run: Any, tmp_path: Path) -> None:
    texts = [*run.texts, "Answer: 日本\n" * 3]
    each = [measure(opened, write_texts(tmp_path / f"{index}.jsonl", [text])) for index, text in enumerate(texts)]
    assert not [key for key in each[0] if key.endswith(("_low", "_high", "_stderr"))]
    found = measure(opened, write_texts(tmp_path / "all.jsonl", texts))
    for ratio, unit, scale in (("nats_per_token", "tokens", 1.0), ("bits_per_byte", "bytes", math.log(2))):
        nats = [one["nats_per_token"] * one["tokens"] / scale for one in each]
        assert [value / scale for value in found["each"]["nats"]] == pytest.approx(nats, rel=1e-4)
        assert found["each"][unit] == [one[unit] for one in each]
        expected = ratio_estimate(nats, [one[unit] for one in each])
        assert found[ratio] == pytest.approx(expected.mean, rel=1e-5)
        assert found[f"{ratio}_low"] == pytest.approx(expected.low, rel=1e-4)
        assert found[f"{ratio}_stderr"] == pytest.approx(expected.stderr, rel=1e-4)
    assert found["perplexity_high"] == pytest.approx(math.exp(found["nats_per_token_high"]))


def test_reads_whole_documents_until_it_has_enough(opened: Inference, run: Any, tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts.jsonl", list(run.texts))
    found = measure(opened, source, max_tokens=len(opened.tokenizer.encode(run.texts[0])) + 1)
    assert found["documents"] == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\nnot json\n', "line 2"),
        ('{"body": "a"}\n', "'text'"),
        ('{"text": 3}\n', "'text'"),
        ("", "no text"),
    ],
)
def test_bad_files_are_named(opened: Inference, tmp_path: Path, content: str, said: str) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_text(content)
    with pytest.raises(PolygluError, match=f"bad.jsonl.*{said}"):
        measure(opened, source)


def test_lines_are_read_as_those_of_training_data(opened: Inference, run: Any, tmp_path: Path) -> None:
    plain = write_texts(tmp_path / "texts.jsonl", list(run.texts))
    odd = tmp_path / "odd.jsonl"
    odd.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\n  \n") + b'{"text": " \\n"}\n')
    assert measure(opened, odd) == measure(opened, plain)
    odd.write_bytes(plain.read_bytes() + b'\n{"text": "\xff"}\n')
    with pytest.raises(PolygluError, match=f"odd.jsonl, line {len(run.texts) + 2}: .* not UTF-8; mend or remove it."):
        measure(opened, odd)
    tokens = len(opened.tokenizer.encode(run.texts[0]))
    assert measure(opened, odd, max_tokens=tokens)["documents"] == 1  # what is not wanted is not looked at
    plain.rename(tmp_path / "texts.txt")
    with pytest.raises(PolygluError, match="texts.txt is no .jsonl file"):
        measure(opened, tmp_path / "texts.txt")


def test_missing_source_and_chunks_of_another_tokenizer(opened: Inference, tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match="nowhere.jsonl does not exist"):
        measure(opened, tmp_path / "nowhere.jsonl")
    folder = write_token_source(tmp_path / "chunks", [5, 6, 0], vocab_size=300)
    with pytest.raises(PolygluError, match="was tokenised with 'test'"):
        measure(opened, folder)
