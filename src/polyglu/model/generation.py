"""Continuing prompts. A row's result is that of running it alone, whatever else runs beside it.

waiting prompts ──► groups of bounded size ──► packed into free slots ──► logits of each prompt's last position
                                                                              │
ended rows free their slots ◄── choose a token ◄──────────────────────────────┤
        │                                                                     │
        └── the others: one token each, side by side ──► cache ──► logits ────┘
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from polyglu.errors import PolygluError
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.cache import Cache, slots_within
from polyglu.model.packing import groups_of_tokens, pack_rows
from polyglu.model.prefix_tree import shares_prefixes

NOT_FINITE = "the model's logits are not finite; take an earlier checkpoint, or fp32 in place of bf16."
MAX_TOKENS = 16384
"""Tokens of one forward pass, which bounds its memory."""
CACHE_BYTES = 2 * 2**30
"""Of keys and values. Prompts wait where more rows would not fit; one row always runs."""

StopRule = Callable[[list[int]], bool]
"""Told the new tokens of a row so far; true ends the row."""
Routing = Literal["exact", "frozen", "running"]
"""What routes a new token. exact: what training did; under ``document`` scope, where every token moves the routing of
all positions, the whole row runs again for each. frozen: the prompt's mean. running: the mean up to the token, as under
``causal`` scope. The last two approximate ``document`` scope with the cost of the cache (``deviation``)."""


@torch.inference_mode()
def next_token_logits(
    model: PolychromaticLM, rows: Sequence[Sequence[int]], tau: float, max_tokens: int = MAX_TOKENS
) -> Tensor:
    """Logits ``[rows, V]`` of the token after each row, deterministic: no routing noise.

    Raises:
        ValueError: the model's routing scope is ``sequence``, under which packed rows would see each other.
    """
    _check_scope(model)
    device = model.embed_tokens.weight.device
    logits = []
    for group in groups_of_tokens([len(row) for row in rows], max_tokens):
        input_ids, cu_seqlens = pack_rows(rows[group], device)
        features, _ = model.features(input_ids, cu_seqlens=cu_seqlens, tau=tau)  # [1, N, D]
        logits.append(model.head(features[0, cu_seqlens[1:].long() - 1]).float())  # [rows of the group, V]
    return torch.cat(logits)


@dataclass
class _Row:
    """A prompt and what became of it."""

    index: int
    prompt: Sequence[int]
    generator: torch.Generator
    new: list[int] = field(default_factory=list)


class Decoder(Protocol):
    """Rows in slots; those in use are 0 to n - 1 when ``step`` is called."""

    slots: int

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Logits ``[prompts, V]`` of the token after each."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits ``[n, V]`` of the token after these."""

    def free(self, slot: int) -> None:
        """Forget a row."""

    def move(self, source: int, target: int) -> None:
        """Give a row a free slot, and free its own."""


class _WholeRows:
    """Every position of a row again for each token, where each token changes all of them."""

    def __init__(self, model: PolychromaticLM, tau: float, slots: int, max_tokens: int) -> None:
        self.model, self.tau, self.slots, self.max_tokens = model, tau, slots, max_tokens
        self.rows: list[list[int]] = [[] for _ in range(slots)]

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        for slot, prompt in zip(slots, prompts, strict=True):
            self.rows[slot] = list(prompt)
        return next_token_logits(self.model, prompts, self.tau, self.max_tokens)

    def step(self, tokens: Sequence[int]) -> Tensor:
        rows = self.rows[: len(tokens)]
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        return next_token_logits(self.model, rows, self.tau, self.max_tokens)

    def free(self, slot: int) -> None:
        self.rows[slot] = []

    def move(self, source: int, target: int) -> None:
        self.rows[target], self.rows[source] = self.rows[source], []


class Event(NamedTuple):
    """A new token of a row, or the end of it."""

    row: int
    """Index of the prompt."""
    token: int | None
    """None: the row has ended; nothing more comes of it."""


def generate(model: PolychromaticLM, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """The new tokens of each row, in the order of the prompts; arguments and errors as in ``generate_rows``."""
    rows: list[list[int]] = [[] for _ in prompts]
    for event in generate_rows(model, prompts, **settings):
        if event.token is not None:
            rows[event.row].append(event.token)
    return rows


def generate_rows(
    model: PolychromaticLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tau: float,
    eos_ids: Collection[int],
    stop: StopRule | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    routing: Routing = "exact",
    max_rows: int | None = None,
    max_tokens: int = MAX_TOKENS,
    cache_bytes: int = CACHE_BYTES,
    decoder: Decoder | None = None,
) -> Iterator[Event]:
    """Continue each prompt until an end token, the stop rule, ``max_new_tokens`` or the model's ``seq_length``.

    A row's result depends on neither the other rows nor their number: each row draws from a generator of its own. A row
    that ends gives its place to the next prompt at once.

    Args:
        model: with routing scope ``document`` or ``causal``, or without routing.
        prompts: token ids, at least one each and at most ``seq_length``.
        max_new_tokens: most tokens added to a prompt, at least one.
        tau: routing temperature, the checkpoint's.
        eos_ids: tokens that end a row; they are not part of the result.
        stop: asked after each new token; the token that fulfils it is part of the result.
        temperature: 0 takes the likeliest token, else tokens are drawn from softmax(logits / temperature).
        top_k: draw only among this many of the likeliest tokens; 0: among all.
        top_p: draw only among the likeliest of these that together have at least this probability.
        seed: of the draws: one for each row, or row i draws from ``seed + i``.
        routing: of new tokens; anything but ``exact`` is an approximation, unless the model is ``causal`` and this
            is ``running``.
        max_rows: rows that run together; as many as the cache holds if absent.
        max_tokens: tokens of one forward pass.
        cache_bytes: of keys and values, which bounds the rows that run together.
        decoder: that is open already; then the four arguments before it and ``tau`` are its own.

    Returns:
        The new tokens of all rows as they come, those of a row in order, and then its end.

    Raises:
        ValueError: no new tokens are asked for, a setting of the choice that means nothing, an empty prompt, one
            longer than the model's ``seq_length``, or a routing scope under which packed rows would see each other.
    """
    check_prompts(model, prompts, max_new_tokens)
    if not (temperature >= 0 and 0 <= top_p <= 1 and top_k >= 0):
        raise ValueError(f"temperature {temperature}, top_p {top_p}, top_k {top_k}; expected 0 or more, top_p up to 1")
    if decoder is None:
        longest = max((len(prompt) for prompt in prompts), default=1) + max_new_tokens - 1  # the last is not read
        longest = min(longest, model.config.seq_length)
        together = min(len(prompts), max_rows or len(prompts))
        decoder = open_decoder(model, together, tau, longest, routing, max_tokens, cache_bytes)
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    generators = [torch.Generator().manual_seed(each) for each in seeds]
    rows = [_Row(i, *both) for i, both in enumerate(zip(prompts, generators, strict=True))]

    def ended(row: _Row) -> bool:
        full = len(row.new) == max_new_tokens or len(row.prompt) + len(row.new) > model.config.seq_length
        return full or (stop is not None and stop(row.new))

    def choose(logits: Tensor, chosen: Sequence[_Row]) -> list[int]:
        return choose_tokens(logits, [row.generator for row in chosen], temperature, top_p, top_k)

    return _events(decoder, rows, choose, frozenset(eos_ids), ended, max_tokens)


@torch.inference_mode()
def _events(
    decoder: Decoder,
    rows: Sequence[_Row],
    choose: Callable[[Tensor, Sequence[_Row]], list[int]],
    eos_ids: Collection[int],
    ended: Callable[[_Row], bool],
    max_tokens: int,
) -> Iterator[Event]:
    """The loop of ``generate_rows``."""
    waiting, running = deque(rows), dict[int, _Row]()  # slot -> row
    while waiting or running:
        free = [slot for slot in range(decoder.slots) if slot not in running] if waiting else []
        if free:
            lengths = [len(row.prompt) for row, _ in zip(waiting, free, strict=False)]
            group = next(groups_of_tokens(lengths, max_tokens))
            slots = free[group]
            running |= {slot: waiting.popleft() for slot in slots}
            logits = decoder.prefill([running[slot].prompt for slot in slots], slots)
        else:
            _close_gaps(decoder, running)
            slots = list(range(len(running)))
            logits = decoder.step([running[slot].new[-1] for slot in slots])
        for slot, token in zip(slots, choose(logits, [running[slot] for slot in slots]), strict=True):
            row = running[slot]
            if token not in eos_ids:
                row.new.append(token)
                yield Event(row.index, token)
            if token in eos_ids or ended(row):
                del running[slot]
                decoder.free(slot)
                yield Event(row.index, None)


def _check_scope(model: PolychromaticLM) -> None:
    if model.config.ffn == "polyglu" and model.config.routing_scope == "sequence":
        raise ValueError("packed rows need routing scope 'document' or 'causal'; open the model for inference")


def check_prompts(model: PolychromaticLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse what ``generate`` cannot continue, with a ValueError."""
    limit = model.config.seq_length
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; expected 1 to {limit}, the model's seq_length")


def open_decoder(
    model: PolychromaticLM,
    rows: int,
    tau: float,
    longest: int,
    routing: Routing,
    max_tokens: int,
    cache_bytes: int = CACHE_BYTES,
) -> Decoder:
    """What serves a model under a routing: the cache wherever a token leaves the positions before it as they are."""
    _check_scope(model)
    if routing == "exact" and not shares_prefixes(model):
        return _WholeRows(model, tau, rows, max_tokens)
    slots = max(1, min(rows, max_tokens, slots_within(model, cache_bytes, longest)))
    return Cache(model, tau, slots, longest, frozen=routing == "frozen")


def _close_gaps(decoder: Decoder, running: dict[int, _Row]) -> None:
    """Move the last rows into the gaps before them, so that the slots in use are the first ones."""
    n = len(running)
    gaps = (slot for slot in range(n) if slot not in running)
    for source, target in zip([slot for slot in running if slot >= n], gaps, strict=True):
        decoder.move(source, target)
        running[target] = running.pop(source)


def choose_tokens(
    logits: Tensor,
    generators: Sequence[torch.Generator],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> list[int]:
    """Choose one token a row from ``[rows, V]``; arguments as in ``generate``.

    Raises:
        PolygluError: logits are not finite.
    """
    largest, tokens = logits.max(-1)  # NaN, if there is one
    if not largest.isfinite().all():
        raise PolygluError(NOT_FINITE)
    if temperature == 0:
        return tokens.tolist()
    kept = min(top_k, logits.shape[-1]) or logits.shape[-1]
    likeliest, order = logits.cpu().double().topk(kept)  # in falling order
    probabilities = torch.softmax((likeliest - likeliest[:, :1]) / temperature, -1)
    unlikely = probabilities.cumsum(-1) - probabilities >= top_p  # the likelier ones have top_p without them
    unlikely[:, 0] = False
    probabilities[unlikely] = 0
    drawn = [int(torch.multinomial(row, 1, generator=rng)) for row, rng in zip(probabilities, generators, strict=True)]
    return [int(order[row, place]) for row, place in enumerate(drawn)]
