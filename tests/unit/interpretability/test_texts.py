import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from polyglu.errors import PolygluError
from polyglu.interpretability.texts import embedded_texts, read_kinds


class ByteTokenizer:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


TOKENIZER = ByteTokenizer()


def test_five_kinds_of_many_different_documents_of_one_length() -> None:
    texts = embedded_texts(TOKENIZER, 30, 200)
    assert texts.kinds == ("arithmetic", "algebra", "geometry", "code", "prose")
    assert texts.tokens.shape == (150, 200)
    assert texts.labels.tolist() == [kind for kind in range(5) for _ in range(30)]
    assert len({tuple(row) for row in texts.tokens.tolist()}) == 150
    decoded = [bytes(row).decode(errors="replace") for row in texts.tokens.tolist()]
    assert all(text.startswith("Question: ") for text in decoded[:90])
    assert all(text.startswith(("def ", "class ")) for text in decoded[90:120])
    assert not any("Question: " in text or "def " in text for text in decoded[120:])
    assert not any("please follow" in text or "Return only" in text for text in decoded)
    assert torch.equal(embedded_texts(TOKENIZER, 30, 200).tokens, texts.tokens)


def test_a_missing_package_is_named() -> None:
    with mock.patch("importlib.util.find_spec", lambda name: None), pytest.raises(PolygluError, match="reasoning_gym"):
        embedded_texts(TOKENIZER, 2, 8)


def test_own_kinds_are_cut_and_short_ones_left_out(tmp_path: Path) -> None:
    rows = ["a" * 9, "short", "b" * 20, "c" * 9]
    (tmp_path / "law.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "verse.txt").write_text("rose is\n\n  \nviolets are\nblue\n\n\nsugar is sweet\n")
    (tmp_path / "notes.md").write_text("not a kind")
    texts = read_kinds(tmp_path, TOKENIZER, 2, 8)
    assert texts.kinds == ("law", "verse")
    assert [bytes(row).decode() for row in texts.tokens.tolist()] == ["a" * 8, "b" * 8, "violets ", "sugar is"]
    assert texts.too_short == {"law": 1, "verse": 1}
    first, second = texts.of_kind(torch.arange(4))
    assert (first.tolist(), second.tolist()) == ([0, 1], [2, 3])


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "has 0 kinds"),
        ({"a.txt": "long enough\n\nlong enough"}, "has 1 kinds"),
        ({"a.txt": "long enough\n\nlong enough", "b.txt": "long enough\n\nno"}, "kind 'b' has 1 documents"),
        ({"a.jsonl": "", "a.txt": "", "b.txt": ""}, "has a.jsonl and a.txt, two files of one kind; keep one"),
        ({"a.txt": "long enough\n\nlong enough", "b.jsonl": '{"text": 1}\n'}, "b.jsonl, line 1: expected"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(PolygluError, match=sentence):
        read_kinds(tmp_path, TOKENIZER, 5, 8)


def test_encoding_of_a_text_file_is_told_and_its_byte_order_mark_no_text(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes("\ufefflong enough\n\nlong enough".encode())
    assert bytes(read_kinds(tmp_path, TOKENIZER, 5, 8).tokens[0].tolist()) == b"long eno"
    (tmp_path / "b.txt").write_bytes(b"long enough\n\nlong \xff enough")
    with pytest.raises(PolygluError, match="b.txt is not UTF-8 text"):
        read_kinds(tmp_path, TOKENIZER, 5, 8)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match="is not a folder"):
        read_kinds(tmp_path / "none", TOKENIZER, 5, 8)
