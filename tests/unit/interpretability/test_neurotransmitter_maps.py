import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.errors import PolygluError
from polyglu.interpretability.neurotransmitter_maps import (
    has_preference,
    moved_weight,
    neuron_order,
    preference_shares,
    preferred_activation,
    stack_alpha,
    static_preference,
)
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model

TINY = {"vocab_size": 64, "d_model": 8, "d_ff": 5, "n_layers": 2, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 4}


def random_weights(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_untrained_neurons_prefer_nothing() -> None:
    model = create_model(ModelConfig(**TINY))
    weights = stack_alpha(model).softmax(-1)
    assert weights.shape == (2, 5, 4)
    assert not has_preference(weights).any()
    assert preference_shares(weights).tolist() == [[0, 0, 0, 0, 1]] * 2


def test_threshold_is_a_hundredth_of_the_weight() -> None:
    weights = torch.tensor([[0.509, 0.491], [0.511, 0.489]])
    assert has_preference(weights).tolist() == [False, True]
    assert moved_weight(weights).tolist() == pytest.approx([0.009, 0.011], abs=1e-6)


def test_static_preference_is_seen_at_the_models_temperature() -> None:
    alpha = torch.tensor([[[0.05, -0.05]]])  # moves 0.025 of the weight at temperature 1, and half of it at 0.1
    assert static_preference(alpha, 10.0)["as_at_the_start"]
    found = static_preference(alpha, 0.1)
    assert not found["as_at_the_start"] and "One checkpoint does not tell" in found["sentence"]
    expected = 1 / (1 + math.exp(-1)) - 0.5
    assert found["moved_weight"]["median"] == pytest.approx(expected, abs=1e-6)
    assert found["rms_alpha"] == found["largest_alpha"] == pytest.approx(0.05)


def test_one_activation_leaves_nothing_to_prefer() -> None:
    assert "nothing to prefer" in static_preference(torch.ones(2, 3, 1), 0.5)["sentence"]


def test_what_all_activations_share_is_no_preference() -> None:
    alpha = torch.full((2, 3, 4), 7.0)
    found = static_preference(alpha, 0.1)
    assert found["rms_alpha"] == 0 and found["without_preference_per_layer"] == [1, 1]
    assert "cannot be told from their initial values" in found["sentence"]


def test_a_lone_activation_is_preferred() -> None:
    assert preference_shares(torch.ones(1, 3, 1)).tolist() == [[1, 0]]


def test_shares_count_the_largest_weight() -> None:
    weights = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3]]])
    assert preferred_activation(weights).tolist() == [[0, 2, 0, 3]]
    assert preference_shares(weights).tolist() == [[0.5, 0, 0.25, 0.25]]


@settings(deadline=None, max_examples=25)
@given(
    n_layers=st.integers(1, 4), n_neurons=st.integers(1, 40), n_activations=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_order_groups_equal_choices(n_layers: int, n_neurons: int, n_activations: int, seed: int) -> None:
    shape = (n_layers, n_neurons, n_activations)
    static, effective = random_weights(shape, seed), random_weights(shape, seed + 100)
    order = neuron_order(static, effective)
    assert torch.equal(order.sort(1).values, torch.arange(n_neurons).expand(n_layers, -1))
    choices = preferred_activation(static).gather(1, order)
    assert (choices.diff(dim=1) >= 0).all()
    effective_choices = (choices * 10 + preferred_activation(effective).gather(1, order)).diff(dim=1)
    assert (effective_choices >= 0).all()


def test_a_model_without_routing_is_refused() -> None:
    model = create_model(ModelConfig(**TINY, ffn="swiglu"))
    with pytest.raises(PolygluError, match=r"'swiglu'.*polyglu"):
        stack_alpha(model)
