import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import sharp_model
from safetensors.torch import load_file

from polyglu.interpretability.text_routing import (
    COMPONENTS,
    POSITIONS,
    dominant,
    route_layer,
    route_layers,
    spaced,
    token_logits,
    token_shares,
)
from polyglu.model.model import load_checkpoint

FIXTURE = Path(__file__).parents[2] / "fixtures/reference_model"


def random_layer(
    n: int, positions: int, neurons: int, activations: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.randn(neurons, activations, generator=generator)
    return alpha, 2 * torch.randn(n, positions, activations, generator=generator)


def full_weights(alpha: torch.Tensor, logits: torch.Tensor, tau: float) -> torch.Tensor:
    """``[n, P, F, K]`` in fp64, by the formula."""
    return ((alpha.double() + logits.double()[:, :, None]) / tau).softmax(-1)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 5), positions=st.integers(1, 4), neurons=st.integers(1, 6), activations=st.integers(2, 5),
    tau=st.sampled_from([0.1, 0.7, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_parts_of_the_variance_are_those_of_the_formula_and_sum_to_all(
    n: int, positions: int, neurons: int, activations: int, tau: float, seed: int
) -> None:
    alpha, logits = random_layer(n, positions, neurons, activations, seed)
    layer = route_layer(alpha, logits, tau)
    g = full_weights(alpha, logits, tau)
    m, by_neuron, by_text, by_token = g.mean((0, 1, 2)), g.mean((0, 1)), g.mean((1, 2)), g.mean(2)
    by_both = g.mean(1)  # [n, F, K]
    expected = torch.stack(
        [
            (by_neuron - m).square().sum(-1).mean(),
            (by_text - m).square().sum(-1).mean(),
            (by_token - by_text[:, None]).square().sum(-1).mean(),
            (by_both - by_neuron - by_text[:, None] + m).square().sum(-1).mean(),
            (g - by_both[:, None] - by_token[:, :, None] + by_text[:, None, None]).square().sum(-1).mean(),
        ]
    )
    total = (g - m).square().sum(-1).mean()
    assert layer.total_variance == pytest.approx(total.item(), abs=1e-6)
    parts = (layer.variance.estimate * layer.total_variance).nan_to_num()  # shares of nothing
    torch.testing.assert_close(parts, expected, atol=1e-6, rtol=1e-4)
    if total > 1e-4:
        assert layer.variance.estimate.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("alpha_scale", "between", "within", "part"),
    [(1.0, 0.0, 0.0, "static preference"), (0.0, 1.0, 0.0, "text"), (0.0, 0.0, 1.0, "token")],
)
def test_what_alone_varies_explains_all(alpha_scale: float, between: float, within: float, part: str) -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = alpha_scale * torch.randn(7, 4, generator=generator)
    logits = between * torch.randn(6, 1, 4, generator=generator).expand(6, 5, 4)
    logits = logits + within * torch.randn(1, 5, 4, generator=generator)
    found = dict(zip(COMPONENTS, route_layer(alpha, logits, 0.5).variance.estimate.tolist(), strict=True))
    assert found[part] == pytest.approx(1, abs=1e-5)


def test_intervals_of_the_variance_are_those_of_leaving_each_document_out() -> None:
    alpha, logits = random_layer(6, 3, 5, 4, seed=1)
    found = route_layer(alpha, logits, 0.5).variance
    left_out = [route_layer(alpha, torch.cat([logits[:d], logits[d + 1 :]]), 0.5).variance.estimate for d in range(6)]
    error = (torch.stack(left_out).var(0, correction=0) * 5).sqrt()
    torch.testing.assert_close(found.high, (found.estimate + 2.5705818 * error).clamp(max=1), rtol=1e-4, atol=1e-5)
    assert (found.low >= 0).all()


def test_shares_entropies_and_dominance_follow_the_formula() -> None:
    alpha, logits = random_layer(4, 6, 9, 3, seed=2)
    layer = route_layer(alpha, logits, 0.3)
    g, at_one = full_weights(alpha, logits, 0.3), full_weights(alpha, logits, 1.0)
    torch.testing.assert_close(layer.neuron_weights, g.mean((0, 1)).float())
    torch.testing.assert_close(layer.token_shares, g.mean(2).float())
    torch.testing.assert_close(layer.document_shares, g.mean((1, 2)).float())
    nats = torch.stack([-(w * w.log()).nan_to_num().sum(-1).mean((1, 2)) for w in (at_one, g)], dim=1)
    torch.testing.assert_close(layer.entropies, nats.float())
    index, lead, leads_at = dominant(layer)
    assert index.tolist() == g.mean((0, 1)).argmax(-1).tolist()
    ordered = g.mean((0, 1)).sort(-1, descending=True).values
    torch.testing.assert_close(lead, (ordered[:, 0] - ordered[:, 1]).float())
    torch.testing.assert_close(leads_at, (g.argmax(-1) == index).float().mean((0, 1)))
    own = (g.mean(1) - g.mean((0, 1))).flatten(1)
    torch.testing.assert_close(layer.gram, (own @ own.T / 9).float(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(token_shares(alpha, logits, 0.3), g.mean(2).float())


def test_one_activation_varies_not_at_all() -> None:
    layer = route_layer(torch.zeros(3, 1), torch.randn(2, 4, 1), 0.5)
    assert layer.total_variance == 0 and layer.variance.estimate.isnan().all()
    assert dominant(layer).lead.tolist() == [1, 1, 1]


def test_positions_are_spaced_and_end_with_the_last() -> None:
    assert spaced(3).tolist() == [0, 1, 2]
    assert spaced(2 * POSITIONS).tolist() == list(range(1, 2 * POSITIONS, 2))


@pytest.mark.parametrize("scope", ["causal", "document"])
def test_logits_are_the_models_own_in_any_batch(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model(routing_scope=scope)
    tokens = torch.randint(50, (5, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("polyglu.interpretability.text_routing.BATCH_TOKENS", 24)
    found = token_logits(model, tokens, 0.4)
    assert found.shape == (2, 5, 12, 4)
    for row in range(5):
        _, alone = model.features(tokens[row : row + 1], tau=0.4)
        torch.testing.assert_close(found[:, row], torch.stack([layer[0].expand(12, -1) for layer in alone]))
    layers = list(route_layers(torch.stack([block.mlp.alpha for block in model.layers]).detach(), found, 0.4))
    assert len(layers) == 2 and not math.isnan(layers[0].total_variance)


def test_dynamic_entropies_of_the_published_layout_are_the_published_ones() -> None:
    model, _, tau = load_checkpoint(FIXTURE / "portable.pt")
    tokens = load_file(FIXTURE / "expected.safetensors")["input_ids"]
    alpha = torch.stack([block.mlp.alpha for block in model.layers]).detach()
    expected = json.loads((FIXTURE / "expected.json").read_text())["dynamic_routing_entropy"]
    for index, layer in enumerate(route_layers(alpha, token_logits(model, tokens, tau), tau)):
        found = layer.entropies[:, 0].mean().item()
        assert found == pytest.approx(expected[f"dynamic_routing_entropy/layer_{index}"], rel=1e-4)
