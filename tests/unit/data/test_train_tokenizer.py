import json
from pathlib import Path

import pytest

from polyglu.data.tokenizer import load_tokenizer
from polyglu.data.train_tokenizer import main
from polyglu.errors import PolygluError


def test_tokenizer_is_trained_on_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": "seven of seven"}) + "\n" for _ in range(20)))
    main([tmp_path / "a.jsonl"], tmp_path / "tokenizer", vocab_size=270, text_field="body")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert 260 <= tokenizer.vocab_size <= 270
    assert tokenizer.decode(tokenizer.encode("seven of eleven")) == "seven of eleven"
    assert len(tokenizer.encode("seven")) < 5


def test_files_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": 3}\n')
    for field, message in (("text", "no text in the column 'text'"), ("body", "has no field 'body'")):
        with pytest.raises(PolygluError, match=rf"a\.jsonl.*{message}"):
            main([tmp_path / "a.jsonl"], tmp_path / "tokenizer", text_field=field)
    assert not (tmp_path / "tokenizer").exists()
