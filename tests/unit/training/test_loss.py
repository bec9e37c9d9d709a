"""The loss of a micro batch, and the entropy regulariser beside it."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyglu.config_file import validate
from polyglu.data.dataloader import IGNORED, MicroBatch
from polyglu.errors import PolygluError
from polyglu.model import routing as routing_module
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig, RoutingScope, TrainConfig
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.model import create_model
from polyglu.model.routing import dynamic_entropy, gumbel_noise
from polyglu.training.cross_entropy import reference_cross_entropy
from polyglu.training.loss import LanguageModelLoss

SMALL = ModelConfig(
    vocab_size=37, d_model=16, d_ff=24, n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim=8, seq_length=32
)


def sharp_model(scope: RoutingScope, k: int = 4) -> PolychromaticLM:
    """Two layers whose neurons have preferences and whose routers are far from even."""
    model = create_model(SMALL.model_copy(update={"n_layers": 2, "routing_scope": scope, "n_activations": k}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.layers:
            assert isinstance(layer.mlp, PolyGLU)
            layer.mlp.alpha.normal_(std=0.7, generator=generator)
            layer.mlp.router.hidden.weight.normal_(std=0.5, generator=generator)
            layer.mlp.router.out.weight.normal_(std=0.5, generator=generator)
    return model


def some_batch() -> MicroBatch:
    """Three rows of 30 tokens, of one, two and three documents, with 30, 23 and 11 targets."""
    ids = torch.randint(0, 37, (3, 31), generator=torch.Generator().manual_seed(3))
    targets = ids[:, 1:].clone()
    targets[1, 5:12], targets[2, :19] = IGNORED, IGNORED
    bounds = torch.tensor([0, 30, 41, 60, 67, 80, 90], dtype=torch.int32)
    return MicroBatch(ids[:, :-1].contiguous(), targets, bounds, torch.tensor([7, 8, 9]))


def one_row(batch: MicroBatch, row: int) -> MicroBatch:
    inside = batch.cu_seqlens[(batch.cu_seqlens >= 30 * row) & (batch.cu_seqlens <= 30 * (row + 1))] - 30 * row
    rows = slice(row, row + 1)
    return MicroBatch(batch.input_ids[rows], batch.targets[rows], inside, batch.sample_ids[rows])


def noise(batch: MicroBatch, k: int = 4) -> Tensor:
    return gumbel_noise(0, batch.sample_ids, 2, SMALL.d_ff, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_reference(dtype: torch.dtype) -> None:
    """The head is tied to the embedding: both parts of its gradient must arrive."""
    model, batch = sharp_model("causal"), some_batch()
    parameters = list(model.parameters())
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        features, _ = model.features(batch.input_ids, cu_seqlens=batch.cu_seqlens, tau=0.5, gumbel=noise(batch))
    expected = reference_cross_entropy(
        features.flatten(0, 1), model.embed_tokens.weight, batch.targets.flatten(), dtype
    )
    actual = LanguageModelLoss(model, dtype, False)(batch, 0.5, noise(batch)).loss
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(actual, expected, **tolerance)
    wanted = torch.autograd.grad(expected, parameters)
    for ours, theirs in zip(torch.autograd.grad(actual, parameters), wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_penalty_is_a_plain_zero_by_default() -> None:
    parts = LanguageModelLoss(create_model(SMALL), torch.float32, recompute="none")(some_batch(), 0.5, None)
    assert parts.penalty.item() == 0 and not parts.penalty.requires_grad
    assert parts.loss.requires_grad and not any(logits.requires_grad for logits in parts.routing)


@pytest.mark.parametrize("scope", get_args(RoutingScope))
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_penalty_is_the_entropy_of_each_target(scope: RoutingScope, k: int) -> None:
    """By the definition, position for position and layer for layer, and so the gradient of every parameter."""
    model, batch = sharp_model(scope, k), some_batch()
    parts = LanguageModelLoss(model, torch.float32, False, entropy_reg=0.3)(batch, 0.5, noise(batch, k))
    _, routing = model.features(batch.input_ids, cu_seqlens=batch.cu_seqlens, tau=0.5, gumbel=noise(batch, k))
    entropies = []  # [B, T] of each layer
    for layer, token in zip(model.layers, routing, strict=True):
        assert isinstance(layer.mlp, PolyGLU)
        log_p = F.log_softmax(layer.mlp.alpha + token[:, :, None], dim=-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1).mean(-1).expand(batch.targets.shape))
    expected = -0.3 * torch.stack(entropies).mean(0)[batch.targets != IGNORED].sum()
    torch.testing.assert_close(parts.penalty, expected)
    parameters = list(model.parameters())
    actual = torch.autograd.grad(parts.penalty, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for (name, _), ours, theirs in zip(model.named_parameters(), actual, wanted, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)
    reached = {name.rsplit(".mlp.", 1)[-1] for (name, _), ours in zip(model.named_parameters(), actual, strict=True)
               if ours is not None and ours.abs().max() > 1e-4}  # fmt: skip
    if k > 1:  # one choice has no entropy to raise
        assert {"alpha", "beta", "router.hidden.weight", "router.out.weight"} <= reached


@pytest.mark.parametrize("scope", get_args(RoutingScope))
def test_how_rows_are_cut_changes_no_penalty(scope: RoutingScope, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have unequal numbers of targets, and more positions than are looked at."""
    monkeypatch.setattr(routing_module, "ENTROPY_POSITIONS", 7)
    model, batch = sharp_model(scope), some_batch()
    loss = LanguageModelLoss(model, torch.float32, False, entropy_reg=0.3)
    whole = loss(batch, 0.5, noise(batch))
    rows = [one_row(batch, row) for row in range(3)]
    assert len({row.n_targets for row in rows}) == 3
    cut = [loss(row, 0.5, noise(row)).penalty for row in rows]
    torch.testing.assert_close(torch.stack(cut).sum(), whole.penalty)
    weights = [model.layers[0].mlp.alpha, model.layers[0].mlp.router.out.weight]
    gradients = [torch.autograd.grad(total, weights) for total in (torch.stack(cut).sum(), whole.penalty)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", get_args(RoutingScope))
def test_recomputing_blocks_changes_no_gradient(scope: RoutingScope) -> None:
    """The penalty reaches a block through its second output, which activation checkpointing must not lose."""
    batch, gradients = some_batch(), []
    for recompute in ("none", "full"):
        model = sharp_model(scope)
        parts = LanguageModelLoss(model, torch.float32, recompute, entropy_reg=3.0)(batch, 0.5, noise(batch))
        gradients.append(torch.autograd.grad(parts.loss + parts.penalty, list(model.parameters())))
    without = torch.autograd.grad(
        LanguageModelLoss(model, torch.float32, True)(batch, 0.5, noise(batch)).loss, list(model.parameters())
    )
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)
    assert any(not torch.allclose(ours, other) for ours, other in zip(gradients[1], without, strict=True))


def test_penalty_is_fp32_under_bf16() -> None:
    model, batch = sharp_model("causal"), some_batch()
    exact, half = (
        LanguageModelLoss(model, dtype, False, entropy_reg=0.3)(batch, 0.5, noise(batch)).penalty
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=2e-2, atol=0)  # the router's input is bf16, its softmax is not


def test_entropy_reg_without_routing_is_refused() -> None:
    model = create_model(SMALL.model_copy(update={"ffn": "swiglu"}))
    LanguageModelLoss(model, torch.float32, False, entropy_reg=0.0)
    with pytest.raises(PolygluError, match=r"training.entropy_reg is 0.1, but ffn 'swiglu' has no routing"):
        LanguageModelLoss(model, torch.float32, False, entropy_reg=0.1)
    values = {"model": {"ffn": "swiglu"}, "training": {"entropy_reg": 0.1}}
    with pytest.raises(
        PolygluError, match=r"^mine.yaml: training.entropy_reg is 0.1, but ffn 'swiglu'.*set it to 0\.$"
    ):
        validate(TrainConfig, values, "mine.yaml")
    with pytest.raises(PolygluError, match="training.entropy_reg"):
        validate(TrainConfig, {"training": {"entropy_reg": -0.1}}, "mine.yaml")
    assert validate(TrainConfig, {"training": {"entropy_reg": 0.1}}, "mine.yaml").training.entropy_reg == 0.1


def test_regularised_run_keeps_its_entropy() -> None:
    """At a rate at which the router sharpens within dozens of steps; the same start, data and noise for both."""
    free, held = (dynamic_entropy_after(steps=40, entropy_reg=entropy_reg) for entropy_reg in (0.0, 0.1))
    assert free < 1.0
    assert held > free + 0.3


def dynamic_entropy_after(steps: int, entropy_reg: float) -> float:
    model = create_model(SMALL.model_copy(update={"routing_scope": "causal"}))
    loss = LanguageModelLoss(model, torch.float32, False, entropy_reg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    parts = None
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        start, d = (torch.randint(low, 37, (8, 1), generator=generator) for low in (0, 34))
        ids = (start + d * torch.arange(25)) % 37
        bounds = torch.arange(0, 8 * 24 + 1, 24, dtype=torch.int32)
        batch = MicroBatch(ids[:, :-1], ids[:, 1:], bounds, torch.arange(8) + 8 * step)
        parts = loss(batch, 0.5, noise(batch))
        ((parts.loss + parts.penalty) / batch.n_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parts is not None
    return float(dynamic_entropy(model.layers[0].mlp.alpha, parts.routing[0]))
