from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import sharp_model

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.prefix_tree import PrefixTree, shared_lengths, shares_prefixes, tree_batches

TAU = 0.3
CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "causal": {"routing_scope": "causal"},
    "swiglu": {"ffn": "swiglu"},
    "static": {"routing_scope": "document", "routing": "static"},
    "document": {"routing_scope": "document"},
}
MODELS = {kind: sharp_model(seq_length=32, **settings) for kind, settings in KINDS.items()}
ROWS = st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12).map(sorted)
"""Of three tokens, so that many begin alike and some are beginnings of others."""


def alone(model: PolychromaticLM, row: tuple[int, ...]) -> torch.Tensor:
    return model.features(torch.tensor([row]), tau=TAU)[0][0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(rows=ROWS)
def test_features_are_those_of_each_row_alone(kind: str, rows: list[tuple[int, ...]]) -> None:
    model = MODELS[kind]
    with torch.inference_mode():
        tree = PrefixTree(rows, shares_prefixes(model), CPU)
        features = tree.features(model, TAU)
        for row, nodes in zip(rows, tree.nodes, strict=True):
            torch.testing.assert_close(features[nodes], alone(model, row), rtol=1e-4, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(rows=ROWS)
def test_each_distinct_prefix_is_one_node(rows: list[tuple[int, ...]]) -> None:
    prefixes = {row[:n] for row in rows for n in range(1, len(row) + 1)}
    assert PrefixTree(rows, True, CPU).input_ids.numel() == len(prefixes)
    assert PrefixTree(rows, False, CPU).input_ids.numel() == sum(map(len, rows))


def test_only_models_whose_tokens_see_nothing_later_share() -> None:
    assert [shares_prefixes(MODELS[kind]) for kind in KINDS] == [True, True, True, False]
    assert not shares_prefixes(sharp_model(routing_scope="sequence"))
    assert shares_prefixes(sharp_model(routing_scope="document", n_activations=1))


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, share=st.booleans(), max_tokens=st.integers(1, 40), max_rows=st.none() | st.integers(1, 5))
def test_batches_hold_all_rows_within_the_limits(
    rows: list[tuple[int, ...]], share: bool, max_tokens: int, max_rows: int | None
) -> None:
    batches = [rows[group] for group in tree_batches(rows, share, max_tokens, max_rows)]
    assert [row for batch in batches for row in batch] == rows
    for batch in batches:
        assert len(batch) <= (max_rows or len(rows))
        assert len(batch) == 1 or PrefixTree(batch, share, CPU).input_ids.numel() <= max_tokens


def test_shared_lengths() -> None:
    assert shared_lengths([(1, 2), (1, 2, 3), (1, 4), (5,)]) == [0, 2, 1, 0]
    assert shared_lengths([]) == []
