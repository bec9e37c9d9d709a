"""Layers that choose by one part of the routing alone: the formula holds, the count of parameters tells the truth."""

from typing import get_args

import pytest
import torch
from models import random_tokens, sharp_model

from polyglu.config_file import validate
from polyglu.errors import PolygluError
from polyglu.model.activations import ACTIVATIONS
from polyglu.model.config import KernelName, ModelConfig, RoutingParts, RoutingScope
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.generation import MAX_TOKENS, next_token_logits, open_decoder
from polyglu.model.layers import ROUTER_WIDTH
from polyglu.model.model import describe_shape, load_checkpoint, save_portable

D, F, K = 16, 24, 4
PARTS: tuple[RoutingParts, ...] = get_args(RoutingParts)


def layer(routing: RoutingParts, kernels: KernelName = "auto", scope: RoutingScope = "causal") -> PolyGLU:
    made = PolyGLU(D, F, K, scope, kernels, routing)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made


@pytest.mark.parametrize("kernels", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("routing", ["static", "dynamic"])
def test_what_is_left_out_adds_nothing(routing: RoutingParts, kernels: KernelName) -> None:
    """Against the formula, written out."""
    ffn, x = layer(routing, kernels), torch.randn(2, 9, D, requires_grad=True)
    gumbel = torch.randn(2, F, K)
    mean = x.cumsum(1) / torch.arange(1, 10)[:, None]
    logits = gumbel[:, None].expand(2, 9, F, K)
    if routing == "static":
        logits = logits + ffn.alpha
    else:
        router = ffn.router
        logits = logits + (ffn.beta * router.out(torch.relu(router.hidden(mean))))[:, :, None]
    weights = torch.softmax(logits / 0.7, dim=-1)
    gate = ffn.gate_proj(x)
    mixed = sum(weights[..., k] * ACTIVATIONS[k].function(gate) for k in range(K))
    expected = ffn.down_proj(mixed * ffn.up_proj(x))
    found = ffn(x, tau=0.7, gumbel=gumbel)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    parameters = [x, *ffn.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_parameters_are_those_that_compute() -> None:
    sizes = {parts: sum(weight.numel() for weight in layer(parts).parameters()) for parts in PARTS}
    router = K + (D + 1) * ROUTER_WIDTH + (ROUTER_WIDTH + 1) * K
    assert sizes == {
        "both": 3 * D * F + F * K + router,
        "static": 3 * D * F + F * K,
        "dynamic": 3 * D * F + router,
    }


@pytest.mark.parametrize("routing", ["static", "dynamic"])
def test_a_checkpoint_carries_its_parts(routing: RoutingParts, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = sharp_model(routing=routing, seq_length=32)
    names = model.state_dict()
    assert ("layers.1.mlp.alpha" in names, "layers.1.mlp.beta" in names) == (routing == "static", routing == "dynamic")
    save_portable(tmp_path / "model.pt", model.state_dict(), model.config, 3, 0.5, {})
    loaded, _, tau = load_checkpoint(tmp_path / "model.pt")
    ids = torch.tensor([random_tokens(20, 0)])
    assert loaded.config == model.config and torch.equal(loaded(ids, tau=tau), model(ids, tau=tau))
    assert "routing" not in describe_shape(ModelConfig())  # as checkpoints from before there was a choice


@pytest.mark.parametrize("routing", ["static", "dynamic"])
def test_decoding_gives_the_whole_rows_logits(routing: RoutingParts) -> None:
    model, row = sharp_model(routing=routing, routing_scope="causal", seq_length=32), random_tokens(12, 1)
    decoder = open_decoder(model, 1, 0.5, len(row), "exact", MAX_TOKENS)
    decoder.prefill([row[:5]], [0])
    stepped = torch.cat([decoder.step([token]) for token in row[5:]])
    whole = next_token_logits(model, [row[:end] for end in range(6, 13)], 0.5, MAX_TOKENS)
    torch.testing.assert_close(stepped, whole, rtol=1e-3, atol=1e-3)


def test_parts_of_a_layer_without_routing_are_refused() -> None:
    with pytest.raises(PolygluError, match="'swiglu' has no routing; remove 'routing'"):
        validate(ModelConfig, {"ffn": "swiglu", "routing": "static"}, source="suite.yaml")
