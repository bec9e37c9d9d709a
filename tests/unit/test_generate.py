from pathlib import Path

import pytest
import torch
import typer
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


def run(checkpoint: Path, *arguments: str) -> str:
    outcome = CliRunner().invoke(app, ["--checkpoint", str(checkpoint), "--device", "cpu", *arguments])
    if outcome.exception:
        raise outcome.exception
    return outcome.stdout


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
    assert run(checkpoint, "--prompt", "", "--max-new-tokens", "5") != found


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


def test_routing_is_chosen_by_name(checkpoint: Path) -> None:
    settings = ("--prompt", "one", "--max-new-tokens", "5")
    assert run(checkpoint, *settings, "--routing", "running") == run(checkpoint, *settings)  # the model is causal
    run(checkpoint, *settings, "--routing", "frozen")
    assert CliRunner().invoke(app, ["--checkpoint", "c", "--prompt", "p", "--routing", "guessed"]).exit_code == 2


def test_a_prompt_that_does_not_fit_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PolygluError, match="the model takes at most 32"):
        run(checkpoint, "--prompt", "one two three " * 30)
