import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.interpretability.dynamic_routing import (
    KINDS,
    POSITIONS,
    analyze_layers,
    collect,
    effective_routing,
    gate_sensitivity,
    make_prompts,
    observe,
    routing_shift,
    shift_within_kinds,
    shifts_between_kinds,
)
from polyglu.interpretability.neurotransmitter_maps import stack_alpha
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model
from polyglu.model.routing import dynamic_entropy


class ByteTokenizer:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def make_model(**changes: object) -> PolychromaticLM:
    shape = {"vocab_size": 256, "d_model": 8, "d_ff": 6, "n_layers": 2, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 4}
    model = create_model(ModelConfig.model_validate({**shape, "seq_length": 128, "routing_scope": "causal", **changes}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "router" in name or "alpha" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


def test_three_kinds_of_at_least_twenty_different_prompts() -> None:
    assert KINDS == ("arithmetic", "algebra", "geometry")
    every = [prompt for kind in KINDS for prompt in make_prompts(kind)]
    assert all(len(make_prompts(kind)) >= 20 for kind in KINDS)
    assert len(set(every)) == len(every)
    assert not any("{" in prompt for prompt in every)


@pytest.mark.parametrize("scope", ["causal", "document"])
def test_packed_documents_route_as_alone(scope: str) -> None:
    model = make_model(routing_scope=scope)
    documents = [[1, 2, 3, 4, 5, 6, 7], [9], [30, 20, 10]]
    packed = observe(model, documents, tau=0.3)
    assert packed.shape == (2, 3, POSITIONS, 4)
    for index, document in enumerate(documents):
        torch.testing.assert_close(packed[:, index], observe(model, [document], tau=0.3)[:, 0])


def test_last_token_is_among_the_positions() -> None:
    model = make_model()
    tokens = list(range(10, 31))
    _, token_logits = model.features(torch.tensor([tokens]), tau=1.0)
    torch.testing.assert_close(observe(model, [tokens], 1.0)[:, 0, -1], torch.stack(token_logits)[:, 0, -1].detach())


def test_effective_routing_equals_the_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    alpha, token = torch.randn(5, 3, generator=generator), torch.randn(2, 4, 3, generator=generator)
    weights, entropies = effective_routing(alpha, token, tau=0.5)
    full = ((alpha + token[:, :, None]) / 0.5).softmax(-1)  # [groups, positions, F, K]
    torch.testing.assert_close(weights, full.mean(1))
    torch.testing.assert_close(entropies, -(full * full.log()).sum(-1).mean((0, 1)))


def test_entropy_at_temperature_one_is_the_logged_one() -> None:
    generator = torch.Generator().manual_seed(4)
    alpha, token = torch.randn(5, 3, generator=generator), torch.randn(1, 8, 3, generator=generator)
    _, entropies = effective_routing(alpha, token, tau=1.0)
    torch.testing.assert_close(entropies.mean(), dynamic_entropy(alpha, token))


def test_shapes_and_cut_prompts() -> None:
    model = make_model(seq_length=16, n_activations=3)
    routing = collect(list(analyze_layers(model, ByteTokenizer(), stack_alpha(model), tau=0.2)))
    prompts = len(make_prompts("algebra"))
    assert routing.prompt_logits.shape == (3, prompts, 2, 3)
    assert routing.weights.shape == (3, 2, 2, 6, 3)
    assert routing.entropy.shape == routing.effective_entropy.shape == (2, 6)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(3, 2, 2, 6))
    assert (routing.effective_entropy.mean() < routing.entropy.mean()).item()


def test_halves_are_the_first_and_second_half_of_a_kind() -> None:
    model = make_model()
    alpha = stack_alpha(model)
    routing = collect(list(analyze_layers(model, ByteTokenizer(), alpha, tau=0.5)))
    prompts = make_prompts("geometry")
    observed = observe(model, [list(prompt.encode()) for prompt in prompts[len(prompts) // 2 :]], tau=0.5)
    expected, _ = effective_routing(alpha[1], observed[1].reshape(1, -1, 4), tau=0.5)
    torch.testing.assert_close(routing.weights[2, 1, 1], expected[0])


def test_sensitivity_ignores_what_all_activations_share() -> None:
    common = torch.randn(3, 4, 2, 1, generator=torch.Generator().manual_seed(5)).expand(-1, -1, -1, 4)
    torch.testing.assert_close(gate_sensitivity(common), torch.zeros(2), atol=1e-6, rtol=0)
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1] = torch.tensor([1.0, -1.0])
    torch.testing.assert_close(gate_sensitivity(logits), torch.tensor([0.5]))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), n_activations=st.integers(1, 6))
def test_shift_is_a_share(seed: int, n_activations: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 3, 7, n_activations, generator=generator).mul(3).softmax(-1)
    shift = routing_shift(first, second)
    assert shift.shape == (3,)
    assert ((shift >= 0) & (shift <= 1 + 1e-6)).all()
    torch.testing.assert_close(shift, routing_shift(second, first))
    assert routing_shift(first, first).tolist() == [0, 0, 0]


def test_shift_between_opposite_kinds_is_whole_and_within_them_nothing() -> None:
    weights = torch.zeros(3, 2, 1, 5, 2)
    weights[0, ..., 0] = 1
    weights[1:, ..., 1] = 1
    shifts = shifts_between_kinds(weights)
    assert {pair: shift.item() for pair, shift in shifts.items()} == {
        "arithmetic / algebra": 1,
        "arithmetic / geometry": 1,
        "algebra / geometry": 0,
    }
    assert shift_within_kinds(weights).item() == 0
