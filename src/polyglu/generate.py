"""Continue prompts with a checkpoint: ``polyglu generate --checkpoint C --prompt "..."``.

One prompt: its text comes on stdout as it is written. Several, from a file or stdin: one JSON object a line, in their
order. What else is to be said goes to stderr.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from polyglu.continuation import Meter, Sampling, check_lengths, continue_texts, deviation_told, full_told
from polyglu.data.chat import encode_prompt
from polyglu.data.tokenizer import is_text
from polyglu.errors import PolygluError, run_command
from polyglu.inference import Inference, open_for_inference
from polyglu.logs import configure_logging, console
from polyglu.model.generation import Routing
from polyglu.routing_view import coloured, routed_layer, shares, token_weights

STDIN = Path("-")


def main(
    checkpoint: Annotated[Path, typer.Option(help="Portable .pt file, or exported folder.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue, or the user's message with --chat.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="Several prompts: one a line, or JSON objects with a 'prompt'; - or nothing at all: stdin. "
            "Results are JSON lines."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among this many of the likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages (fine-tuned checkpoints).")
    ] = False,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="Colour each token by the activation that a layer's neurons prefer.")
    ] = False,
    layer: Annotated[int | None, typer.Option(help="Of --show-routing, from 0; default: the last one.")] = None,
    routing: Annotated[
        Routing,
        typer.Option(
            help="Of new tokens. frozen, running: with a model that is not causal, approximate what exact computes "
            "from the whole text for each token."
        ),
    ] = "exact",
    tokenizer: Annotated[str | None, typer.Option(help="Name or path; default: the checkpoint's own.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default: CUDA if there is one.")] = None,
) -> None:
    """Continue a prompt on stdout, or several as JSON lines."""
    configure_logging()
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, routing, tuple(stop or ()))
    if prompt is not None and prompt_file is not None:
        raise PolygluError("--prompt and --prompt-file exclude each other; give one of them.")
    if prompt is None and prompt_file is None and sys.stdin.isatty():
        raise PolygluError("there is nothing to continue; give --prompt, or --prompt-file, or prompts on stdin.")
    if prompt is None and show_routing:
        raise PolygluError("--show-routing shows one text; give it with --prompt.")
    texts = [prompt] if prompt is not None else read_prompts(prompt_file or STDIN)
    if not all(map(is_text, texts)):
        raise PolygluError("the prompt is not UTF-8 text; check the terminal's encoding.")
    opened = open_for_inference(checkpoint, tokenizer, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prompts = [encode(opened, text, chat) for text in texts]
    if "" in texts and not chat:
        say("an empty prompt begins a new document.")
    check_lengths(opened, prompts)
    if prompt is None:
        new = write_lines(opened, texts, prompts, sampling)
    elif show_routing:
        new = show(opened, prompts[0], sampling, routed_layer(opened.model, layer))
    else:
        new = write_text(opened, prompts[0], sampling)
    say(full_told(opened, prompts, new))
    say(deviation_told(opened, prompts, new, routing))


def encode(opened: Inference, text: str, chat: bool) -> list[int]:
    """Token ids of a prompt. An empty one begins a new document, behind the token that ends one."""
    if chat:
        return encode_prompt([{"role": "user", "content": text}], opened.tokenizer)
    return opened.tokenizer.encode(text) or [opened.tokenizer.eos_id]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, or of stdin for ``-``: its lines without the empty ones, or what its JSON lines have.

    Raises:
        PolygluError: the file cannot be read, is no text, has no prompt, or a JSON line without one.
    """
    name = "stdin" if path == STDIN else str(path)
    try:
        content = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        lines = [line.rstrip("\r") for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise PolygluError(f"prompt file {name} cannot be read: {error.strerror}; give another.") from None
    except UnicodeDecodeError:
        raise PolygluError(f"prompt file {name} is not UTF-8 text; convert it.") from None
    if not lines:
        raise PolygluError(f"prompt file {name} has no prompt; write one a line.")
    objects = [_object(line) for line in lines]
    if objects[0] is None:
        return lines
    prompts = [None if found is None else found.get("prompt") for found in objects]
    for number, prompt in enumerate(prompts, start=1):
        if not is_text(prompt):
            raise PolygluError(
                f"prompt file {name} begins with a JSON object, but line {number} is none whose 'prompt' is a string; "
                "give all prompts like that, or all as plain lines."
            )
    return [str(prompt) for prompt in prompts]


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_text(opened: Inference, prompt: Sequence[int], sampling: Sampling) -> list[list[int]]:
    """Stream one text to stdout, which gets a line's end at last; return its tokens."""
    meter, new = Meter(len(prompt)), list[int]()
    for piece in continue_texts(opened, [prompt], sampling):
        meter.count(piece)
        put(piece.text)
        new = new if piece.new is None else piece.new
    put("\n")
    say(meter.told())
    return [new]


def write_lines(
    opened: Inference, texts: Sequence[str], prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """Continue all prompts together; write each as soon as those before it are written. Return their tokens."""
    meter = Meter(sum(map(len, prompts)), len(prompts))
    written: list[str] = [""] * len(prompts)
    ended: dict[int, list[int]] = {}
    told = 0
    for piece in continue_texts(opened, prompts, sampling):
        meter.count(piece)
        written[piece.row] += piece.text
        if piece.new is not None:
            ended[piece.row] = piece.new
        while told in ended:
            row = {"prompt": texts[told], "text": written[told], "tokens": len(ended[told])}
            put(json.dumps(row, ensure_ascii=False) + "\n")
            told += 1
    say(meter.told())
    return [ended[row] for row in range(len(prompts))]


def show(opened: Inference, prompt: Sequence[int], sampling: Sampling, layer: int) -> list[list[int]]:
    """Write one text, once it is whole, in the colours of a layer's routing; return its tokens.

    The routing is that of prompt and text read together, so that the last token has one too.
    """
    meter, new = Meter(len(prompt)), list[int]()
    for piece in continue_texts(opened, [prompt], sampling):
        meter.count(piece)
        new = new if piece.new is None else piece.new
    read = [*prompt, *new][: opened.model.config.seq_length]
    weights = token_weights(opened.model, read, opened.tau, layer)[len(prompt) :]
    with named_stdout():
        console().print(coloured(opened.tokenizer, new, weights, sampling.stop), soft_wrap=True)
    console(stderr=True).print(shares(weights, layer))
    say(meter.told())
    return [new]


def put(text: str) -> None:
    """Write to stdout at once."""
    with named_stdout():
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def named_stdout() -> Iterator[None]:
    """Name stdout in an error of the system: the disk behind it may be full."""
    try:
        yield
    except OSError as error:
        error.filename = "stdout"
        raise


def say(message: str | None) -> None:
    """A line on stderr."""
    if message is not None:
        sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
