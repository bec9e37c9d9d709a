import pytest
import torch
from models import sharp_model

from polyglu.interpretability import statistics
from polyglu.interpretability.neurotransmitter_maps import stack_alpha
from polyglu.interpretability.text_analysis import (
    TextAnalysis,
    analyze_texts,
    described,
    kinds_in_words,
    numbered,
    of_largest_variance,
    to_json,
    variance_in_words,
)
from polyglu.interpretability.texts import Texts


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 199)
    monkeypatch.setattr(statistics, "BOOTSTRAPS", 49)


def analysis_of(bounds: tuple[tuple[int, int], ...], tau: float = 0.5) -> TextAnalysis:
    """Of a model on kinds of text, each of random tokens between two bounds."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.randint(low, high, (10, 12), generator=generator) for low, high in bounds])
    labels = torch.arange(len(bounds)).repeat_interleave(10)
    names = ("a", "b", "c")[: len(bounds)]
    model = sharp_model(routing_scope="causal")
    return analyze_texts(model, Texts(names, tokens, labels, dict.fromkeys(names, 0)), stack_alpha(model), tau)


def test_kinds_of_other_tokens_differ_and_the_sentence_says_which_do_not() -> None:
    found = analysis_of(((0, 5), (0, 5), (40, 45)))
    assert found.corrected[0] == 2 / 200 and found.corrected[1] == found.kinds.p_value[1] > 0.05
    assert found.corrected_pairs["a", "b"] > 0.05 >= found.corrected_pairs["a", "c"]
    sentence = kinds_in_words(found)
    assert "between these kinds of text in layer 0 (permutation" in sentence and sentence.endswith(
        "no difference is shown between a and b."
    )
    written = to_json(found)
    assert written["pairs"]["a / b"]["p"] == found.pairs["a", "b"].p_value.item()
    assert written["kinds"]["p_holm"] == found.corrected.tolist()


def test_two_samples_of_one_kind_do_not_differ() -> None:
    sentence = kinds_in_words(analysis_of(((0, 50), (0, 50))))
    assert sentence.startswith("A difference of routing between the kinds of text is not shown in any layer")


def test_kinds_without_any_spread_are_told_as_such() -> None:
    found = analysis_of(((3, 4), (40, 41)))
    assert "Documents of one kind do not vary at all in layers 0 and 1, so F is infinite" in kinds_in_words(found)
    assert to_json(found)["kinds"]["pseudo_f"] == [None, None]


def test_each_kind_weighs_the_same_and_examples_are_first_documents() -> None:
    found = analysis_of(((0, 5), (40, 45)))
    shares = torch.stack([layer.document_shares for layer in found.layers])  # [L, n, K]
    torch.testing.assert_close(found.shares.estimate, shares.mean(1))
    assert (found.shares.low <= found.shares.estimate).all() and (found.shares.high <= 1).all()
    torch.testing.assert_close(found.examples[1].mean(0)[0], found.layers[0].document_shares[10], atol=0.1, rtol=0)
    assert found.examples.shape == (2, 12, 2, 4)


def test_variance_is_at_most_that_of_hard_choices() -> None:
    soft, hard = (of_largest_variance(analysis_of(((0, 50), (0, 50)), tau)) for tau in (100.0, 1e-3))
    assert (soft < 0.1).all() and ((hard > 0.9) & (hard <= 1 + 1e-5)).all()
    assert "of the variance of the routing weights" in variance_in_words(analysis_of(((0, 50), (0, 50)))).lower()


def test_numbers_in_words() -> None:
    assert numbered("layer", [3]) == "layer 3"
    assert numbered("layer", [0, 1]) == "layers 0 and 1"
    assert numbered("layer", [0, 2, 3, 4, 7]) == "layers 0, 2 to 4 and 7"


def test_what_is_not_finite_is_null() -> None:
    interval = statistics.t_interval(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 1.0]), 0)
    assert described(interval)[0] == {"estimate": 1.0, "low": None, "high": None}
    assert described(interval)[1]["estimate"] is None
