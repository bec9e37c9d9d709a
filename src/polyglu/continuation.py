"""Text that a checkpoint adds to prompts, as it comes: what ``polyglu generate`` and ``polyglu chat`` share."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from polyglu.data.stopping import TextStream, stop_rule
from polyglu.errors import PolygluError
from polyglu.inference import Inference
from polyglu.model.deviation import approximates, routing_deviation
from polyglu.model.generation import Decoder, Routing, generate_rows

COMPARED = 32
"""Positions at which an approximate routing is compared with the exact one: each of them runs its whole text."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a row ends; as in ``generate_rows``."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    routing: Routing = "exact"
    stop: tuple[str, ...] = ()
    """Strings that end a row; they are not shown."""


class Piece(NamedTuple):
    """Text that a row has gained."""

    row: int
    text: str
    """May be empty."""
    new: list[int] | None = None
    """All of the row's new tokens, with its last piece."""


def continue_texts(
    opened: Inference, prompts: Sequence[Sequence[int]], sampling: Sampling, decoder: Decoder | None = None
) -> Iterator[Piece]:
    """Continue prompts, all of them together, until an end token, a stop string or a limit.

    Args:
        opened: model and tokenizer.
        prompts: token ids.
        sampling: settings.
        decoder: that is open already; else one is opened.

    Returns:
        Pieces of the rows as they come: all pieces of a row are its text up to the first stop string.

    Raises:
        PolygluError: a stop string is empty, or a prompt does not fit.
    """
    if "" in sampling.stop:
        raise PolygluError("a --stop string is empty, so every text would end before it begins; leave it out.")
    check_lengths(opened, prompts)
    streams = [TextStream(opened.tokenizer, sampling.stop) for _ in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    events = generate_rows(
        opened.model,
        prompts,
        max_new_tokens=sampling.max_new_tokens,
        tau=opened.tau,
        eos_ids=opened.tokenizer.end_ids,
        stop=stop_rule(opened.tokenizer, sampling.stop),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        routing=sampling.routing,
        decoder=decoder,
    )
    for row, token in events:
        if token is None:
            yield Piece(row, streams[row].end(), new[row])
        else:
            new[row].append(token)
            yield Piece(row, streams[row].push(token))


def check_lengths(opened: Inference, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that do not fit, with a PolygluError."""
    longest = opened.model.config.seq_length
    for index, prompt in enumerate(prompts):
        if len(prompt) > longest:
            which = f"prompt {index + 1}" if len(prompts) > 1 else "the prompt"
            raise PolygluError(f"{which} has {len(prompt)} tokens, the model takes at most {longest}; shorten it.")


def full_told(opened: Inference, prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> str | None:
    """How many texts end where the model reads no further, in a sentence; None if none does."""
    longest = opened.model.config.seq_length
    full = sum(len(prompt) + len(row) > longest for prompt, row in zip(prompts, new, strict=True))
    if not full:
        return None
    which = "the text ends" if len(new) == 1 else f"{full} of {len(new)} texts end"
    return f"{which} where the context of {longest} tokens is full"


@dataclass
class Meter:
    """Speed of a generation, told when it is over."""

    prompt_tokens: int
    rows: int = 1
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    new_tokens: int = 0

    def count(self, piece: Piece) -> None:
        """Note a piece when it comes; each but a row's last one is a token."""
        self.last = time.perf_counter()
        if piece.new is None:
            self.new_tokens += 1
            self.first = self.first or self.last

    def told(self) -> str:
        """A line for the log."""
        if not self.new_tokens:
            return f"read {self.prompt_tokens} tokens, and the answer to them is an end: nothing is added"
        if self.rows > 1:  # while some prompts are read, others go on
            rate = _rate(self.new_tokens, self.last - self.started)
            return f"read {self.rows} prompts of {self.prompt_tokens} tokens, wrote {self.new_tokens} tokens{rate}"
        read = _rate(self.prompt_tokens, self.first - self.started)
        wrote = _rate(self.new_tokens - 1, self.last - self.first) if self.new_tokens > 1 else ""
        return f"read {self.prompt_tokens} tokens{read}, wrote {self.new_tokens}{wrote}"


def _rate(tokens: int, seconds: float) -> str:
    return f" ({tokens / max(seconds, 1e-9):,.0f} tokens/s)"


def deviation_told(
    opened: Inference, prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]], routing: Routing
) -> str | None:
    """What an approximate routing changes on the text at hand, in a sentence; None if it is exact.

    Measured at no more than ``COMPARED`` positions of the new texts, evenly spaced.
    """
    if not approximates(opened.model, routing):
        return None
    room = opened.model.config.seq_length
    pairs = [(prompt, row[: room - len(prompt)]) for prompt, row in zip(prompts, new, strict=True)]
    pairs = [(prompt, row) for prompt, row in pairs if row][:COMPARED]
    if not pairs:
        return f"--routing {routing} approximates; there is no new text on which to measure by how much"
    found = routing_deviation(
        opened.model, *zip(*pairs, strict=True), tau=opened.tau, routing=routing, of_row=COMPARED // len(pairs)
    )
    return (
        f"--routing {routing} approximates: at {found.positions} positions of this text logits are off by "
        f"{found.mean:.2g} on average and {found.largest:.2g} at most, "
        f"and the likeliest token is another at {found.other_choice:.0%} of them"
    )
