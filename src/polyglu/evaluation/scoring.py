"""Log-likelihoods of given tokens. Inputs are packed, never padded: a result does not depend on what runs beside it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from polyglu.evaluation.progress import tracked
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.generation import MAX_TOKENS, groups_of_tokens
from polyglu.model.packing import pack_rows

HEAD_POSITIONS = 1024
"""Positions that go through the head together, which bounds the memory of the logits ``[positions, V]``."""


class Request(NamedTuple):
    """Tokens to run, and the tokens that should follow each of the last positions."""

    input_ids: tuple[int, ...]
    """At least as many as ``targets``, at most the model's seq_length."""
    targets: tuple[int, ...]
    """Of the last ``len(targets)`` positions; the last one follows the whole input."""

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], max_length: int) -> "Request":
        """Score ``continuation`` after the last tokens of ``context`` that fit into ``max_length``."""
        tokens = (*context, *continuation)[-(max_length + 1) :]
        return cls(tokens[:-1], tuple(continuation))


def rolling_requests(tokens: list[int], prefix_id: int, max_length: int) -> list[Request]:
    """Windows that together predict each token of a text once, the first one after ``prefix_id``."""
    windows = get_rolling_token_windows(tokens, prefix_token=prefix_id, max_seq_len=max_length, context_len=1)
    return [Request.of(context, targets, max_length) for context, targets in map(make_disjoint_window, windows)]


class Score(NamedTuple):
    """Of one request."""

    log_likelihood: float
    """Natural logarithm of the probability of all targets together."""
    is_greedy: bool
    """Each target is the likeliest token at its position."""


@torch.inference_mode()
def score(
    model: PolychromaticLM,
    requests: Sequence[Request],
    tau: float,
    *,
    description: str,
    max_rows: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> list[Score]:
    """Score each request; equal inputs, such as the options of a question, run once.

    Args:
        model: with routing scope ``document`` or ``causal``.
        requests: what to score.
        tau: routing temperature, the checkpoint's.
        description: shown beside the progress bar.
        max_rows: inputs of one forward pass.
        max_tokens: tokens of one forward pass.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        members.setdefault(request.input_ids, []).append(index)
    inputs = sorted(members, key=len, reverse=True)
    scores: dict[int, Score] = {}
    for group in tracked(list(groups_of_tokens([len(row) for row in inputs], max_tokens, max_rows)), description):
        rows = inputs[group]
        input_ids, cu_seqlens = pack_rows(rows, model.embed_tokens.weight.device)
        features, _ = model.features(input_ids, cu_seqlens=cu_seqlens, tau=tau)  # [1, N, D]
        ends = [(index, end) for row, end in zip(rows, cu_seqlens[1:].tolist(), strict=True) for index in members[row]]
        targets = [requests[index].targets for index, _ in ends]
        positions = [torch.arange(end - len(wanted), end) for (_, end), wanted in zip(ends, targets, strict=True)]
        flat = torch.tensor([token for wanted in targets for token in wanted], dtype=torch.int64)
        log_probs, hits = _score_positions(model, features[0, torch.cat(positions)], flat)
        lengths = [len(wanted) for wanted in targets]
        for (index, _), log_prob, hit in zip(
            ends, torch.split(log_probs, lengths), torch.split(hits, lengths), strict=True
        ):
            scores[index] = Score(float(log_prob.sum()), bool(hit.all()))
    return [scores[index] for index in range(len(requests))]


def _score_positions(model: PolychromaticLM, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (fp64), and whether it is the likeliest: ``[P, D]``, ``[P]`` -> twice ``[P]``."""
    log_probs, hits = [], []
    for part, wanted in zip(torch.split(features, HEAD_POSITIONS), torch.split(targets, HEAD_POSITIONS), strict=True):
        logits = model.head(part).float().cpu()
        log_probs.append(-F.cross_entropy(logits, wanted, reduction="none").double())
        hits.append(logits.argmax(-1) == wanted)
    return torch.cat(log_probs), torch.cat(hits)
