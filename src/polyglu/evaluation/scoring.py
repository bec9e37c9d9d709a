"""Log-likelihoods of given tokens. Inputs are packed, never padded: a result does not depend on what runs beside it.

requests ──► distinct inputs, sorted ──► batches, each one pass in which shared beginnings run once (``prefix_tree``)
                                             │
answers as they come ◄── log-softmax at the positions that are asked for ◄┘
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from polyglu.errors import PolygluError
from polyglu.evaluation.answers import Answers, Asker, Question
from polyglu.evaluation.progress import progress
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.generation import MAX_TOKENS, NOT_FINITE
from polyglu.model.prefix_tree import PrefixTree, shares_prefixes, tree_batches

HEAD_POSITIONS = 1024
"""Positions that go through the head together, which bounds the memory of the logits ``[positions, V]``."""
NOBODY = Asker("")


class Request(NamedTuple):
    """Tokens to run, and the tokens that should follow each of the last positions."""

    input_ids: tuple[int, ...]
    """At least as many as ``targets``, at most the model's seq_length."""
    targets: tuple[int, ...]
    """Of the last ``len(targets)`` positions; the last one follows the whole input."""
    asker: Asker = NOBODY

    @classmethod
    def of(
        cls, context: Sequence[int], continuation: Sequence[int], max_length: int, asker: Asker = NOBODY
    ) -> "Request":
        """Score ``continuation`` after the last tokens of ``context`` that fit into ``max_length``."""
        tokens = (*context, *continuation)[-(max_length + 1) :]
        return cls(tokens[:-1], tuple(continuation), asker)

    @property
    def question(self) -> Question:
        """What the answer is kept under."""
        return Question(self.asker, {"input_ids": self.input_ids, "targets": self.targets})


def rolling_requests(tokens: list[int], prefix_id: int, max_length: int, asker: Asker = NOBODY) -> list[Request]:
    """Windows that together predict each token of a text once, the first one after ``prefix_id``."""
    windows = get_rolling_token_windows(tokens, prefix_token=prefix_id, max_seq_len=max_length, context_len=1)
    return [Request.of(context, targets, max_length, asker) for context, targets in map(make_disjoint_window, windows)]


class Score(NamedTuple):
    """Of one request."""

    log_likelihood: float
    """Natural logarithm of the probability of all targets together."""
    is_greedy: bool
    """Each target is the likeliest token at its position."""


class Batch(NamedTuple):
    """Inputs of one pass, and who asks for them."""

    rows: list[tuple[int, ...]]
    members: list[list[int]]
    """For each row, indices of the requests with this input."""

    @property
    def requests(self) -> list[int]:
        """Indices of all its requests."""
        return [index for members in self.members for index in members]


@torch.inference_mode()
def score(
    model: PolychromaticLM,
    requests: Sequence[Request],
    tau: float,
    *,
    description: str,
    max_rows: int | None = None,
    max_tokens: int = MAX_TOKENS,
    answers: Answers | None = None,
) -> list[Score]:
    """Score each request.

    Inputs that begin alike, such as the choices of a question or the questions after the same examples, share the
    pass over their beginning, where a token of the model sees nothing after it (routing scope ``causal``, or no
    routing). Under ``document`` scope each token moves the routing of the whole input, so distinct inputs run whole.
    Equal inputs, such as choices of one token, run once in every scope: what is scored follows the input.

    Args:
        model: with routing scope ``document`` or ``causal``, or without routing.
        requests: what to score.
        tau: routing temperature, the checkpoint's.
        description: shown beside the progress.
        max_rows: distinct inputs of one pass; as many as ``max_tokens`` allows if absent.
        max_tokens: tokens of one pass, what is shared counted once.
        answers: where answers are taken from and kept, batch by batch.

    Raises:
        PolygluError: logits are not finite.
    """
    answers = answers or Answers()
    questions = [request.question for request in requests]
    scores = [None if known is None else Score(*known) for known in answers.known(questions, description)]
    # Batches depend on the requests alone, so that a run that goes on computes the same bits.
    batches = _batches(requests, shares_prefixes(model), max_tokens, max_rows)
    left = [batch for batch in batches if any(scores[index] is None for index in batch.requests)]
    with progress(description, sum(len(batch.requests) for batch in left)) as advance:
        for batch in left:
            found = dict(zip(batch.requests, _score_batch(model, batch, requests, tau), strict=True))
            new = [index for index in batch.requests if scores[index] is None]
            answers.add((questions[index], list(found[index])) for index in new)
            for index in new:
                scores[index] = found[index]
            advance(len(batch.requests))
    return [found for found in scores if found is not None]


def _batches(requests: Sequence[Request], share: bool, max_tokens: int, max_rows: int | None) -> Iterator[Batch]:
    members: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        members.setdefault(request.input_ids, []).append(index)
    rows = sorted(members)
    for group in tree_batches(rows, share, max_tokens, max_rows):
        yield Batch(rows[group], [members[row] for row in rows[group]])


def _score_batch(model: PolychromaticLM, batch: Batch, requests: Sequence[Request], tau: float) -> list[Score]:
    """Scores of ``batch.requests``, in that order."""
    tree = PrefixTree(batch.rows, shares_prefixes(model), model.embed_tokens.weight.device)
    features = tree.features(model, tau)  # [N, D]
    targets = [requests[index].targets for index in batch.requests]
    nodes = [nodes for nodes, members in zip(tree.nodes, batch.members, strict=True) for _ in members]
    places = torch.cat([path[len(path) - len(wanted) :] for path, wanted in zip(nodes, targets, strict=True)])
    flat = torch.tensor([token for wanted in targets for token in wanted], dtype=torch.int64)
    log_probs, hits = _score_places(model, features, places, flat)
    if not log_probs.isfinite().all():
        raise PolygluError(NOT_FINITE)
    lengths = [len(wanted) for wanted in targets]
    parts = zip(torch.split(log_probs, lengths), torch.split(hits, lengths), strict=True)
    return [Score(float(log_prob.sum()), bool(hit.all())) for log_prob, hit in parts]


def _score_places(model: PolychromaticLM, features: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (fp64), and whether it is the likeliest.

    Args:
        model: its head is asked once for each distinct place.
        features: ``[N, D]``.
        places: node that each target follows, ``[P]``.
        targets: ``[P]``.

    Returns:
        Twice ``[P]``, on the CPU.
    """
    distinct, at = torch.unique(places, return_inverse=True)
    log_probs, hits = torch.empty(len(targets), dtype=torch.float64), torch.empty(len(targets), dtype=torch.bool)
    for start in range(0, len(distinct), HEAD_POSITIONS):
        logits = model.head(features[distinct[start : start + HEAD_POSITIONS].to(features.device)]).float()
        here = ((at >= start) & (at < start + HEAD_POSITIONS)).nonzero()[:, 0]
        row, wanted = (at[here] - start).to(logits.device), targets[here].to(logits.device)
        log_probs[here] = (logits[row, wanted].double() - logits.logsumexp(-1)[row].double()).cpu()
        hits[here] = (logits.argmax(-1)[row] == wanted).cpu()
    return log_probs, hits
