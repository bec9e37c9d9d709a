import errno
import io
import json
import re
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from polyglu import generate as command
from polyglu.data.chat import encode_prompt
from polyglu.data.tokenizer import train_bpe
from polyglu.errors import PolygluError
from polyglu.inference import open_for_inference
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model, save_portable

app = typer.Typer()
app.command()(command.main)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(["one two three", "1 + 2 = 3"], 270, folder / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=16, d_ff=24, n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim=8,
        seq_length=32, routing_scope="causal",
    )  # fmt: skip
    model = create_model(config)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(10)
    save_portable(folder / "model.pt", model.state_dict(), config, 1, 0.5, tokenizer.identity())
    return folder / "model.pt"


def invoke(checkpoint: Path, *arguments: str, stdin: str | bytes | None = None) -> Result:
    outcome = CliRunner().invoke(app, ["--checkpoint", str(checkpoint), "--device", "cpu", *arguments], input=stdin)
    if outcome.exception:
        raise outcome.exception
    return outcome


def run(checkpoint: Path, *arguments: str) -> str:
    return invoke(checkpoint, *arguments).stdout


def plain_loop(checkpoint: Path, prompt: list[int], n: int) -> str:
    opened = open_for_inference(checkpoint)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(n):
            tokens.append(int(opened.model(torch.tensor([tokens]), tau=opened.tau)[0, -1].argmax()))
    assert opened.tokenizer.eos_id not in tokens[len(prompt) :]
    return opened.tokenizer.decode(tokens[len(prompt) :]) + "\n"


def test_prints_the_likeliest_continuation(checkpoint: Path) -> None:
    tokenizer = open_for_inference(checkpoint).tokenizer
    found = run(checkpoint, "--prompt", "one two", "--max-new-tokens", "5")
    assert found == plain_loop(checkpoint, tokenizer.encode("one two"), 5)
    empty = invoke(checkpoint, "--prompt", "", "--max-new-tokens", "5")
    assert empty.stdout == "\n" and "the answer to them is an end" in empty.stderr  # this model repeats its prompt
    assert "an empty prompt begins a new document" in empty.stderr


def test_chat_puts_the_prompt_into_a_conversation(checkpoint: Path) -> None:
    tokenizer = open_for_inference(checkpoint).tokenizer
    prompt = encode_prompt([{"role": "user", "content": "1 + 2"}], tokenizer)
    found = run(checkpoint, "--prompt", "1 + 2", "--chat", "--max-new-tokens", "4")
    assert found == plain_loop(checkpoint, prompt, 4)


def test_draws_follow_the_seed(checkpoint: Path) -> None:
    settings = ("--prompt", "one", "--max-new-tokens", "12", "--temperature", "5")
    draws = [run(checkpoint, *settings, "--seed", seed) for seed in ("1", "1", "2")]
    assert draws[0] == draws[1] != draws[2]


def test_draws_are_among_the_likeliest(checkpoint: Path) -> None:
    settings = ("--prompt", "one", "--max-new-tokens", "12")
    likeliest = run(checkpoint, *settings)
    assert run(checkpoint, *settings, "--temperature", "5", "--top-k", "1") == likeliest
    assert run(checkpoint, *settings, "--temperature", "5", "--top-k", "3") != likeliest


def test_routing_is_chosen_by_name_and_its_deviation_is_told(checkpoint: Path) -> None:
    settings = ("--prompt", "one", "--max-new-tokens", "5")
    running = invoke(checkpoint, *settings, "--routing", "running")
    assert running.stdout == run(checkpoint, *settings) and "approximates" not in running.stderr  # the model is causal
    frozen = invoke(checkpoint, *settings, "--routing", "frozen").stderr
    assert "--routing frozen approximates: at 5 positions of this text logits are off by" in frozen
    assert CliRunner().invoke(app, ["--checkpoint", "c", "--prompt", "p", "--routing", "guessed"]).exit_code == 2


def test_a_stop_string_ends_the_text_before_it(checkpoint: Path) -> None:
    free = run(checkpoint, "--prompt", "one two", "--max-new-tokens", "20")
    for stop in (free[3:6], free[8:9]):
        found = run(checkpoint, "--prompt", "one two", "--max-new-tokens", "20", "--stop", "never met", "--stop", stop)
        assert found == free[: free.index(stop)] + "\n"
    assert run(checkpoint, "--prompt", "one two", "--max-new-tokens", "20", "--stop", "never met") == free


def test_speed_is_told_beside_the_text(checkpoint: Path) -> None:
    told = invoke(checkpoint, "--prompt", "one two", "--max-new-tokens", "5").stderr
    assert re.search(r"read \d+ tokens \([\d,]+ tokens/s\), wrote 5 \([\d,]+ tokens/s\)", told)


@pytest.mark.parametrize("form", ["lines", "objects"])
def test_several_prompts_give_json_lines_in_their_order(checkpoint: Path, tmp_path: Path, form: str) -> None:
    texts = ["one two", "1 + 2 = 3 one\u2028two", "three"]
    lines = texts if form == "lines" else [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    content = "\ufeff" + "\n\n".join(lines) + "\r\n"  # as Windows writes it
    (tmp_path / "prompts").write_bytes(content.encode())
    settings = ("--max-new-tokens", "5")
    found = run(checkpoint, *settings, "--prompt-file", str(tmp_path / "prompts"))
    assert found == invoke(checkpoint, *settings, "--prompt-file", "-", stdin=content.encode()).stdout
    assert found == invoke(checkpoint, *settings, stdin=content.encode()).stdout
    rows = [json.loads(line) for line in found.split("\n")[:-1]]
    alone = [run(checkpoint, "--prompt", text, *settings) for text in texts]
    assert [(row["prompt"], row["text"] + "\n", row["tokens"]) for row in rows] == [
        (text, answer, 5) for text, answer in zip(texts, alone, strict=True)
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "has no prompt"),
        (b"\n \n", "has no prompt"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"prompt": "a"}\nb', "line 2 is none whose 'prompt' is a string"),
        (b'{"text": "a"}', "line 1 is none whose 'prompt' is a string"),
        (b'{"prompt": "\\ud800"}', "line 1 is none whose 'prompt' is a string"),
        (b"a\n" + b"one two three " * 30, "prompt 2 has 120 tokens, the model takes at most 32"),
    ],
)
def test_prompt_files_that_cannot_serve_are_refused(
    checkpoint: Path, tmp_path: Path, content: bytes, told: str
) -> None:
    (tmp_path / "prompts").write_bytes(content)
    with pytest.raises(PolygluError, match=told):
        run(checkpoint, "--prompt-file", str(tmp_path / "prompts"))


def test_what_is_asked_for_must_fit_together(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match="exclude each other"):
        run(checkpoint, "--prompt", "a", "--prompt-file", "b")
    with pytest.raises(PolygluError, match="cannot be read: No such file"):
        run(checkpoint, "--prompt-file", str(tmp_path / "nothing"))
    with pytest.raises(PolygluError, match="cannot be read: Is a directory"):
        run(checkpoint, "--prompt-file", str(tmp_path))
    with pytest.raises(PolygluError, match="--stop string is empty"):
        run(checkpoint, "--prompt", "a", "--stop", "")
    with pytest.raises(PolygluError, match="give it with --prompt"):
        run(checkpoint, "--prompt-file", "b", "--show-routing")
    with pytest.raises(PolygluError, match="--layer 1: this model has layers 0 to 0"):
        run(checkpoint, "--prompt", "a", "--show-routing", "--layer", "1")
    assert CliRunner().invoke(app, ["--checkpoint", "c", "--prompt", "p", "--max-new-tokens", "0"]).exit_code == 2


def test_shown_routing_leaves_the_text_as_it_is(checkpoint: Path) -> None:
    """Where stdout is no terminal: then without colours. The shares stand beside it."""
    settings = ("--prompt", "one two", "--max-new-tokens", "200", "--stop", "never met")  # up to a full context
    shown = invoke(checkpoint, *settings, "--show-routing")
    assert shown.stdout == run(checkpoint, *settings)
    assert "layer 0: routing" in shown.stderr and "Tanh / GABA" in shown.stderr and "wrote" in shown.stderr
    assert sum(float(share) for share in re.findall(r"([\d.]+)%", shown.stderr)) == pytest.approx(100, abs=0.3)


def test_a_full_disk_behind_stdout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(OSError, match="No space left on device: 'stdout'"):
        command.put("text")
    monkeypatch.undo()


def test_a_full_context_is_told(checkpoint: Path) -> None:
    settings = ("--max-new-tokens", "200", "--stop", "never met")
    assert (
        "the text ends where the context of 32 tokens is full"
        in invoke(checkpoint, "--prompt", "one", *settings).stderr
    )
    both = invoke(checkpoint, *settings, stdin="one\none two").stderr
    assert "2 of 2 texts end where" in both
    assert "is full" not in invoke(checkpoint, "--prompt", "one two", "--max-new-tokens", "5").stderr


def test_a_prompt_that_does_not_fit_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PolygluError, match="the model takes at most 32"):
        run(checkpoint, "--prompt", "one two three " * 30)
