"""Who sees whom: routing scopes, packing, and the feed-forward layers as modules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu import PolyGLU
from polyglu.model import packing as packing_module
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import KernelName, ModelConfig, Recompute, RoutingScope
from polyglu.model.layers import GLU, ROUTER_WIDTH, routing_weights
from polyglu.model.model import create_model
from polyglu.model.packing import Packing
from polyglu.model.routing import RoutingState, gated_mixture, gumbel_noise, pool

TINY = ModelConfig(vocab_size=50, d_model=24, d_ff=40, n_layers=2, n_q_heads=4, n_kv_heads=2, head_dim=6, seq_length=32)


def tiny(scope: str = "causal", **changes: object) -> PolychromaticLM:
    model = create_model(TINY.model_copy(update={"routing_scope": scope, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a router at its initial scale hardly moves the output: leaks would hide in the rounding
        for name, parameter in model.named_parameters():
            if "router" in name or "alpha" in name:
                parameter.normal_(std=0.5, generator=generator)
            elif parameter.ndim == 2:
                parameter.mul_(5)
    return model


def tokens(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (rows, columns), generator=torch.Generator().manual_seed(seed))


bounds = st.lists(st.integers(1, 23), max_size=4, unique=True).map(lambda cuts: [0, *sorted(cuts), 24])


@settings(max_examples=25, deadline=None)
@given(bounds=bounds, position=st.integers(0, 23), noisy=st.booleans())
def test_causal_sees_no_later_token_and_no_other_document(bounds: list[int], position: int, noisy: bool) -> None:
    model, ids, cu_seqlens = tiny("causal"), tokens(1, 24), torch.tensor(bounds, dtype=torch.int32)
    gumbel = gumbel_noise(0, torch.tensor([7]), TINY.n_layers, TINY.d_ff, 4) if noisy else None
    changed = ids.clone()
    changed[0, position] = (changed[0, position] + 1) % TINY.vocab_size
    before = model(ids, cu_seqlens=cu_seqlens, tau=0.3, gumbel=gumbel)
    after = model(changed, cu_seqlens=cu_seqlens, tau=0.3, gumbel=gumbel)
    end = min(bound for bound in bounds if bound > position)
    unseen = [index for index in range(24) if index < position or index >= end]
    assert torch.equal(before[0, unseen], after[0, unseen])
    assert not torch.equal(before[0, position], after[0, position])


@settings(max_examples=25, deadline=None)
@given(bounds=bounds, position=st.integers(0, 23))
def test_document_scope_sees_no_other_document(bounds: list[int], position: int) -> None:
    model, ids, cu_seqlens = tiny("document"), tokens(1, 24), torch.tensor(bounds, dtype=torch.int32)
    changed = ids.clone()
    changed[0, position] = (changed[0, position] + 1) % TINY.vocab_size
    before, after = (model(x, cu_seqlens=cu_seqlens, tau=0.3) for x in (ids, changed))
    start = max(bound for bound in bounds if bound <= position)
    end = min(bound for bound in bounds if bound > position)
    others = [index for index in range(24) if not start <= index < end]
    assert torch.equal(before[0, others], after[0, others])
    assert not torch.equal(before[0, start], after[0, start])  # both directions within the document


def test_sequence_scope_sees_the_whole_row() -> None:
    """The paper's scope: what the other two scopes must not do, this one does."""
    model, ids = tiny("sequence"), tokens(1, 24)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % TINY.vocab_size
    assert not torch.equal(model(ids)[0, 0], model(changed)[0, 0])


@pytest.mark.parametrize("scope", ["causal", "document"])
@settings(max_examples=15, deadline=None)
@given(bounds=bounds)
def test_packing_equals_running_each_document_alone(scope: str, bounds: list[int]) -> None:
    model, ids = tiny(scope), tokens(1, 24)
    packed = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), tau=0.3)
    for start, end in zip(bounds, bounds[1:], strict=False):
        alone = model(ids[:, start:end], tau=0.3)
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", ["sequence", "causal", "document"])
def test_rows_do_not_see_each_other(scope: str) -> None:
    model, ids = tiny(scope), tokens(3, 16)
    together = model(ids, tau=0.5)
    for row in range(3):
        torch.testing.assert_close(together[row], model(ids[row : row + 1], tau=0.5)[0], rtol=1e-5, atol=1e-5)


def test_evaluation_is_deterministic() -> None:
    model, ids = tiny("sequence"), tokens(2, 16)
    assert torch.equal(model(ids, tau=0.1), model(ids, tau=0.1))


@pytest.mark.parametrize("scope", ["sequence", "document", "causal"])
@pytest.mark.parametrize("n_activations", [1, 4, 6])
def test_mixture_equals_the_formula(scope: str, n_activations: int) -> None:
    """One softmax over all logits at once, and its gradient, against one activation at a time."""
    from polyglu.model.activations import ACTIVATIONS

    torch.manual_seed(0)
    gate = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    alpha = torch.randn(7, n_activations, dtype=torch.float64, requires_grad=True)
    token = torch.randn(2, 1 if scope == "sequence" else 5, n_activations, dtype=torch.float64, requires_grad=True)
    up = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    mixed = gated_mixture(gate, up, alpha[None], token, tau=0.1)
    weights = torch.softmax((alpha + token[:, :, None, :]) / 0.1, dim=-1)
    branches = torch.stack([activation.function(gate) for activation in ACTIVATIONS[:n_activations]], dim=-1)
    expected = (weights * branches).sum(-1) * up
    torch.testing.assert_close(mixed, expected)
    seed = torch.randn_like(mixed)
    actual = torch.autograd.grad((mixed * seed).sum(), (gate, up, alpha, token))
    wanted = torch.autograd.grad((expected * seed).sum(), (gate, up, alpha, token))
    torch.testing.assert_close(actual, wanted)


def test_extreme_logits_at_low_temperature_stay_finite() -> None:
    neuron, token = torch.tensor([[[300.0, -300.0, 0.0]]]), torch.tensor([[[-300.0, 300.0, 0.0]]])
    weights = torch.stack(routing_weights(neuron, token, tau=0.1))
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(1, 1, 1))


def test_polyglu_is_a_drop_in_feed_forward_layer() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
    ffn = PolyGLU(d_model=16, d_ff=24)
    x = layer.self_attn(*[torch.randn(2, 5, 16)] * 3)[0]
    y = ffn(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in ffn.parameters())
    changed = x.detach().clone()
    changed[:, -1] += 1
    assert torch.equal(ffn(changed)[:, :-1], ffn(x)[:, :-1])  # causal unless asked otherwise


@pytest.mark.parametrize("ffn", ["swiglu", "geglu", "reglu", "tanhglu"])
def test_single_activation_models_are_one_config_value_away(ffn: str) -> None:
    model = tiny(ffn=ffn)
    functions = {
        "swiglu": torch.nn.functional.silu,
        "geglu": torch.nn.functional.gelu,
        "reglu": torch.relu,
        "tanhglu": torch.tanh,
    }
    layer = model.layers[0].mlp
    assert isinstance(layer, GLU)
    x = torch.randn(1, 3, TINY.d_model)
    gate, up, down = layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight
    torch.testing.assert_close(layer(x), (functions[ffn](x @ gate.T) * (x @ up.T)) @ down.T)
    assert model(tokens(1, 8)).shape == (1, 8, TINY.vocab_size)
    assert not any("alpha" in name for name, _ in model.named_parameters())


def test_initialisation_follows_its_table() -> None:
    model = create_model(ModelConfig(vocab_size=500, d_model=128, d_ff=256, n_layers=8, n_q_heads=4, n_kv_heads=2))
    for name, parameter in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind in ("bias", "alpha"):
            assert (parameter == 0).all(), name
        elif kind == "beta" or "norm" in name:
            assert (parameter == 1).all(), name
        else:
            scale = 0.25 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            tolerance = 0.02 if parameter.numel() > 1000 else 0.2
            assert float(parameter.detach().std()) == pytest.approx(0.02 * scale, rel=tolerance), name


def kept_after(model: PolychromaticLM, ids: torch.Tensor, recompute: Recompute) -> tuple[list[torch.Tensor], int]:
    """Gradients, and the bytes that autograd holds between forward and backward."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features, _ = model.features(ids, tau=0.5, recompute=recompute)
    features.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None], sum(
        kept.values()
    )


@pytest.mark.parametrize("kernels", ["auto", "chunked"])
def test_recomputation_changes_memory_and_nothing_else(kernels: str) -> None:
    model, ids = tiny("causal", kernels=kernels), tokens(2, 16)
    expected, most = kept_after(model, ids, "none")
    for recompute in ("hidden", "ffn", "full"):
        gradients, kept = kept_after(model, ids, recompute)
        assert kept < most, recompute
        most = kept
        for actual, wanted in zip(gradients, expected, strict=True):
            if recompute == "hidden":  # the same products, of other shapes
                torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(actual, wanted)


def test_too_long_and_badly_cut_documents_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="seq_length 32"):
        model(tokens(1, 33))
    with pytest.raises(ValueError, match="crosses the end of a row"):
        model(tokens(2, 4), cu_seqlens=torch.tensor([0, 6, 8]))
    for bad in ([0, 4], [1, 8], [0, 5, 5, 8], [0, 6, 4, 8], []):
        with pytest.raises(ValueError, match="cu_seqlens"):
            model(tokens(2, 4), cu_seqlens=torch.tensor(bad, dtype=torch.int32))


SCOPES: tuple[RoutingScope, ...] = ("causal", "document")


@pytest.mark.parametrize("block", [1, 2, 3, 128])
@settings(max_examples=20, deadline=None)
@given(cuts=st.sets(st.integers(1, 35)))
def test_pool_is_the_mean_over_the_scope(block: int, cuts: set[int]) -> None:
    x, bounds = torch.randn(3, 12, 3, requires_grad=True), sorted(cuts | {0, 12, 24, 36})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "BLOCK", block)
        packing = Packing.of(torch.Size((3, 12)), torch.tensor(bounds), x.device)
        causal, document = (pool(x, scope, packing).expand(3, 12, 3).flatten(0, 1) for scope in SCOPES)
    flat = x.flatten(0, 1)
    for start, end in zip(bounds, bounds[1:], strict=False):
        for position in range(start, end):
            torch.testing.assert_close(causal[position], flat[start : position + 1].mean(0))
            torch.testing.assert_close(document[position], flat[start:end].mean(0))
    torch.testing.assert_close(pool(x, "sequence", packing), x.mean(1, keepdim=True))
    position = bounds[1] - 1  # the gradient comes back from the positions that saw it, and from no other
    (grad,) = torch.autograd.grad(causal[position].sum(), x)
    expected = torch.zeros(36, 3)
    expected[: position + 1] = 1 / (position + 1)
    torch.testing.assert_close(grad.flatten(0, 1), expected)


def test_the_longest_document_is_known() -> None:
    """FlashAttention starts as many programs as it may have tokens; for 1 it would take a kernel for decoding."""
    bounds = torch.tensor([0, 3, 64, 70, 128])
    packing = Packing.of(torch.Size((2, 64)), bounds, torch.device("cpu"))
    assert packing.max_length == 61
    assert torch.equal(packing.cu_seqlens, bounds) and packing.cu_seqlens.dtype == torch.int32
    assert Packing.of(torch.Size((1, 4)), torch.arange(5), torch.device("cpu")).max_length == 2


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_position_by_position_equals_the_whole(kernels: KernelName) -> None:
    """Decoding: the running state gives what the row gives at once, and a prompt's state goes on where it ended."""
    layer, x = PolyGLU(16, 24, kernels=kernels), torch.randn(3, 11, 16)
    with torch.no_grad():
        layer.alpha.normal_()
        for parameter in layer.router.parameters():
            parameter.normal_(std=0.5)
        expected, state, outputs = layer(x, tau=0.3), RoutingState.empty(3, ROUTER_WIDTH), []
        for position in range(11):
            y, state = layer.step(x[:, position : position + 1], state, tau=0.3)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-5, atol=1e-6)

        lengths, rows = (4, 1, 7), (0, 1, 2)  # prompts of three lengths, packed
        packed = torch.cat([x[row, :length] for row, length in zip(rows, lengths, strict=True)])[None]
        packing = Packing.of(packed.shape[:2], torch.tensor([0, 4, 5, 12]), x.device)
        state = RoutingState.after(layer.router.project(packed), packing)
        following = torch.stack([x[row, length : length + 1] for row, length in zip(rows, lengths, strict=True)])
        y, state = layer.step(following, state, tau=0.3)
        assert state.count.tolist() == [5, 2, 8]
        for row, length in zip(rows, lengths, strict=True):
            torch.testing.assert_close(y[row, 0], expected[row, length], rtol=1e-5, atol=1e-6)


def test_gumbel_noise_depends_on_seed_sample_and_layer_alone() -> None:
    noise = gumbel_noise(3, torch.tensor([10, 11, 12, 13]), n_layers=2, d_ff=2000, n_activations=4)
    alone = gumbel_noise(3, torch.tensor([12]), n_layers=2, d_ff=2000, n_activations=4)
    assert torch.equal(noise[:, 2:3], alone)
    assert not torch.equal(noise, gumbel_noise(4, torch.tensor([10, 11, 12, 13]), 2, 2000, 4))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert float(noise.std()) == pytest.approx(1.2825, abs=0.02)  # pi / sqrt(6)
    flat = noise.flatten(2).flatten(0, 1)
    correlations = torch.corrcoef(flat) - torch.eye(len(flat))
    assert float(correlations.abs().max()) < 0.06


def test_gumbel_noise_is_always_finite() -> None:
    """A uniform number that rounds to 0 or 1 would be infinite noise, once in some million draws."""
    from polyglu.model.routing import _uniform

    extremes = _uniform(torch.tensor([0, 1, -1, -2, 2**63 - 1, 0x7FFFFF, 0xFFFFFF]))
    assert extremes.min() > 0 and extremes.max() < 1
    assert torch.isfinite(torch.log(-torch.log(extremes))).all()
