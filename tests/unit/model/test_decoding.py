"""Batched, cached, refilled decoding of any model against the pass over whole rows, by the reference's layers."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SHAPE, random_tokens, sharp_model

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.cache import Cache
from polyglu.model.generation import generate

TAU = 0.4
NEAR = 2e-4
"""Of the largest logit: two that are as near may change places by rounding."""
SHAPES = st.fixed_dictionaries(
    {
        "n_activations": st.integers(1, 6),
        "n_kv_heads": st.integers(1, 3),
        "head_dim": st.sampled_from([2, 4, 6, 10, 16, 24]),
        "n_layers": st.integers(1, 3),
        "d_model": st.sampled_from([5, 16, 33, 48]),
        "d_ff": st.sampled_from([1, 7, 24, 64]),
        "seq_length": st.integers(6, 20),
        "ffn": st.sampled_from(["polyglu", "polyglu", "polyglu", "swiglu", "reglu"]),
    }
)


def check_row(
    model: PolychromaticLM, prompt: list[int], new: list[int], limit: int, eos: set[int], stop: tuple[int, int]
) -> None:
    """Each token is the likeliest one, and the row ends where it must and not before."""
    row = [*prompt, *new][: model.config.seq_length]
    with torch.inference_mode():
        logits = model(torch.tensor([row]), tau=TAU)[0, len(prompt) - 1 :]
    near = logits >= logits.max(-1, keepdim=True).values - NEAR * float(logits.abs().max())
    assert all(near[place, token] for place, token in enumerate(new))
    assert not eos & set(new)
    ends = [stops(new[: n + 1], stop) for n in range(len(new))]
    assert not any(ends[:-1])
    if not any(ends) and len(new) < limit and len(prompt) + len(new) <= model.config.seq_length:
        assert any(near[len(new), token] for token in eos)


def stops(new: list[int], stop: tuple[int, int]) -> bool:
    """A rule that looks at all of a row."""
    return sum(new) % stop[0] == stop[1]


@pytest.mark.parametrize("kernels", ["native", "chunked"])
@settings(max_examples=25, deadline=None)
@given(data=st.data(), shape=SHAPES, groups=st.integers(1, 3))
def test_any_model_decodes_as_the_reference_reads(
    kernels: str, data: st.DataObject, shape: dict[str, Any], groups: int
) -> None:
    """With C++ and with PyTorch between the products."""
    shape |= {"n_q_heads": groups * shape["n_kv_heads"], "routing_scope": "causal"}
    model, reference = (sharp_model(**shape, kernels=each) for each in (kernels, "reference"))
    lengths = data.draw(st.lists(st.integers(1, model.config.seq_length), min_size=1, max_size=6), "lengths")
    prompts = [random_tokens(length, seed) for seed, length in enumerate(lengths)]
    limit, eos = data.draw(st.integers(1, 9), "limit"), data.draw(st.sets(st.integers(0, 49), max_size=9), "eos")
    stop = data.draw(st.tuples(st.integers(2, 9), st.integers(0, 9)), "stop")
    bounds = {
        "max_rows": data.draw(st.none() | st.integers(1, 4), "rows"),
        "max_tokens": data.draw(st.integers(1, 40), "tokens"),
        "cache_bytes": data.draw(st.sampled_from([1, 10_000, 10**9]), "bytes"),
    }
    assert (Cache(model, TAU, 1, 9).native is not None) == (kernels == "native")
    rule = lambda new: stops(new, stop)  # noqa: E731
    found = generate(model, prompts, max_new_tokens=limit, tau=TAU, eos_ids=eos, stop=rule, **bounds)
    for prompt, new in zip(prompts, found, strict=True):
        check_row(reference, prompt, new, limit, eos, stop)


def test_the_check_sees_what_is_wrong() -> None:
    model, prompt = sharp_model(seq_length=20, routing_scope="causal"), [3, 1, 4]
    [new] = generate(model, [prompt], max_new_tokens=4, tau=TAU, eos_ids=())
    never = (1000, 1)
    check_row(model, prompt, new, 4, set(), never)
    for wrong, limit, eos, stop in (
        ([*new[:2], (new[2] + 1) % SHAPE["vocab_size"], new[3]], 4, set(), never),
        (new[:3], 4, set(), never),
        (new, 4, {new[1]}, never),
        (new, 4, set(), (sum(new[:2]) + 1, sum(new[:2]))),
    ):
        with pytest.raises(AssertionError):
            check_row(model, prompt, wrong, limit, eos, stop)
