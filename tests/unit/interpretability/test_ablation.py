from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import random_tokens, sharp_model

from polyglu.interpretability import ablation
from polyglu.interpretability.ablation import (
    Intervention,
    Losses,
    as_trained,
    interventions,
    mean_weights,
    measure,
    passes,
)
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig
from polyglu.model.layers import routing_weights

TAU = 0.4
DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((9, 4, 17, 2))]


def nats(model: PolychromaticLM, tau: float = TAU) -> list[float]:
    """Of each document, by itself, through the model's own forward pass."""
    losses = []
    for document in DOCUMENTS:
        logits = model(torch.tensor([document[:-1]]), tau=tau)[0]
        losses.append(F.cross_entropy(logits, torch.tensor(document[1:]), reduction="sum").item())
    return losses


def run(model: PolychromaticLM, tau: float = TAU, by_layer: bool = False) -> Losses:
    chosen = interventions(mean_weights(model, [document[:-1] for document in DOCUMENTS], tau))
    return measure(model, DOCUMENTS, tau, chosen, by_layer)


def of(losses: Losses, name: str, layer: int | None = None) -> list[float]:
    index = [(one.intervention.name, one.layer) for one in losses.conditions].index((name, layer))
    return losses.nats[index].tolist()


def changed(model: PolychromaticLM, part: str, layers: tuple[int, ...] = (0, 1), **settings: Any) -> PolychromaticLM:
    """The same model with a part of some layers' routing set to 0, or of another kind."""
    other = PolychromaticLM(ModelConfig.model_validate({**model.config.model_dump(), **settings})).eval()
    weights = {name: weight.clone() for name, weight in model.state_dict().items() if name in other.state_dict()}
    for layer in layers:
        name = f"layers.{layer}.mlp.{part}"
        if name in weights:
            weights[name].zero_()
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize("scope", ["causal", "document"])
def test_left_alone_the_loss_is_the_models_own(scope: str) -> None:
    model = sharp_model(routing_scope=scope)
    losses = measure(model, DOCUMENTS, TAU, [Intervention("same", "same", as_trained)], by_layer=True)
    assert losses.own.tolist() == pytest.approx(nats(model), rel=1e-4)
    assert torch.equal(losses.nats, losses.own.expand(3, -1))
    assert losses.tokens.tolist() == [8, 3, 16, 1]


@pytest.mark.parametrize(
    ("name", "ffn"), [("ReLU", "reglu"), ("Tanh", "tanhglu"), ("SiLU", "swiglu"), ("GELU", "geglu")]
)
def test_a_forced_activation_is_the_model_with_that_activation(name: str, ffn: str) -> None:
    model = sharp_model(routing_scope="causal")
    expected = nats(changed(model, "", ffn=ffn))
    assert of(run(model), f"force_{name}") == pytest.approx(expected, rel=1e-4)


def test_forcing_what_alpha_has_already_decided_changes_nothing() -> None:
    model = sharp_model(routing_scope="causal")
    for block in model.layers:
        block.mlp.alpha.data[:, 2] = 1e3
    losses = run(model, by_layer=True)
    for name in ("force_SiLU", "freeze_layer", "freeze_neurons", "static_only", "harden"):
        for layer in (None, 0, 1):
            assert of(losses, name, layer) == losses.own.tolist(), name
    assert of(losses, "force_ReLU") != losses.own.tolist()


def test_dropped_parts_are_the_model_without_them() -> None:
    model = sharp_model(routing_scope="causal")
    losses = run(model, by_layer=True)
    assert of(losses, "static_only") == pytest.approx(nats(changed(model, "beta")), rel=1e-4)
    assert of(losses, "dynamic_only") == pytest.approx(nats(changed(model, "alpha")), rel=1e-4)
    for layer in (0, 1):
        assert of(losses, "static_only", layer) == pytest.approx(nats(changed(model, "beta", (layer,))), rel=1e-4)
        assert of(losses, "dynamic_only", layer) == pytest.approx(nats(changed(model, "alpha", (layer,))), rel=1e-4)
    assert of(losses, "static_only", 0) != pytest.approx(of(losses, "static_only", 1), rel=1e-3)


def test_the_largest_weight_alone_is_the_limit_of_a_small_tau() -> None:
    model = sharp_model(routing_scope="causal")
    assert of(run(model), "harden") == pytest.approx(nats(model, tau=1e-4), rel=1e-3)


def test_means_are_over_all_tokens_and_freeze_what_follows_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model(routing_scope="causal")
    monkeypatch.setattr(ablation, "BATCH_TOKENS", 20)
    monkeypatch.setattr(ablation, "MEAN_TOKENS", 3)
    found = mean_weights(model, DOCUMENTS, TAU)
    weights = []
    for document in DOCUMENTS:
        _, token_logits = model.features(torch.tensor([document]), tau=TAU)
        pairs = zip(model.layers, token_logits, strict=True)
        weights.append([torch.stack(routing_weights(block.mlp.alpha[None], one, TAU))[:, 0] for block, one in pairs])
    expected = torch.stack([torch.cat([one[layer] for one in weights], dim=1).mean(1).T for layer in (0, 1)])
    torch.testing.assert_close(found, expected.detach())
    deaf = changed(model, "beta")
    losses = run(deaf)
    assert of(losses, "freeze_neurons") == pytest.approx(losses.own.tolist(), rel=1e-5)
    assert of(losses, "freeze_layer") != pytest.approx(losses.own.tolist(), rel=1e-3)


def test_batches_change_nothing_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model(routing_scope="document")
    whole = run(model, by_layer=True)
    monkeypatch.setattr(ablation, "BATCH_TOKENS", 12)
    monkeypatch.setattr(ablation, "HEAD_TOKENS", 5)
    torch.testing.assert_close(run(model, by_layer=True).nats, whole.nats, rtol=1e-5, atol=1e-5)
    calls = []
    chosen = interventions(torch.full((2, 24, 4), 0.25))[:3]
    measure(model, DOCUMENTS, TAU, chosen, by_layer=True, advance=lambda: calls.append(1))
    assert len(calls) == passes(DOCUMENTS, 3, 2, by_layer=True) > passes(DOCUMENTS, 3, 2, by_layer=False)
