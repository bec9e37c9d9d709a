import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from polyglu import chat as command
from polyglu.chat import fit_history
from polyglu.continuation import Piece, Sampling, continue_texts
from polyglu.data.chat import encode_prompt
from polyglu.data.tokenizer import Tokenizer, train_bpe
from polyglu.errors import PolygluError
from polyglu.inference import Inference, open_for_inference
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model, save_portable

app = typer.Typer()
app.command()(command.main)
ROOM = 96 - 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(["user assistant system"] * 2, 275, folder / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=16, d_ff=24, n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim=8,
        seq_length=96, routing_scope="causal",
    )  # fmt: skip
    save_portable(folder / "model.pt", create_model(config).state_dict(), config, 1, 0.5, tokenizer.identity())
    return folder / "model.pt"


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> Inference:
    return open_for_inference(checkpoint)


def talk(checkpoint: Path, lines: str, *arguments: str) -> Any:
    settings = ["--checkpoint", str(checkpoint), "--device", "cpu", "--max-new-tokens", "8", *arguments]
    outcome = CliRunner().invoke(app, settings, input=lines)
    if outcome.exception:
        raise outcome.exception
    return outcome


def answer(opened: Inference, messages: list[tuple[str, str]], **settings: Any) -> str:
    prompt = encode_prompt([{"role": role, "content": text} for role, text in messages], opened.tokenizer)
    return "".join(piece.text for piece in continue_texts(opened, [prompt], Sampling(8, **settings)))


def test_answers_follow_the_conversation(checkpoint: Path, opened: Inference) -> None:
    first = answer(opened, [("user", "a")])
    second = answer(opened, [("user", "a"), ("assistant", first), ("user", "b")])
    found = talk(checkpoint, "a\n\nb\n")  # an empty line is no message
    assert found.stdout == f"{first}\n{second}\n"
    assert found.stderr.count("tokens/s") >= 2
    again = talk(checkpoint, "a\n/reset \na\n /exit\nnever asked\n")
    assert again.stdout == f"{first}\n{first}\n"
    with_system = talk(checkpoint, "a\n/reset\na", "--system", "s").stdout
    assert with_system == 2 * (answer(opened, [("system", "s"), ("user", "a")]) + "\n")


def test_a_turn_reads_only_what_is_new(checkpoint: Path, opened: Inference) -> None:
    def read(*arguments: str) -> list[int]:
        told = talk(checkpoint, "a\nb\n/reset\na\n", "--temperature", "0.5", *arguments).stderr
        return [int(n) for n in re.findall(r"read (\d+) tokens", told)]

    first = encode_prompt([{"role": "user", "content": "a"}], opened.tokenizer)
    messages = [("user", "a"), ("assistant", answer(opened, [("user", "a")], temperature=0.5)), ("user", "b")]
    second = encode_prompt([{"role": role, "content": text} for role, text in messages], opened.tokenizer)
    found = read()
    assert found[0] == len(first) and found[1] <= len(second) - len(first)
    assert 1 <= found[2] < len(first)  # the beginning of a turn is known even after a reset
    assert read("--routing", "frozen") == [len(first), len(second), len(first)]  # an approximation is not kept


def test_a_full_context_is_told(checkpoint: Path) -> None:
    found = talk(checkpoint, "x" * 30 + "\n", "--max-new-tokens", "200", "--temperature", "0.5", "--seed", "1")
    assert "the text ends where the context of 96 tokens is full" in found.stderr
    assert "is full" not in talk(checkpoint, "x\n").stderr


def test_each_answer_has_a_seed_of_its_own(checkpoint: Path, opened: Inference) -> None:
    drawn = talk(checkpoint, "a\n/reset\na\n", "--temperature", "3", "--seed", "5").stdout
    assert drawn == "".join(answer(opened, [("user", "a")], temperature=3.0, seed=seed) + "\n" for seed in (5, 7))


def test_a_long_conversation_forgets_its_beginning(checkpoint: Path) -> None:
    found = talk(checkpoint, "".join(f"{n} and a few words\n" for n in range(6)))
    assert "the oldest 2 messages no longer fit and are forgotten" in found.stderr
    assert len(found.stdout.splitlines()) >= 6


def test_a_message_that_does_not_fit_is_refused_and_the_conversation_goes_on(
    checkpoint: Path, opened: Inference
) -> None:
    found = talk(checkpoint, "x" * 200 + "\na\n")
    assert "error: the message makes a prompt of 2" in found.stderr and f"there is room for {ROOM}" in found.stderr
    assert found.stdout == answer(opened, [("user", "a")]) + "\n"
    with pytest.raises(PolygluError, match="--system makes a prompt"):
        talk(checkpoint, "a\n", "--system", "x" * 200)


def test_an_interrupt_ends_the_answer_and_not_the_conversation(
    checkpoint: Path, opened: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def interrupted_once(opened: Inference, prompts: list[list[int]], *settings: Any) -> Iterator[Piece]:
        asked.append(len(prompts[0]))
        for n, piece in enumerate(continue_texts(opened, prompts, *settings)):
            if len(asked) == 1 and n == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(command, "continue_texts", interrupted_once)
    found = talk(checkpoint, "a\nb\n")
    assert "(interrupted)" in found.stderr and len(asked) == 2
    begun = found.stdout.split("\n")[0]
    assert answer(opened, [("user", "a")]).startswith(begun)
    assert answer(opened, [("user", "a"), ("assistant", begun), ("user", "b")]) + "\n" in found.stdout


def test_a_tokenizer_without_the_chat_format_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_file = command.open_for_inference

    def without_turns(*arguments: Any) -> Inference:
        opened = of_file(*arguments)
        opened.tokenizer.im_start_id = None
        return opened

    monkeypatch.setattr(command, "open_for_inference", without_turns)
    with pytest.raises(PolygluError, match="has no <|im_start|>"):
        talk(checkpoint, "a\n")


@pytest.fixture(scope="module")
def tokenizer(opened: Inference) -> Tokenizer:
    return opened.tokenizer


@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=7), system=st.booleans(), room=st.integers(30, 120))
def test_what_is_kept_fits_and_is_the_newest(tokenizer: Tokenizer, sizes: list[int], system: bool, room: int) -> None:
    roles = ["user", "assistant"] * 4
    talk = [{"role": role, "content": "x" * size} for role, size in zip(roles, sizes, strict=False)]
    talk = talk if len(talk) % 2 else talk[:-1] or [{"role": "user", "content": ""}]
    beginning = [{"role": "system", "content": "s"}] if system else []

    def length(messages: list[dict[str, str]]) -> int:
        return len(encode_prompt([*beginning, *messages], tokenizer))

    if length(talk[-1:]) > room:
        with pytest.raises(PolygluError, match="shorten it"):
            fit_history([*beginning, *talk], tokenizer, room)
        return
    kept = fit_history([*beginning, *talk], tokenizer, room)[len(beginning) :]
    assert kept == talk[-len(kept) :] and kept[0]["role"] == "user" and length(kept) <= room
    assert kept == talk or length(talk[-len(kept) - 2 :]) > room
