import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_tokens as tokens
from models import sharp_model

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.conversation import Conversation
from polyglu.model.generation import generate

TAU = 0.4
LIMIT = 24
MODELS = {
    "causal": sharp_model(n_q_heads=4, n_kv_heads=2, seq_length=LIMIT, routing_scope="causal"),
    "static": sharp_model(seq_length=LIMIT, routing_scope="document", routing="static"),
    "swiglu": sharp_model(seq_length=LIMIT, ffn="swiglu"),
}


def check(model: PolychromaticLM, row: list[int], logits: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = model(torch.tensor([row]), tau=TAU)[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("kind", "native"), [("causal", True), ("causal", False), ("static", False), ("swiglu", True)])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_turn_equals_reading_it_anew(kind: str, native: bool, data: st.DataObject) -> None:
    """Whatever it shares with what was read: all of it, a part, nothing; and wherever an interrupt came."""
    model = MODELS[kind]
    conversation, row = Conversation(model, TAU), list[int]()
    if not native:
        conversation.cache.native = None
    for turn in range(4):
        row = row[: data.draw(st.integers(0, min(len(row), LIMIT - 6)), "kept")]
        row += tokens(data.draw(st.integers(0 if row else 1, 6), "new"), turn)
        known, sizes = conversation.known(row), list[int]()
        counted = model.embed_tokens.register_forward_hook(lambda _module, ids, _out: sizes.append(ids[0].numel()))  # noqa: B023
        check(model, row, conversation.prefill([row], [0]))
        counted.remove()
        assert sizes[0] == len(row) - known
        for new in tokens(data.draw(st.integers(0, LIMIT - len(row)), "steps"), 50 + turn):
            row = [*row, new]
            check(model, row, conversation.step([new]))
            conversation.free(0)
        if len(row) < LIMIT and data.draw(st.booleans(), "interrupt"):
            interrupt(conversation, [*row, 1], data.draw(st.booleans(), "while reading"))


def interrupt(conversation: Conversation, row: list[int], reading: bool) -> None:
    """Stop in the last layer, where the layers before have read the token and this one has not."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    model = conversation.cache.model
    place = model.layers[-1].mlp.down_proj if reading or conversation.cache.native is None else model.embed_tokens
    hook = place.register_forward_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            conversation.prefill([row], [0]) if reading else conversation.step([row[-1]])
    finally:
        hook.remove()


def test_only_what_is_new_is_read() -> None:
    conversation = Conversation(MODELS["causal"], TAU)
    assert conversation.known([1, 2, 3]) == 0
    conversation.prefill([[1, 2, 3]], [0])
    conversation.step([4])
    prompts = ([1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 9, 4], [7], [1])
    assert [conversation.known(prompt) for prompt in prompts] == [4, 3, 2, 0, 0]


def test_generation_goes_on_in_it() -> None:
    model, conversation = MODELS["causal"], Conversation(MODELS["causal"], TAU)
    settings = {"max_new_tokens": 5, "tau": TAU, "eos_ids": ()}
    row = [3, 1, 4]
    for _ in range(3):
        [new] = generate(model, [row], **settings, decoder=conversation)
        assert [new] == generate(model, [row], **settings)
        assert conversation.read == [*row, *new[:-1]]
        row = [*row, *new, 9]


def test_numbers_that_are_none_do_not_outlive_their_turn() -> None:
    conversation = Conversation(MODELS["causal"], TAU)
    conversation.cache.native = None
    conversation.prefill([[1, 2, 3, 4]], [0])
    for kept in (conversation.cache.keys, conversation.cache.values):
        kept[:, :, 2:] = torch.nan
    conversation.prefill([[1, 2, 5]], [0])
    check(MODELS["causal"], [1, 2, 5, 6], conversation.step([6]))
