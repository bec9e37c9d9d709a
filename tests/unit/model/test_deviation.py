from typing import Any

import pytest
import torch
from models import random_tokens, sharp_model

from polyglu.model.config import RoutingScope
from polyglu.model.deviation import Deviation, approximates, routing_deviation
from polyglu.model.generation import Routing

TAU = 0.4
PROMPTS = [random_tokens(5, 0), random_tokens(2, 1)]
CONTINUATIONS = [random_tokens(6, 2), random_tokens(3, 3)]


def measure(scope: RoutingScope, routing: Routing) -> Deviation:
    return routing_deviation(
        sharp_model(seq_length=24, routing_scope=scope), PROMPTS, CONTINUATIONS, tau=TAU, routing=routing
    )


@pytest.mark.parametrize("routing", ["exact", "running"])
def test_causal_is_exact_when_it_runs(routing: Routing) -> None:
    found = measure("causal", routing)
    assert found.positions == 9 and found.other_choice == 0
    assert found.mean <= found.largest < 1e-4


def test_approximations_of_document_scope_are_told() -> None:
    assert measure("document", "exact").largest < 1e-4
    frozen, running = measure("document", "frozen"), measure("document", "running")
    assert frozen != running
    for found in (frozen, running):
        assert found.largest > found.mean > 1e-3 and 0 <= found.other_choice <= 1 and found.positions == 9


def test_some_positions_of_each_row_may_be_compared() -> None:
    model = sharp_model(seq_length=24, routing_scope="document")
    settings = {"tau": TAU, "routing": "frozen"}
    last = routing_deviation(model, PROMPTS, CONTINUATIONS, of_row=1, **settings)
    alone = [
        routing_deviation(model, [p], [c], of_row=1, **settings) for p, c in zip(PROMPTS, CONTINUATIONS, strict=True)
    ]
    assert last.positions == 2 and last.largest == pytest.approx(max(found.largest for found in alone), rel=1e-4)
    for n, positions in ((2, 4), (4, 7), (99, 9)):
        assert routing_deviation(model, PROMPTS, CONTINUATIONS, of_row=n, **settings).positions == positions
    assert routing_deviation(model, PROMPTS, CONTINUATIONS, of_row=99, **settings) == measure("document", "frozen")


def test_only_what_changes_the_routing_approximates() -> None:
    def names(**settings: Any) -> list[str]:
        model = sharp_model(**settings)
        return [routing for routing in ("exact", "frozen", "running") if approximates(model, routing)]

    assert names(routing_scope="causal") == ["frozen"]
    assert names(routing_scope="document") == names(routing_scope="sequence") == ["frozen", "running"]
    assert names(routing_scope="document", ffn="swiglu") == names(routing_scope="document", routing="static") == []
    assert names(routing_scope="document", n_activations=1) == []


def test_routing_that_no_token_moves_is_approximated_without_error() -> None:
    model = sharp_model(seq_length=24, routing_scope="document")
    with torch.no_grad():
        for block in model.layers:
            block.mlp.beta.zero_()
    for routing in ("frozen", "running"):
        assert routing_deviation(model, PROMPTS, CONTINUATIONS, tau=TAU, routing=routing).largest < 1e-4


def test_rows_that_cannot_run_are_refused() -> None:
    model = sharp_model(seq_length=24, routing_scope="document")
    with pytest.raises(ValueError, match="seq_length"):
        routing_deviation(model, [random_tokens(20, 0)], [random_tokens(9, 0)], tau=TAU, routing="frozen")
    with pytest.raises(ValueError, match="at least 1"):
        routing_deviation(model, [[1]], [[]], tau=TAU, routing="frozen")
