import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.data import encoding
from polyglu.data.documents import TextBatch
from polyglu.data.encoding import Encoder, FastEncoder, at_risk, risky_code_points
from polyglu.data.quarantine import EMPTY, SPECIAL_TOKEN_TEXT, BadRecord
from polyglu.data.tokenizer import QWEN3_ADDED_TOKENS, QWEN3_SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_bpe
from polyglu.errors import PolygluError

AT_RISK = ["a\u07fd\u0301", "\u0899", "e\u1abf\u0301x", "\U000105d2\u0307", "\u0378", "\U00031350"]
SURE = ["plain", "é ñ Å ﬁ", "日本語 한국어", "🙂👩🏽‍💻", "Ελλάδα Привет", "हिन्दी ไทย", "e\u0301\u0327", "\U000f0000"]


@pytest.fixture(scope="module")
def qwen3() -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return load_tokenizer("Qwen/Qwen3-0.6B-Base")


@pytest.fixture(scope="module")
def encoder(qwen3: Tokenizer) -> Encoder:
    made = Encoder(qwen3, True, ["a.jsonl"])
    assert made.fast is not None
    return made


def batch_of(texts: Sequence[str], bad: Sequence[BadRecord] = ()) -> TextBatch:
    """Every other row is a document."""
    rows = np.arange(len(texts)) * 2
    positions = np.stack([np.array([0, 3, row]) for row in range(2 * len(texts) + 1)])
    return TextBatch(pa.array(texts, pa.large_string()), rows, positions, tuple(bad))


def documents_of(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    batch = encoder.encode(batch_of(texts))
    return [ids.tolist() for ids in np.split(batch.tokens, batch.ends[:-1])]


@pytest.mark.parametrize("texts", [SURE, AT_RISK, [*SURE, *AT_RISK, *SURE], [AT_RISK[0], *SURE, "", AT_RISK[1]]])
def test_ids_are_the_tokenizers(encoder: Encoder, qwen3: Tokenizer, texts: list[str]) -> None:
    assert documents_of(encoder, texts) == [[*qwen3.encode(text), qwen3.eos_id] for text in texts]
    assert documents_of(Encoder(qwen3, False, []), texts) == documents_of(encoder, texts)


tricky = st.text(
    st.characters(exclude_categories=["Cs"])
    | st.sampled_from("a1 \n\r\t'é\u0301\u0327\u1100\u1161\u11a8\u0344\u2126\u200d\ufeff\u3000<|>_-.")
    | st.characters(categories=["Mn", "Lm", "Nl", "No", "Zs", "Cn"]),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(st.lists(tricky, min_size=1, max_size=12))
def test_ids_are_the_tokenizers_on_any_text(encoder: Encoder, qwen3: Tokenizer, texts: list[str]) -> None:
    assert documents_of(encoder, texts) == [[*qwen3.encode(text), qwen3.eos_id] for text in texts]


def test_the_two_encoders_agree_on_every_character_that_is_not_at_risk(encoder: Encoder, qwen3: Tokenizer) -> None:
    """Beside a letter, doubled, and before an accent, where its place in the order of combining marks shows."""
    assert encoder.fast is not None
    sure = [chr(point) for point in np.flatnonzero(~risky_code_points()) if not 0xD800 <= point <= 0xDFFF]
    sure = [character for character in sure if unicodedata.category(character) not in ("Lo", "Co")] + ["丁", "각"]
    texts = [f"a{character}{character}e{character}\u0301 {character}1" for character in sure]
    tokens, ends = encoder.fast.encode(pa.array(texts, pa.large_string()))
    expected = qwen3.encode_batch(texts)
    found = [ids.tolist() for ids in np.split(tokens, ends[:-1])]
    assert [text for text, ids, right in zip(texts, found, expected, strict=True) if ids != right] == []


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=9), st.integers(0, 8)
)
def test_at_risk_is_told_by_the_characters(texts: list[str], start: int) -> None:
    risky = risky_code_points()
    column = pa.array(texts, pa.large_string())[min(start, len(texts) - 1) :]
    expected = [any(risky[ord(character)] for character in text) for text in column.to_pylist()]
    assert at_risk(column).tolist() == expected


def test_known_cases_of_risk() -> None:
    assert at_risk(pa.array(AT_RISK, pa.large_string())).all()
    assert not at_risk(pa.array(SURE, pa.large_string())).any()


def test_spelled_special_tokens_stay_text_and_are_noted(encoder: Encoder, qwen3: Tokenizer) -> None:
    added = [*QWEN3_SPECIAL_TOKENS, *QWEN3_ADDED_TOKENS]
    texts = ["nothing <|here|>", *(f"a{token}b" for token in added), "<|endoftext"]
    batch = encoder.encode(batch_of(texts, [BadRecord(1, EMPTY, 0)]))
    special = {qwen3.token_id(token) for token in added}
    inner = np.delete(batch.tokens, batch.ends - 1)
    assert not special.intersection(inner.tolist()) and (batch.tokens[batch.ends - 1] == qwen3.eos_id).all()
    noted = [BadRecord(2 * index, SPECIAL_TOKEN_TEXT, len(text)) for index, text in enumerate(texts)][1:-1]
    assert list(batch.bad) == sorted([BadRecord(1, EMPTY, 0), *noted], key=lambda record: record.row)


class Wrong:
    """A fast encoder with a fault in one document."""

    def __init__(self, right: FastEncoder, fault: int) -> None:
        self.right, self.fault = right, fault

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        tokens, ends = self.right.encode(texts)
        changed = tokens.copy()
        changed[ends[self.fault] - 1] ^= 1
        return changed, ends


def test_a_difference_stops_the_job_with_the_documents_position(
    qwen3: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SAMPLED", 1)
    checked = Encoder(qwen3, True, ["a.jsonl"])
    assert checked.fast is not None
    checked.fast = Wrong(checked.fast, 2)  # type: ignore[assignment]
    with pytest.raises(PolygluError, match=r"a\.jsonl, row group 3, row 6: .* other tokens .*encoder to reference"):
        checked.encode(batch_of(["one", AT_RISK[0], "two", "three"]))


def test_one_document_in_a_thousand_is_compared(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr(Encoder, "_reference", lambda self, texts: compared.extend(texts.to_pylist()) or [
        self.tokenizer.encode(text) for text in texts.to_pylist()
    ])  # fmt: skip
    encoder.encode(batch_of([f"document {number}" for number in range(30_000)]))
    assert 10 < len(set(compared)) < 60


def test_the_fast_encoder_is_made_anew_when_it_has_grown(
    encoder: Encoder, qwen3: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encoder.fast is not None
    before = encoder.fast._encoder
    documents_of(encoder, SURE)
    assert encoder.fast._encoder is before
    monkeypatch.setattr(encoding, "CACHE_BYTES", -1)
    assert documents_of(encoder, SURE) == [[*qwen3.encode(text), qwen3.eos_id] for text in SURE]
    assert encoder.fast._encoder is not before


def test_a_small_bpe_and_unknown_kinds_of_tokenizers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import tokenizers

    small = train_bpe(["the sum of 1 and 2 is 3 "] * 9, 290, tmp_path)
    made = Encoder(small, True, [])
    assert made.fast is not None
    assert documents_of(made, ["the sum é", ""]) == [[*small.encode(text), small.eos_id] for text in ("the sum é", "")]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2, "<|endoftext|>": 3}, "?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = Tokenizer("words", backend)
    with caplog.at_level("INFO"):
        made = Encoder(words, True, [])
    assert made.fast is None and "tokenizer words" in caplog.text
    assert documents_of(made, ["a b c", "b"]) == [[0, 1, 2, 3], [1, 3]]


def test_added_tokens_of_any_spelling_are_found(tmp_path: Path) -> None:
    import tokenizers

    small = train_bpe(["a b c"] * 9, 270, tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["[CLS]", "a b", "$^.*", "<｜x▁y｜>", "\\d"])
    backend.add_tokens(["  ", "\n\n"])  # white space is no spelling of anything
    odd = Encoder(Tokenizer("odd", backend), True, [])
    texts = ["x [CLS]", "CLS", "a b", "ab  c\n\n", "$^.*", "^.", "<｜x▁y｜>", "\\d", "3"]
    batch = odd.encode(batch_of(texts))
    assert [texts[record.row // 2] for record in batch.bad] == ["x [CLS]", "a b", "$^.*", "<｜x▁y｜>", "\\d"]
    assert documents_of(odd, texts) == [[*small.encode(text), small.eos_id] for text in texts]
