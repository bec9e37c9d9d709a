"""What an approximate routing of new tokens changes: its logits next to the exact ones, on given rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.generation import MAX_TOKENS, Routing, check_prompts, next_token_logits, open_decoder


class Deviation(NamedTuple):
    """How far logits under an approximate routing are from the exact ones."""

    largest: float
    """Absolute difference of a logit."""
    mean: float
    """Absolute difference, over all logits."""
    other_choice: float
    """Share of positions whose likeliest token is another."""
    positions: int
    """That were compared."""


def approximates(model: PolychromaticLM, routing: Routing) -> bool:
    """Whether a routing of new tokens is another than the model was trained with."""
    exact = ("exact", "running") if model.config.routing_scope == "causal" else ("exact",)
    return model.config.routed_by_text and routing not in exact


@torch.inference_mode()
def routing_deviation(
    model: PolychromaticLM,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    tau: float,
    routing: Routing,
    of_row: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Deviation:
    """Compare the logits after the tokens of given continuations with the exact ones, a row at a time.

    The exact side runs a whole row for each position: for samples, not for corpora.

    Args:
        model: as in ``generate``.
        prompts: token ids; the approximations are exact up to their ends.
        continuations: token ids that follow each prompt, at least one each.
        tau: routing temperature.
        routing: the approximation.
        of_row: positions of a row that are compared, evenly spaced up to its last one; absent: all.
        max_tokens: tokens of one forward pass.

    Raises:
        ValueError: as in ``generate``, for prompts with their continuations.
    """
    whole = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    check_prompts(model, [*prompts, *whole], min(map(len, continuations), default=0))
    largest, total, logits_seen, others, positions = 0.0, 0.0, 0, 0, 0
    for prompt, row in zip(prompts, whole, strict=True):
        decoder = open_decoder(model, 1, tau, len(row), routing, max_tokens)
        decoder.prefill([prompt], [0])
        every = range(len(prompt) + 1, len(row) + 1)
        ends = every[:: -max(1, len(every) // (of_row or len(every)))][:of_row]
        logits = {}
        for end in every:
            after = decoder.step([row[end - 1]])
            if end in ends:
                logits[end] = after
        found = torch.cat([logits[end] for end in ends])
        exact = next_token_logits(model, [row[:end] for end in ends], tau, max_tokens)
        difference = (found - exact).abs()
        largest, total = max(largest, difference.max().item()), total + difference.double().sum().item()
        others += int((found.argmax(-1) != exact.argmax(-1)).sum())
        logits_seen, positions = logits_seen + difference.numel(), positions + len(ends)
    return Deviation(largest, total / logits_seen, others / positions, positions)
