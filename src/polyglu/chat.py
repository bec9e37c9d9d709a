"""Talk to a fine-tuned checkpoint: ``polyglu chat --checkpoint C``.

A message is a line of stdin; answers go to stdout as they are written, what else is to be said to stderr. ``/reset``
forgets the conversation, ``/exit`` or the end of stdin leaves, Ctrl-C ends an answer.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from polyglu.continuation import Meter, Sampling, continue_texts, deviation_told, full_told
from polyglu.data.chat import Message, encode_prompt
from polyglu.data.tokenizer import Tokenizer, is_text
from polyglu.errors import PolygluError, run_command
from polyglu.generate import put, say
from polyglu.inference import Inference, open_for_inference
from polyglu.logs import configure_logging
from polyglu.model.conversation import Conversation
from polyglu.model.deviation import approximates
from polyglu.model.generation import Routing
from polyglu.model.prefix_tree import shares_prefixes

RESET, EXIT = "/reset", "/exit"


def main(
    checkpoint: Annotated[Path, typer.Option(help="Portable .pt file, or safetensors folder, fine-tuned for chat.")],
    system: Annotated[
        str | None, typer.Option(help="What the conversation begins with, as its system message.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among this many of the likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of the draws; each answer takes the next one.")] = 0,
    routing: Annotated[Routing, typer.Option(help="Of new tokens, as in polyglu generate.")] = "exact",
    tokenizer: Annotated[str | None, typer.Option(help="Name or path; default: the checkpoint's own.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default: CUDA if there is one.")] = None,
) -> None:
    """Answer messages, line by line."""
    configure_logging()
    if system is not None and not is_text(system):
        raise PolygluError("--system is not UTF-8 text; check the terminal's encoding.")
    opened = open_for_inference(checkpoint, tokenizer, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    beginning: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    fit_history(beginning, opened.tokenizer, _room(opened, max_new_tokens))
    say(f"a line is a message; {RESET} forgets the conversation, {EXIT} leaves, Ctrl-C ends an answer.")
    history, conversation = list(beginning), open_conversation(opened, routing)
    for turn, line in enumerate(read_lines()):
        if line.strip() == EXIT:
            break
        if line.strip() == RESET:
            history = list(beginning)
            say("the conversation begins anew.")
        elif line.strip():
            sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed + turn, routing, tuple(stop or ()))
            history = talk(opened, history, line, sampling, conversation)


def open_conversation(opened: Inference, routing: Routing) -> Conversation | None:
    """What keeps a conversation's cache between turns; None if each new token changes all that was read."""
    kept = shares_prefixes(opened.model) and not approximates(opened.model, routing)
    return Conversation(opened.model, opened.tau) if kept else None


def talk(
    opened: Inference, history: Sequence[Message], line: str, sampling: Sampling, conversation: Conversation | None
) -> list[Message]:
    """Answer a message on stdout; return the history with both, or as it was if the message does not fit."""
    asked = [*history, {"role": "user", "content": line}]
    try:
        if not is_text(line):
            raise PolygluError("the message is not UTF-8 text; check the terminal's encoding.")
        kept = fit_history(asked, opened.tokenizer, _room(opened, sampling.max_new_tokens))
    except PolygluError as error:
        say(f"error: {error}")
        return list(history)
    if len(kept) < len(asked):
        say(f"the oldest {len(asked) - len(kept)} messages no longer fit and are forgotten.")
    prompt = encode_prompt(kept, opened.tokenizer)
    answer, new = answered(opened, prompt, sampling, conversation)
    say(full_told(opened, [prompt], [new]))
    say(deviation_told(opened, [prompt], [new], sampling.routing))
    return [*kept, {"role": "assistant", "content": answer}]


def answered(
    opened: Inference, prompt: Sequence[int], sampling: Sampling, conversation: Conversation | None
) -> tuple[str, list[int]]:
    """Stream an answer to stdout; return its text and its tokens, of which an interrupted one tells none."""
    known = 0 if conversation is None else conversation.known(prompt)
    meter, answer, new = Meter(len(prompt) - known), "", list[int]()
    try:
        for piece in continue_texts(opened, [prompt], sampling, conversation):
            meter.count(piece)
            put(piece.text)
            answer += piece.text
            new = new if piece.new is None else piece.new
    except KeyboardInterrupt:
        say("\n(interrupted)")
    put("\n")
    say(meter.told())
    return answer, new


def fit_history(messages: Sequence[Message], tokenizer: Tokenizer, room: int) -> list[Message]:
    """The messages without the oldest ones, so that their prompt has at most ``room`` tokens.

    A system message at the beginning stays; after it, the first message that is kept is a user's.

    Raises:
        PolygluError: the last message alone does not fit, or the tokenizer has no chat format.
    """
    n_system = 1 if messages and messages[0]["role"] == "system" else 0
    beginning, rest = list(messages[:n_system]), list(messages[n_system:])
    while (length := len(encode_prompt([*beginning, *rest], tokenizer))) > room:
        if len(rest) < 2:
            what = "the message" if rest else "--system"
            raise PolygluError(f"{what} makes a prompt of {length} tokens, there is room for {room}; shorten it.")
        rest = rest[1:]
        while rest[0]["role"] != "user":
            rest = rest[1:]
    return [*beginning, *rest]


def _room(opened: Inference, max_new_tokens: int) -> int:
    """Tokens of a prompt: what the answer leaves of the context, but at least half of it."""
    longest = opened.model.config.seq_length
    return max(longest - max_new_tokens, longest // 2)


def read_lines() -> Iterator[str]:
    """Lines of stdin; on a terminal with a sign to write at, where Ctrl-C drops the line."""
    while True:
        try:
            line = _read_line()
        except EOFError:
            return
        except KeyboardInterrupt:
            say(f"\n{EXIT} or Ctrl-D leaves.")
            continue
        yield line


def _read_line() -> str:
    """The next line; EOFError at the end."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401  # input() then lets a line be edited

        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
