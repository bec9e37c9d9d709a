from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import SHAPE, sharp_model

from polyglu.errors import PolygluError
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import FeedForward
from polyglu.model.generation import (
    Event,
    choose_tokens,
    generate,
    generate_rows,
    next_token_logits,
)
from polyglu.model.packing import groups_of_tokens

TAU = 0.3
PROMPTS = [[3, 1, 4, 1, 5], [17], [2, 6, 5, 3, 5, 8, 9, 7, 9], [33, 20], [7, 40, 1]]


def make_model(scope: str, seq_length: int = 32, ffn: FeedForward = "polyglu") -> PolychromaticLM:
    return sharp_model(seq_length=seq_length, routing_scope=scope, ffn=ffn)


def continue_alone(model: PolychromaticLM, prompt: list[int], n: int) -> list[int]:
    """The plain loop: one prompt, all positions, the likeliest token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(n):
            tokens.append(int(model(torch.tensor([tokens]), tau=TAU)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("scope", "ffn"), [("causal", "polyglu"), ("document", "polyglu"), ("causal", "swiglu"), ("sequence", "geglu")]
)
def test_a_batch_of_any_lengths_equals_the_plain_loop(scope: str, ffn: FeedForward) -> None:
    model = make_model(scope, ffn=ffn)
    expected = [continue_alone(model, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    for max_tokens in (1, 12, 10_000):
        found = generate(model, PROMPTS, max_new_tokens=8, tau=TAU, eos_ids=(), max_tokens=max_tokens)
        assert found == expected
    one_slot = generate(model, PROMPTS, max_new_tokens=8, tau=TAU, eos_ids=(), cache_bytes=1)
    assert one_slot == expected


def test_draws_do_not_depend_on_the_other_rows() -> None:
    model = make_model("causal")
    settings = {"max_new_tokens": 6, "tau": TAU, "eos_ids": (), "temperature": 1.5, "top_p": 0.9}
    together = generate(model, PROMPTS, seed=7, **settings)
    alone = [generate(model, [prompt], seed=7 + row, **settings)[0] for row, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert together == generate(model, PROMPTS, seed=7, **settings)
    assert together == generate(model, PROMPTS, seed=7, max_tokens=9, **settings)
    assert together != generate(model, PROMPTS, seed=8, **settings)


def test_events_are_the_tokens_as_they_come_and_the_ends() -> None:
    model = make_model("causal")
    free = generate(model, PROMPTS, max_new_tokens=8, tau=TAU, eos_ids=())
    end = free[0][3]
    events = list(generate_rows(model, PROMPTS, max_new_tokens=8, tau=TAU, eos_ids=[end]))
    first = islice(generate_rows(model, PROMPTS, max_new_tokens=8, tau=TAU, eos_ids=()), len(PROMPTS))
    assert list(first) == [Event(index, row[0]) for index, row in enumerate(free)]  # before any second one
    assert {event.row for event in events[events.index(Event(0, None)) :]} > {0}  # others go on
    for index, row in enumerate(free):
        expected = row[: row.index(end)] if end in row else row
        assert [event.token for event in events if event.row == index] == [*expected, None]


def test_no_token_is_made_before_it_is_asked_for() -> None:
    model, passes = make_model("causal"), []
    model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    events = generate_rows(model, [[1, 2]], max_new_tokens=5, tau=TAU, eos_ids=())
    assert passes == []
    next(events)
    assert passes == [1]
    assert not torch.is_inference_mode_enabled()
    next(events)
    assert passes == [1, 1]


def test_end_token_ends_only_its_row_and_is_not_returned() -> None:
    model = make_model("causal")
    free = generate(model, PROMPTS, max_new_tokens=8, tau=TAU, eos_ids=())
    end = free[0][3]
    found = generate(model, PROMPTS, max_new_tokens=8, tau=TAU, eos_ids=[end])
    assert found == [row[: row.index(end)] if end in row else row for row in free]
    assert len(found[0]) <= 3 and any(len(row) == 8 for row in found)


def test_stop_rule_ends_a_row_after_the_token_that_fulfils_it() -> None:
    model = make_model("causal")
    free = generate(model, PROMPTS, max_new_tokens=8, tau=TAU, eos_ids=())
    found = generate(model, PROMPTS, max_new_tokens=8, tau=TAU, eos_ids=(), stop=lambda new: len(new) == 3)
    assert found == [row[:3] for row in free]


def test_finished_rows_are_not_run_again_and_a_forward_pass_is_bounded() -> None:
    model = make_model("causal")
    sizes: list[int] = []
    model.embed_tokens.register_forward_hook(lambda _module, inputs, _output: sizes.append(inputs[0].numel()))
    generate(model, [[1, 2], [3] * 9], max_new_tokens=3, tau=TAU, eos_ids=(), stop=lambda new: True)
    assert sizes == [11]
    sizes.clear()
    generate(model, PROMPTS, max_new_tokens=4, tau=TAU, eos_ids=(), max_tokens=14)
    assert max(sizes) <= 14


def passes(model: PolychromaticLM, **settings: Any) -> list[int]:
    """Tokens of each forward pass of a generation."""
    sizes: list[int] = []
    hook = model.embed_tokens.register_forward_hook(lambda _module, inputs, _output: sizes.append(inputs[0].numel()))
    generate(model, PROMPTS, max_new_tokens=4, tau=TAU, eos_ids=(), **settings)
    hook.remove()
    return sizes


def test_each_new_token_is_one_position_of_work() -> None:
    assert passes(make_model("causal")) == [20, 5, 5, 5]
    assert passes(make_model("document")) == [20, 25, 30, 35]  # each token changes the routing of its row
    assert passes(make_model("document"), routing="frozen") == passes(make_model("document"), routing="running")
    assert passes(make_model("document"), routing="running") == [20, 5, 5, 5]
    assert passes(make_model("document", ffn="swiglu")) == [20, 5, 5, 5]


def test_a_row_that_ends_gives_its_slot_to_the_next_prompt_at_once() -> None:
    model = make_model("causal")
    of_slot = 2 * SHAPE["n_layers"] * SHAPE["n_kv_heads"] * SHAPE["head_dim"] * 4 * (9 + 4 - 1)
    # Two slots, prompts of 5, 1, 9, 2 and 3 tokens; the second row ends after two tokens, all others after four.
    free = generate(model, PROMPTS, max_new_tokens=4, tau=TAU, eos_ids=())

    def stop(new: list[int]) -> bool:
        return new == free[1][:2]

    assert not any(stop(row[:2]) for row in (free[0], *free[2:]))
    assert passes(model, cache_bytes=2 * of_slot, stop=stop) == [6, 2, 9, 2, 2, 2, 2, 3, 2, 2, 1]


def test_approximate_routing_is_a_choice_by_name() -> None:
    model = make_model("document")
    settings = {"max_new_tokens": 8, "tau": TAU, "eos_ids": ()}
    exact, frozen, running = (generate(model, PROMPTS, routing=r, **settings) for r in ("exact", "frozen", "running"))
    assert exact == generate(model, PROMPTS, **settings)
    assert [row[0] for row in exact] == [row[0] for row in frozen] == [row[0] for row in running]
    assert exact != frozen and exact != running and frozen != running
    causal = make_model("causal")
    assert generate(causal, PROMPTS, **settings) == generate(causal, PROMPTS, routing="running", **settings)


def test_sequence_scope_cannot_be_packed_by_any_routing() -> None:
    for routing in ("exact", "frozen", "running"):
        with pytest.raises(ValueError, match="scope"):
            generate(make_model("sequence"), PROMPTS, max_new_tokens=1, tau=TAU, eos_ids=(), routing=routing)


def test_nothing_to_do() -> None:
    assert generate(make_model("causal"), [], max_new_tokens=1, tau=TAU, eos_ids=()) == []
    with pytest.raises(ValueError, match="max_new_tokens is 0; expected at least 1"):
        generate(make_model("causal"), PROMPTS, max_new_tokens=0, tau=TAU, eos_ids=())
    for setting in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_k": -1}):
        with pytest.raises(ValueError, match="expected 0 or more, top_p up to 1"):
            generate(make_model("causal"), PROMPTS, max_new_tokens=1, tau=TAU, eos_ids=(), **setting)


def test_rows_end_at_seq_length() -> None:
    model = make_model("causal", seq_length=10)
    found = generate(model, PROMPTS, max_new_tokens=100, tau=TAU, eos_ids=())
    # The last token comes from a full row of 10 positions.
    assert [len(prompt) + len(row) for prompt, row in zip(PROMPTS, found, strict=True)] == [11] * len(PROMPTS)


@pytest.mark.parametrize("prompt", [[], [1] * 11])
def test_prompts_that_cannot_run_are_refused(prompt: list[int]) -> None:
    with pytest.raises(ValueError, match="seq_length"):
        generate(make_model("causal", seq_length=10), [[1], prompt], max_new_tokens=1, tau=TAU, eos_ids=())


def test_sequence_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="scope"):
        next_token_logits(make_model("sequence"), [[1, 2]], TAU)


def test_draws_follow_the_probabilities_and_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    generators = [torch.Generator().manual_seed(row) for row in range(4000)]
    shares = torch.bincount(torch.tensor(choose_tokens(logits, generators, 1.0)), minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    shares = torch.bincount(torch.tensor(choose_tokens(logits, generators, 1.0, 0.7)), minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03)
    assert set(choose_tokens(logits, generators, 1.0, 0.0)) == {0}
    assert set(choose_tokens(logits, generators, 0.0)) == {0}
    shares = torch.bincount(torch.tensor(choose_tokens(logits, generators, 1.0, top_k=2)), minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03)
    assert set(choose_tokens(logits, generators, 1.0, top_k=1)) == {0}
    # Of the two likeliest, the first alone has 0.6 of their mass.
    assert set(choose_tokens(logits, generators, 1.0, 0.6, top_k=2)) == {0}
    fresh = [[torch.Generator().manual_seed(row) for row in range(4000)] for _ in range(2)]
    assert choose_tokens(logits, fresh[0], 1.0, top_k=99) == choose_tokens(logits, fresh[1], 1.0)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-300, 1.0, 1e300, float("inf")])
def test_any_temperature_and_no_logit_that_is_no_number(temperature: float) -> None:
    logits = torch.tensor([[0.5, 3e38, -3e38, -0.0], [1.0, 2.0, 3.0, 4.0]])
    rngs = [torch.Generator().manual_seed(row) for row in range(2)]
    first, second = choose_tokens(logits, rngs, temperature)
    assert first == 1 or temperature > 1
    assert second == 3 or temperature >= 1
    for bad in (torch.nan, torch.inf):
        logits[1, 2] = bad
        with pytest.raises(PolygluError, match="not finite"):
            choose_tokens(logits, rngs, temperature)


@given(
    lengths=st.lists(st.integers(1, 9), max_size=30),
    max_tokens=st.integers(1, 20),
    max_rows=st.none() | st.integers(1, 5),
)
def test_groups_hold_every_row_once_in_order_within_the_bounds(
    lengths: list[int], max_tokens: int, max_rows: int | None
) -> None:
    groups = [list(range(len(lengths))[group]) for group in groups_of_tokens(lengths, max_tokens, max_rows)]
    assert [row for group in groups for row in group] == list(range(len(lengths)))
    for group in groups:
        assert 1 <= len(group) <= (max_rows or len(lengths))
        assert len(group) == 1 or sum(lengths[row] for row in group) <= max_tokens
