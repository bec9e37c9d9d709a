"""Held-out perplexity of a source: a ``.jsonl`` file of texts, or a folder of token chunks.

Each document is scored by itself after an end-of-document token, in windows of the model's ``seq_length`` where it is
longer; the end-of-document token that follows it is not counted.

Documents are what is drawn from a source, so the intervals are over documents: the tokens of one document are much
alike, and an interval over tokens would be far too narrow.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyglu.data.held_out import Document, first_documents
from polyglu.data.tokenizer import Tokenizer
from polyglu.estimates import Estimate, ratio_estimate
from polyglu.evaluation.answers import Answers, Asker
from polyglu.evaluation.scoring import rolling_requests, score
from polyglu.files import seal
from polyglu.model.architecture import PolychromaticLM

MAX_EXPONENT = 700.0
"""Little under the largest that a float's exponential holds."""


def perplexity(
    model: PolychromaticLM,
    tokenizer: Tokenizer,
    tau: float,
    source: Path,
    *,
    max_tokens: int,
    batch_size: int | None = None,
    answers: Answers | None = None,
) -> dict[str, Any]:
    """Perplexity of the first documents of a source.

    Args:
        model: as ``open_for_inference`` gives it.
        tokenizer: its tokenizer.
        tau: routing temperature, the checkpoint's.
        source: ``.jsonl`` file with a ``text`` in each line, or folder of token chunks.
        max_tokens: documents are read whole until they have this many tokens.
        batch_size: windows that run together; as many as fit if absent.
        answers: where the windows' log-likelihoods are taken from and kept.

    Returns:
        ``tokens``, ``documents``; ``nats_per_token`` and ``perplexity``, its exponential; ``bytes`` and
        ``bits_per_byte``, if bytes are known. Each of the three with ``_low`` and ``_high``, the 95% confidence
        interval over documents (``ratio_estimate``), and the two that are ratios with ``_stderr``; a single document
        gives none. ``each``: ``nats``, ``tokens`` and ``bytes`` (if known) of every document, and ``sha256`` of all
        their tokens: of two models with equal ones, documents can be paired.

    Raises:
        PolygluError: no such source, not of its format, of another tokenizer, or without text.
    """
    documents = first_documents(source, tokenizer, max_tokens)
    longest = model.config.seq_length
    what = f"perplexity of {source.name}"
    requests = [
        window
        for number, document in enumerate(documents)
        for window in rolling_requests(document.tokens, tokenizer.eos_id, longest, Asker(what, doc=number))
    ]
    scores = score(model, requests, tau, description=what, max_rows=batch_size, answers=answers)
    nats = [0.0] * len(documents)
    for request, found in zip(requests, scores, strict=True):
        nats[request.asker.doc or 0] -= found.log_likelihood
    of_tokens = seal([tokenizer.fingerprint, *(document.tokens for document in documents)])
    return _summary(documents, nats, of_tokens)


def _summary(documents: Sequence[Document], nats: Sequence[float], of_tokens: str) -> dict[str, Any]:
    """Numbers of a source from its documents, the negative log-likelihood of each, and the hash of their tokens."""
    lengths = [len(document.tokens) for document in documents]
    per_token = ratio_estimate(nats, lengths)
    each = {"sha256": of_tokens, "nats": [round(value, 6) for value in nats], "tokens": lengths}
    result: dict[str, Any] = {"tokens": sum(lengths), "documents": len(documents), "each": each}
    result |= _named("nats_per_token", per_token)
    for end, value in (("", per_token.mean), ("_low", per_token.low), ("_high", per_token.high)):
        if value is not None:
            result[f"perplexity{end}"] = math.exp(min(value, MAX_EXPONENT))
    sizes = [document.n_bytes for document in documents if document.n_bytes is not None]
    if len(sizes) == len(documents):
        result["bytes"], each["bytes"] = sum(sizes), sizes
        result |= _named("bits_per_byte", ratio_estimate([value / math.log(2) for value in nats], sizes))
    return result


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    ends = {"": estimate.mean, "_stderr": estimate.stderr, "_low": estimate.low, "_high": estimate.high}
    return {f"{name}{end}": value for end, value in ends.items() if value is not None}
