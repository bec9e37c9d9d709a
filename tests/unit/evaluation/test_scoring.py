"""Scores equal those of single requests without a cache, for each kind of model and any batch; and what is shared."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import sharp_model

from polyglu.errors import PolygluError
from polyglu.evaluation import scoring
from polyglu.evaluation.answers import Answers, Question
from polyglu.evaluation.scoring import Request, Score, score
from polyglu.model.architecture import PolychromaticLM

TAU = 0.3
KINDS: dict[str, dict[str, Any]] = {
    "causal": {"routing_scope": "causal"},
    "document": {"routing_scope": "document"},
    "swiglu": {"ffn": "swiglu"},
}


def questions() -> list[Request]:
    """Questions with four choices after the same examples, like those of MMLU: of one token, of several, and long."""
    draw = random.Random(0)
    examples = [draw.randrange(50) for _ in range(20)]
    requests = []
    for n in (1, 1, 3, 5):
        context = [*examples, *(draw.randrange(50) for _ in range(draw.randrange(3, 9)))]
        for choice in range(4):
            continuation = [choice, *(draw.randrange(50) for _ in range(n - 1))]
            requests.append(Request.of(context, continuation, 48))
    long = [draw.randrange(50) for _ in range(60)]
    return [*requests, Request.of(long, [7, 8], 48), Request.of([3], [4], 48)]


def plain(model: PolychromaticLM, request: Request) -> Score:
    """One request, one row, no cache."""
    with torch.inference_mode():
        log_probs = model(torch.tensor([request.input_ids]), tau=TAU)[0].double().log_softmax(-1)
    rows = log_probs[-len(request.targets) :]
    return Score(
        sum(float(row[token]) for row, token in zip(rows, request.targets, strict=True)),
        rows.argmax(-1).tolist() == list(request.targets),
    )


@contextmanager
def tokens_run(model: PolychromaticLM) -> Iterator[list[int]]:
    """Tokens of each pass."""
    passes: list[int] = []
    hook = model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: passes.append(inputs[0].numel()))
    yield passes
    hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_single_requests_at_any_batch_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "HEAD_POSITIONS", 5)  # some passes go through the head in parts
    model, requests = sharp_model(seq_length=48, **KINDS[kind]), questions()
    expected = [plain(model, request) for request in requests]
    likeliest = Request((1, 2, 3), (int(model(torch.tensor([[1, 2, 3]]), tau=TAU)[0, -1].argmax()),))
    for max_rows in (1, 8, None):
        found = score(model, requests, TAU, description="test", max_rows=max_rows)
        assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]
        wanted = [one.log_likelihood for one in expected]
        assert [one.log_likelihood for one in found] == pytest.approx(wanted, abs=1e-4)
    assert score(model, [likeliest], TAU, description="test")[0].is_greedy


def test_what_begins_alike_runs_once() -> None:
    requests = questions()[:16]
    inputs = {request.input_ids for request in requests}
    prefixes = {row[:n] for row in inputs for n in range(1, len(row) + 1)}
    for kind, expected in (("causal", len(prefixes)), ("swiglu", len(prefixes)), ("document", sum(map(len, inputs)))):
        model = sharp_model(seq_length=48, **KINDS[kind])
        with tokens_run(model) as passes:
            score(model, requests, TAU, description="test")
        assert passes == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_choices_of_one_token_share_their_pass_in_every_scope(kind: str) -> None:
    model = sharp_model(seq_length=48, **KINDS[kind])
    with tokens_run(model) as passes:
        scores = score(model, [Request((5, 6, 7), (choice,)) for choice in range(4)], TAU, description="test")
    assert passes == [3] and len({found.log_likelihood for found in scores}) == 4


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_logits_that_are_not_finite_are_refused_and_not_kept(broken: float) -> None:
    model, answers = sharp_model(seq_length=48, routing_scope="causal"), Noted()
    model.norm.weight.data[0] = broken
    with pytest.raises(PolygluError, match="logits are not finite"):
        score(model, [Request((5, 6, 7), (1,))], TAU, description="test", answers=answers)
    assert not answers.rows


class Noted(Answers):
    """Answers in memory; forgets what a test wants."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.added: list[int] = []

    def known(self, questions: Any, description: str) -> list[Any]:
        return [self.rows.get(question.key) for question in questions]

    def add(self, answered: Any) -> None:
        new = [(question.key, answer) for question, answer in answered]
        self.added.append(len(new))
        self.rows |= dict(new)


def test_answers_are_kept_batch_by_batch_and_only_the_rest_runs_with_the_same_bits() -> None:
    model, requests = sharp_model(seq_length=48, routing_scope="causal"), questions()
    answers = Noted()
    expected = score(model, requests, TAU, description="test", max_rows=3, answers=answers)
    assert sum(answers.added) == len(requests) and len(answers.added) > 3
    with tokens_run(model) as passes:
        assert score(model, requests, TAU, description="test", max_rows=3, answers=answers) == expected
        assert passes == []
        forgotten = Question(requests[9].asker, requests[9].question.content).key
        del answers.rows[forgotten]
        assert score(model, requests, TAU, description="test", max_rows=3, answers=answers) == expected
        assert len(passes) == 1 and answers.added[-1] == 1
