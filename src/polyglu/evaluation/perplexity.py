"""Held-out perplexity of a source: a ``.jsonl`` file of texts, or a folder of token chunks.

Each document is scored by itself after an end-of-document token, in windows of the model's ``seq_length`` where it is
longer; the end-of-document token that follows it is not counted.
"""

import math
from pathlib import Path

from polyglu.data.held_out import first_documents
from polyglu.data.tokenizer import Tokenizer
from polyglu.evaluation.answers import Answers, Asker
from polyglu.evaluation.scoring import rolling_requests, score
from polyglu.model.architecture import PolychromaticLM


def perplexity(
    model: PolychromaticLM,
    tokenizer: Tokenizer,
    tau: float,
    source: Path,
    *,
    max_tokens: int,
    batch_size: int | None = None,
    answers: Answers | None = None,
) -> dict[str, float | int]:
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
        ``perplexity``, ``nats_per_token``, ``tokens``, ``documents``, and for texts ``bits_per_byte``.

    Raises:
        PolygluError: no such source, not of its format, of another tokenizer, or without text.
    """
    documents = first_documents(source, tokenizer, max_tokens)
    tokens = sum(len(document.tokens) for document in documents)
    longest = model.config.seq_length
    what = f"perplexity of {source.name}"
    requests = [
        window
        for number, document in enumerate(documents)
        for window in rolling_requests(document.tokens, tokenizer.eos_id, longest, Asker(what, doc=number))
    ]
    scores = score(model, requests, tau, description=what, max_rows=batch_size, answers=answers)
    nats = -math.fsum(found.log_likelihood for found in scores)
    result = {
        "perplexity": math.exp(min(nats / tokens, 700.0)),  # the largest exponent a float holds
        "nats_per_token": nats / tokens,
        "tokens": tokens,
        "documents": len(documents),
    }
    sizes = [document.n_bytes for document in documents if document.n_bytes is not None]
    return result | ({"bits_per_byte": nats / math.log(2) / sum(sizes)} if sizes else {})
