import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyglu.data.stopping import TextStream, cut_at, stop_rule
from polyglu.data.tokenizer import Tokenizer, train_bpe

TEXT = "Question: 3 + 4 =\nAnswer: 7\n#### 7 née 日本語 🙂"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe([TEXT] * 4, 290, tmp_path_factory.mktemp("bpe"))


@pytest.mark.parametrize("stop", ["####", "\n#", "estion", "swer: 7\n", "é", "日本"])
def test_stop_strings_are_found_across_token_borders(tokenizer: Tokenizer, stop: str) -> None:
    ids = tokenizer.encode(TEXT)
    rule = stop_rule(tokenizer, ["never this", stop])
    assert rule is not None
    fired = [rule(ids[:n]) for n in range(1, len(ids) + 1)]
    # The rule must fire at the very token that completes the stop string.
    complete = [stop in tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
    assert True in complete and fired.index(True) == complete.index(True)


def test_without_stop_strings_there_is_no_rule(tokenizer: Tokenizer) -> None:
    assert stop_rule(tokenizer, []) is None


def test_text_is_cut_at_the_first_stop_string() -> None:
    assert cut_at("a b c", ["c", "b"]) == "a "
    assert cut_at("a b c", ["x"]) == "a b c"
    assert cut_at("a", []) == "a"


def streamed(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> list[str]:
    """Pieces of the tokens up to the one that fulfils the stop rule, and the rest."""
    stream, rule, pieces = TextStream(tokenizer, stops), stop_rule(tokenizer, stops), []
    for n, token in enumerate(ids, start=1):
        pieces.append(stream.push(token))
        if rule is not None and rule(ids[:n]):
            break
    return [*pieces, stream.end()]


@given(st.data())
def test_pieces_are_the_text_up_to_the_stop_string(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Of any tokens, most of which are single bytes that are no characters, and any stop strings in their text."""
    known = st.sampled_from(tokenizer.encode(TEXT))
    ids = data.draw(st.lists(known | st.integers(3, tokenizer.vocab_size - 1), max_size=20))
    text = tokenizer.decode(ids)
    stop = st.tuples(st.integers(0, len(text)), st.integers(1, 4)).map(lambda cut: text[cut[0] : sum(cut)] or "#")
    stops = data.draw(st.lists(stop.filter(lambda found: "\ufffd" not in found), max_size=3))
    rule = stop_rule(tokenizer, stops)
    # A stop string that begins earlier may be completed by what would have come after the end.
    end = next((n for n in range(1, len(ids) + 1) if rule is not None and rule(ids[:n])), len(ids))
    assert "".join(streamed(tokenizer, ids, stops)) == cut_at(tokenizer.decode(ids[:end]), stops)


def test_the_stop_string_that_is_complete_first_ends_the_text(tokenizer: Tokenizer) -> None:
    """Though the other begins earlier."""
    ids = [token for character in "#123" for token in tokenizer.encode(character)]
    assert "".join(streamed(tokenizer, ids, ["123", "2"])) == "#1"


def test_text_comes_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    ids = [token for character in TEXT for token in tokenizer.encode(character)]
    assert len(ids) > len(TEXT)  # a character of several bytes is several tokens
    pieces = streamed(tokenizer, ids, [])
    assert [piece for piece in pieces if piece] == list(TEXT) and pieces[-1] == ""
    beyond = TextStream(tokenizer, ["née"])
    assert "".join(beyond.push(token) for token in ids) + beyond.end() == TEXT[: TEXT.index("née")]
    ids = [token for character in "a#b##c" for token in tokenizer.encode(character)]
    assert streamed(tokenizer, ids, ["##d", "é"]) == ["a", "", "#b", "", "", "##c", ""]
