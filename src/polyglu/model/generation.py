"""Continuing prompts. Rows of different lengths are packed, never padded: a row's result is that of running it alone.

prompts ──► active rows ──► groups of bounded size ──► packed [1, N] ──► logits of each row's last position
                ▲                                                                    │
                └───────── unfinished rows, one token longer ◄──── choose a token ◄──┘
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from polyglu.model.architecture import PolychromaticLM

MAX_TOKENS = 16384
"""Tokens of one forward pass, which bounds its memory."""

StopRule = Callable[[list[int]], bool]
"""Told the new tokens of a row so far; true ends the row."""


def pack_rows(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Put documents behind each other: input ids ``[1, N]``, and their bounds ``[documents + 1]`` on the CPU."""
    bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32)
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return flat[None].to(device), bounds


def groups_of_tokens(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> Iterator[slice]:
    """Cut rows, in order, into groups of at most ``max_tokens`` tokens and ``max_rows`` rows; a longer row is alone."""
    start, total = 0, 0
    for index, length in enumerate(lengths):
        if index > start and (total + length > max_tokens or index - start == max_rows):
            yield slice(start, index)
            start, total = index, 0
        total += length
    if start < len(lengths):
        yield slice(start, len(lengths))


@torch.inference_mode()
def next_token_logits(
    model: PolychromaticLM, rows: Sequence[Sequence[int]], tau: float, max_tokens: int = MAX_TOKENS
) -> Tensor:
    """Logits ``[rows, V]`` of the token after each row, deterministic: no routing noise.

    Raises:
        ValueError: the model's routing scope is ``sequence``, under which packed rows would see each other.
    """
    if model.config.routing_scope == "sequence":
        raise ValueError("packed rows need routing scope 'document' or 'causal'; open the model for inference")
    device = model.embed_tokens.weight.device
    logits = []
    for group in groups_of_tokens([len(row) for row in rows], max_tokens):
        input_ids, cu_seqlens = pack_rows(rows[group], device)
        features, _ = model.features(input_ids, cu_seqlens=cu_seqlens, tau=tau)  # [1, N, D]
        logits.append(model.head(features[0, cu_seqlens[1:].long() - 1]).float())  # [rows of the group, V]
    return torch.cat(logits)


def generate(
    model: PolychromaticLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tau: float,
    eos_ids: Collection[int],
    stop: StopRule | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
) -> list[list[int]]:
    """Continue each prompt until an end token, the stop rule, ``max_new_tokens`` or the model's ``seq_length``.

    A row's result depends on neither the other rows nor their number: each row draws from a generator of its own.

    Args:
        model: with routing scope ``document`` or ``causal``.
        prompts: token ids, at least one each and at most ``seq_length``.
        max_new_tokens: most tokens added to a prompt.
        tau: routing temperature, the checkpoint's.
        eos_ids: tokens that end a row; they are not part of the result.
        stop: asked after each new token; the token that fulfils it is part of the result.
        temperature: 0 takes the likeliest token, else tokens are drawn from softmax(logits / temperature).
        top_p: draw only among the likeliest tokens that together have at least this probability.
        seed: of the draws; row i draws from ``seed + i``.
        max_tokens: tokens of one forward pass.

    Returns:
        The new tokens of each row, in the order of the prompts.

    Raises:
        ValueError: an empty prompt, or one longer than the model's ``seq_length``.
    """
    limit = model.config.seq_length
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; expected 1 to {limit}, the model's seq_length")
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        active = [row for row in active if len(prompts[row]) + len(new[row]) <= limit]
        if not active:
            break
        rows = [[*prompts[row], *new[row]] for row in active]
        logits = next_token_logits(model, rows, tau, max_tokens)
        tokens = choose_tokens(logits, [generators[row] for row in active], temperature, top_p)
        unfinished = []
        for row, token in zip(active, tokens, strict=True):
            if token in eos_ids:
                continue
            new[row].append(token)
            if stop is None or not stop(new[row]):
                unfinished.append(row)
        active = unfinished
    return new


def choose_tokens(
    logits: Tensor, generators: Sequence[torch.Generator], temperature: float = 0.0, top_p: float = 1.0
) -> list[int]:
    """Choose one token a row from ``[rows, V]``; arguments as in ``generate``."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities, order = torch.softmax(logits.cpu().double() / temperature, -1).sort(descending=True, stable=True)
    unlikely = probabilities.cumsum(-1) - probabilities >= top_p  # the likelier ones have top_p without them
    unlikely[:, 0] = False
    probabilities[unlikely] = 0
    drawn = [int(torch.multinomial(row, 1, generator=rng)) for row, rng in zip(probabilities, generators, strict=True)]
    return [int(order[row, place]) for row, place in enumerate(drawn)]
