import json
import math
from pathlib import Path

import pytest
import torch

from polyglu.interpretability.neurotransmitter_maps import stack_alpha
from polyglu.interpretability.routing_entropy import entropy_stats
from polyglu.model.model import load_checkpoint
from polyglu.model.routing import static_entropy

FIXTURE = Path(__file__).parents[2] / "fixtures/reference_model"


def test_known_values() -> None:
    stats = entropy_stats(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), n_activations=2)
    assert stats["per_layer_mean"] == [0.5, 0.5]
    assert stats["per_layer_std"] == [0.5, 0.0]
    assert stats["aggregate_mean"] == 0.5
    assert stats["aggregate_std"] == pytest.approx(math.sqrt(0.125))
    assert stats["max_entropy"] == math.log(2)
    assert stats["normalized_mean"] == pytest.approx(0.5 / math.log(2))


@pytest.mark.parametrize("k", [2, 4, 6])
def test_nats_up_to_ln_k(k: int) -> None:
    assert static_entropy(torch.zeros(3, k)).tolist() == pytest.approx([math.log(k)] * 3)
    certain = torch.eye(k)[:1] * 1000
    assert static_entropy(certain).tolist() == [0.0]


def test_one_neuron_and_one_activation_give_numbers() -> None:
    stats = entropy_stats(torch.zeros(1, 1), n_activations=1)
    assert stats["per_layer_std"] == [0.0]
    assert stats["aggregate_std"] == stats["max_entropy"] == stats["normalized_mean"] == 0.0
    json.dumps(stats, allow_nan=False)


def test_a_single_layer_of_the_whole_equals_the_aggregate() -> None:
    entropies = static_entropy(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)))[None]
    stats = entropy_stats(entropies, 4)
    assert stats["aggregate_mean"] == pytest.approx(stats["per_layer_mean"][0])
    assert stats["aggregate_std"] == pytest.approx(stats["per_layer_std"][0])


def test_published_numbers_of_the_reference_model() -> None:
    expected = json.loads((FIXTURE / "expected.json").read_text())["entropy_stats"]
    model, _, _ = load_checkpoint(FIXTURE / "portable.pt")
    stats = entropy_stats(static_entropy(stack_alpha(model)), 4)
    assert stats.keys() == expected.keys()
    for key, value in expected.items():
        assert stats[key] == pytest.approx(value, rel=1e-6), key
