import math
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from polyglu.data.chat import encode_prompt
from polyglu.errors import PolygluError
from polyglu.evaluation.model_wrapper import HarnessModel
from polyglu.evaluation.scoring import rolling_requests
from polyglu.inference import Inference

PAIRS = [
    ("Question: 3 + 4 =\nAnswer:", " 7\n#### 7"),
    ("Question: 3 + 4 =\nAnswer:", " 8"),
    ("Question: 12", " + 9 =\nAnswer: 21"),
    ("", "Question: 7"),
    ("Quest", "ion"),
    ("Question: 20 + ", "15"),
    ("Question: " + "9 + " * 40, "9"),
    ("Question: 3 + 4 =\nAnswer:", " 7\n#### 9"),
]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def harness(opened: Inference, batch_size: int | None = 4, chat: bool = False, **options: Any) -> HarnessModel:
    return HarnessModel(opened.model, opened.tokenizer, opened.tau, batch_size, chat, **options)


def plain_score(opened: Inference, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One request, one row, one position at a time."""
    tokens = (context + continuation)[-(opened.model.config.seq_length + 1) :]
    with torch.inference_mode():
        logits = opened.model(torch.tensor([tokens[:-1]]), tau=opened.tau)[0].double()
    total, greedy = 0.0, True
    for offset, token in enumerate(reversed(continuation), start=1):
        total += float(logits[-offset].log_softmax(0)[token])
        greedy &= int(logits[-offset].argmax()) == token
    return total, greedy


def test_log_likelihoods_equal_a_plain_loop_at_any_batch_size(opened: Inference) -> None:
    model = harness(opened)
    expected = []
    for context, continuation in PAIRS:
        whole = opened.tokenizer.encode(context + continuation)
        n_context = len(opened.tokenizer.encode(context.rstrip()))
        n_context = min(n_context, len(whole) - 1)
        left = whole[:n_context] or [opened.tokenizer.eos_id]
        expected.append(plain_score(opened, left, whole[n_context:]))
    for batch_size in (1, 3, 8, None):
        model = harness(opened, batch_size)
        found = model.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
        for (log_likelihood, is_greedy), (wanted, greedy) in zip(found, expected, strict=True):
            assert log_likelihood == pytest.approx(wanted, abs=1e-4)
            assert is_greedy == greedy
    assert [greedy for _, greedy in expected[:2]] == [True, False]
    assert all(math.isfinite(value) for value, _ in expected)


def test_rolling_windows_predict_each_token_once(opened: Inference) -> None:
    text = " ".join(f"Question: {number} + {number + 1} =" for number in range(40))
    tokens = opened.tokenizer.encode(text)
    longest = opened.model.config.seq_length
    windows = rolling_requests(tokens, opened.tokenizer.eos_id, longest)
    assert [token for window in windows for token in window.targets] == tokens
    assert len(windows) > 2 and all(len(window.input_ids) <= longest for window in windows)
    expected = sum(
        plain_score(opened, list(window.input_ids[: 1 - len(window.targets) or None]), list(window.targets))[0]
        for window in windows
    )
    for batch_size in (1, 5):
        found = harness(opened, batch_size).loglikelihood_rolling(instances("loglikelihood_rolling", [(text,), ("",)]))
        assert found == pytest.approx([expected, 0.0], abs=1e-3)


def test_a_continuation_longer_than_the_model_is_refused(opened: Inference) -> None:
    with pytest.raises(PolygluError, match="seq_length is 64"):
        harness(opened).loglikelihood(instances("loglikelihood", [("a", "b " * 80)]), disable_tqdm=True)


def test_generation_stops_and_does_not_depend_on_the_batch(opened: Inference) -> None:
    prompts = ["Question: 3 + 4 =\nAnswer:", "Question: 12 + 9 =\nAnswer:", "Question: 6 + 31 =\nAnswer:", ""]
    settings = {"until": ["####", "Question:"], "max_gen_toks": 20}
    requests = instances("generate_until", [(prompt, settings) for prompt in prompts])
    answers = harness(opened, 1).generate_until(requests)
    assert answers[:3] == [" 7\n", " 21\n", " 37\n"]
    assert harness(opened, 4).generate_until(requests) == answers
    # Without a stop string, the end-of-document token ends it.
    free = harness(opened).generate_until(instances("generate_until", [(prompts[0], {"max_gen_toks": 40})]))
    assert free == [" 7\n#### 7"]


def test_drawn_answers_depend_on_the_request_and_the_seed_alone(opened: Inference) -> None:
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 3.0}
    prompts = ["Question: 3 + 4 =\nAnswer:", "Quest", "", "Question: 12", "Quest", "Quest"]
    requests = instances("generate_until", [(prompt, drawn) for prompt in prompts])
    answers = harness(opened, 1).generate_until(requests)
    for batch_size in (2, 8, None):
        assert harness(opened, batch_size).generate_until(requests) == answers
    assert len({answers[1], answers[4], answers[5]}) == 3  # asked again, an answer is drawn anew
    assert harness(opened).generate_until(requests[3:4]) == answers[3:4]  # whatever else is asked
    assert harness(opened, seed=1).generate_until(requests) != answers
    likeliest = instances("generate_until", [(prompt, drawn | {"top_k": 1}) for prompt in prompts])
    greedy = instances("generate_until", [(prompt, {"until": [], "max_gen_toks": 8}) for prompt in prompts])
    assert harness(opened).generate_until(likeliest) == harness(opened).generate_until(greedy) != answers


def test_an_answer_that_no_stop_string_ends_has_max_gen_toks_tokens(opened: Inference) -> None:
    model = harness(opened)
    settings = {"until": ["never this"], "max_gen_toks": 5}
    [answer] = model.generate_until(instances("generate_until", [("Question: 3 + 4 =\nAnswer:", settings)]))
    assert answer == " 7\n#### 7"[: len(answer)] and len(model.tok_encode(answer)) == 5


def test_greedy_repeats_run_once(opened: Inference) -> None:
    tokens: list[int] = []
    hook = opened.model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: tokens.append(inputs[0].numel()))
    settings = {"until": [], "max_gen_toks": 3}
    answers = harness(opened).generate_until(instances("generate_until", [("Quest", settings)] * 3))
    hook.remove()
    assert len(set(answers)) == 1 and tokens == [len(opened.tokenizer.encode("Quest")), 1, 1]


def test_where_an_answer_ends_the_next_begins(opened: Inference) -> None:
    """All prompts with the same settings are one stream: none waits for the slowest of a batch."""
    passes: list[int] = []
    hook = opened.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    # Tokens are drawn nearly at random, and common letters end an answer: their lengths differ much.
    settings = {"until": ["e", "a"], "max_gen_toks": 32, "do_sample": True, "temperature": 100.0}
    requests = instances("generate_until", [("Quest " * n, settings) for n in range(12, 0, -1)])
    alone = []
    for request in requests:
        passes.clear()
        harness(opened).generate_until([request])
        alone.append(len(passes))
    passes.clear()
    harness(opened, 2).generate_until(requests)
    hook.remove()
    assert len(passes) < sum(map(max, zip(alone[::2], alone[1::2], strict=True)))


def test_chat_prompts_carry_the_special_tokens(opened: Inference) -> None:
    model = harness(opened, chat=True)
    messages = [{"role": "user", "content": "12 + 9 ="}]
    prompt = model.apply_chat_template(messages)
    assert model.tok_encode(prompt) == encode_prompt(messages, opened.tokenizer)
    assert model.generate_until(instances("generate_until", [(prompt, {"until": []})])) == ["21\n#### 21"]
    # In plain prompts, text that spells a special token stays text.
    assert opened.tokenizer.im_start_id not in harness(opened).tok_encode(prompt)


def test_long_prompts_keep_their_end_and_are_reported(opened: Inference, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "Question: 6 + 31 =\n" * 9 + "Question: 12 + 9 =\nAnswer:"
    settings = {"until": ["\n"], "max_gen_toks": 256}
    long, _ = harness(opened).generate_until(instances("generate_until", [(prompt, settings), ("Quest", settings)]))
    kept = opened.tokenizer.encode(prompt)[-32:]
    new = harness(opened).generate_until(instances("generate_until", [(opened.tokenizer.decode(kept), settings)]))
    assert opened.tokenizer.encode(opened.tokenizer.decode(kept)) == kept
    assert [long] == new
    assert "1 of 2 prompts were cut" in caplog.text


def test_cut_prompts_are_counted_for_each_task(opened: Inference) -> None:
    model = harness(opened)
    long = ("Question: " + "9 + " * 60, " 9")
    requests = instances("loglikelihood", [long, long, ("a", "b")])
    for request, task in zip(requests, ("one", "two", "two"), strict=True):
        request.task_name = task
    model.loglikelihood(requests)
    assert model.cut == {"one": 1, "two": 1}
    settings = {"until": ["\n"], "max_gen_toks": 4}
    prompts = instances("generate_until", [(long[0], settings)])
    prompts[0].task_name = "two"
    model.generate_until(prompts)
    assert model.cut == {"one": 1, "two": 2}


def test_unknown_generation_settings_are_refused(opened: Inference) -> None:
    with pytest.raises(PolygluError, match="num_beams"):
        harness(opened).generate_until(instances("generate_until", [("a", {"until": [], "num_beams": 4})]))


def test_no_room_for_an_answer_is_refused(opened: Inference) -> None:
    with pytest.raises(PolygluError, match="max_gen_toks is 0"):
        harness(opened).generate_until(instances("generate_until", [("a", {"until": [], "max_gen_toks": 0})]))


def test_prompts_of_a_batch_run_together(opened: Inference) -> None:
    passes: list[int] = []
    hook = opened.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    harness(opened, 4).loglikelihood(instances("loglikelihood", PAIRS[:4]), disable_tqdm=True)
    assert len(passes) == 1
    passes.clear()
    settings = {"until": [], "max_gen_toks": 3}
    prompts = [(prompt, settings) for prompt, _ in (PAIRS[0], PAIRS[2], PAIRS[4], PAIRS[5])]
    harness(opened, 4).generate_until(instances("generate_until", prompts))
    hook.remove()
    assert len(passes) == 3  # one a new token
