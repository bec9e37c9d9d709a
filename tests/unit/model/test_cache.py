import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_tokens as tokens
from models import sharp_model

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.cache import Cache, slots_within
from polyglu.model.config import FeedForward, RoutingParts, RoutingScope

TAU = 0.4
LIMIT = 24


def make_model(ffn: FeedForward = "polyglu", scope: RoutingScope = "causal") -> PolychromaticLM:
    return sharp_model(n_q_heads=4, n_kv_heads=2, seq_length=LIMIT, routing_scope=scope, ffn=ffn)


MODELS = {ffn: make_model(ffn) for ffn in ("polyglu", "swiglu")}
STEPS = ("native", "plain", "static")
"""C++ between the products; PyTorch; PyTorch with the shapes that a CUDA graph would have."""


def make_cache(model: PolychromaticLM, slots: int, step: str) -> Cache:
    cache = Cache(model, TAU, slots, LIMIT, static=step == "static")
    assert (cache.native is not None) == (step != "static")  # a compiler is needed: the others would be tested twice
    if step == "plain":
        cache.native = None
    return cache


def whole(model: PolychromaticLM, row: list[int]) -> torch.Tensor:
    """Logits after a row, without cache."""
    with torch.inference_mode():
        return model(torch.tensor([row]), tau=TAU)[0, -1]


def check(model: PolychromaticLM, rows: list[list[int]], logits: torch.Tensor) -> None:
    expected = torch.stack([whole(model, row) for row in rows])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("ffn", MODELS)
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), steps=st.integers(1, 12))
def test_cached_logits_are_those_of_the_whole_row_at_every_position(
    ffn: FeedForward, step: str, lengths: list[int], steps: int
) -> None:
    model = MODELS[ffn]
    rows = [tokens(length, seed) for seed, length in enumerate(lengths)]
    cache = make_cache(model, len(rows), step)
    check(model, rows, cache.prefill(rows, range(len(rows))))
    for n in range(steps):
        new = tokens(len(rows), 100 + n)
        rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
        check(model, rows, cache.step(new))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("ffn", MODELS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_slots_are_freed_moved_and_filled_again(ffn: FeedForward, step: str, data: st.DataObject) -> None:
    """Whatever happened in a slot before, and wherever a row was moved to."""
    model, slots = MODELS[ffn], 4
    cache, rows = make_cache(model, slots, step), list[list[int]]()
    for event in range(8):
        if len(rows) < slots and (not rows or data.draw(st.booleans(), "fill")):
            added = [tokens(data.draw(st.integers(1, 7)), 10 * event + n) for n in range(slots - len(rows))]
            check(model, added, cache.prefill(added, range(len(rows), slots)))
            rows += added
        elif data.draw(st.booleans(), "free"):
            slot, last = data.draw(st.integers(0, len(rows) - 1)), len(rows) - 1
            cache.free(slot)
            if slot < last:
                cache.move(last, slot)
                rows[slot] = rows[last]
            rows.pop()
        else:
            new = tokens(len(rows), 1000 + event)
            rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
            check(model, rows, cache.step(new))


def test_a_row_up_to_the_longest_position() -> None:
    model = MODELS["polyglu"]
    rows = [tokens(LIMIT - 1, 0), tokens(1, 1)]
    cache = Cache(model, TAU, 2, LIMIT)
    cache.prefill(rows, [1, 0])  # in any order
    rows = [[*rows[1], 5], [*rows[0], 6]]
    check(model, rows, cache.step([5, 6]))
    with pytest.raises(ValueError, match="a row has 24 positions already"):
        cache.step([1, 2])
    assert cache.lengths == [2, LIMIT]


@pytest.mark.parametrize("step", STEPS)
def test_what_a_row_leaves_does_not_reach_the_next_one(step: str) -> None:
    model = MODELS["polyglu"]
    cache = make_cache(model, 4, step)
    rows = [tokens(9, seed) for seed in range(3)]
    cache.prefill([*rows, tokens(9, 3)], range(4))
    for kept in (cache.keys, cache.values, cache.totals):  # a row of numbers that are none
        kept[:, 3, :9] = torch.nan
    cache.free(3)
    cache.step([4, 5, 6])  # of rounded shapes, which run the free slot too
    short = tokens(2, 4)
    cache.prefill([short], [3])
    logits = cache.step([7, 8, 9, 1])
    check(model, [*([*row, 4 + n, 7 + n] for n, row in enumerate(rows)), [*short, 1]], logits)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model = MODELS["polyglu"]
    rows = [tokens(5, 0), tokens(9, 1), tokens(2, 2)]
    together, alone = Cache(model, TAU, 3, LIMIT), Cache(model, TAU, 1, LIMIT)
    together.prefill(rows, [0, 1, 2])
    alone.prefill(rows[:1], [0])
    for token in (4, 40):
        torch.testing.assert_close(together.step([token, 3, 9])[:1], alone.step([token]), rtol=1e-4, atol=1e-3)


def test_nothing_is_copied_that_grows_with_the_cache() -> None:
    cache = Cache(MODELS["polyglu"], TAU, 3, LIMIT)
    cache.prefill([tokens(4, 0), tokens(2, 1)], [0, 1])
    places = cache.keys.data_ptr(), cache.values.data_ptr(), cache.totals.data_ptr()
    cache.step([1, 2])
    assert places == (cache.keys.data_ptr(), cache.values.data_ptr(), cache.totals.data_ptr())
    assert cache.lengths == cache.positions.tolist() == [5, 3, 0]


def test_a_frozen_mean_stays_the_prompts() -> None:
    model = make_model(scope="document")
    caches = {frozen: Cache(model, TAU, 1, LIMIT, frozen) for frozen in (True, False)}
    prompt = tokens(4, 0)
    for cache in caches.values():
        check(model, [prompt], cache.prefill([prompt], [0]))
    before = caches[True].totals.clone()
    frozen, running = (caches[kind].step([7]) for kind in (True, False))
    assert torch.equal(caches[True].totals, before) and caches[True].counts.tolist() == [4]
    assert not torch.equal(caches[False].totals, before) and caches[False].counts.tolist() == [5]
    exact = whole(model, [*prompt, 7])
    assert not torch.allclose(frozen[0], exact, atol=1e-3) and not torch.allclose(frozen, running, atol=1e-3)


def test_under_autocast_keys_and_values_are_kept_in_its_dtype() -> None:
    model, rows = MODELS["polyglu"], [tokens(4, 0), tokens(6, 1)]
    exact = Cache(model, TAU, 2, LIMIT)
    exact.prefill(rows, [0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        cache = Cache(model, TAU, 2, LIMIT)
        cache.prefill(rows, [0, 1])
        logits = cache.step([3, 4])
        assert slots_within(model, 10**6, LIMIT) == 10**6 // (2 * 2 * 2 * 8 * 2 * LIMIT)
    expected = exact.step([3, 4])
    assert cache.keys.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert float((logits - expected).norm() / expected.norm()) < 0.1


def test_slots_fill_the_bytes_they_are_given() -> None:
    model = MODELS["polyglu"]
    of_slot = 2 * 2 * 2 * 8 * 4 * LIMIT  # keys and values, layers, heads, width, fp32, positions
    assert [slots_within(model, n, LIMIT) for n in (1, of_slot, 3 * of_slot - 1, 3 * of_slot)] == [1, 1, 2, 3]
    cache = Cache(model, TAU, 3, LIMIT)
    assert cache.keys.nbytes + cache.values.nbytes == 3 * of_slot


@pytest.mark.parametrize("routing", ["static", "dynamic"])
def test_models_that_route_by_one_part_alone(routing: RoutingParts) -> None:
    model = sharp_model(seq_length=LIMIT, routing_scope="causal", routing=routing)
    cache, row = Cache(model, TAU, 1, LIMIT), tokens(5, 1)
    assert (cache.native is None) == (routing == "static")
    check(model, [row], cache.prefill([row], [0]))
    for new in tokens(6, 2):
        row = [*row, new]
        check(model, [row], cache.step([new]))
