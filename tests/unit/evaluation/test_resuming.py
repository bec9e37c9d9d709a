"""An evaluation that is stopped, at any moment, loses nothing: run again it goes on, and ends with the same results."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from polyglu.errors import PolygluError
from polyglu.evaluation import answers, model_wrapper, run_eval
from polyglu.evaluation.answers import KeptAnswers, answers_file
from polyglu.evaluation.run_eval import EvalSettings, evaluate_checkpoint
from polyglu.evaluation.samples import samples_folder
from polyglu.inference import Inference, open_for_inference
from polyglu.model.generation import Event, generate_rows

CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}, cache_dir: "{cache}"}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: ["7\\n", "21\\n", "14\\n####", "35"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
N_ANSWERS = 5 + 5 * 4 + 5
"""Generated, choices, documents of the perplexity; two of the six problems ask the same question."""


@pytest.fixture
def settings(run: Any, tmp_path: Path) -> EvalSettings:
    (tmp_path / "tasks").mkdir()
    text = CHOICES.format(file=run.data / "arithmetic_test.jsonl", cache=tmp_path / "cache")
    (tmp_path / "tasks" / "choices.yaml").write_text(text)
    return EvalSettings(
        run.checkpoint,
        tasks=["demo_arithmetic", "choices"],
        perplexity={"held": run.data / "held.jsonl"},
        data_dir=run.data,
        include_path=tmp_path / "tasks",
        device="cpu",
        batch_size=3,
    )


def read(output: Path) -> dict[str, Any]:
    """Results, but for the times."""
    results: dict[str, Any] = json.loads(output.read_text())
    return {key: value for key, value in results.items() if key not in ("seconds", "finished_at")}


def rows(output: Path) -> list[dict[str, Any]]:
    return [row for line in answers_file(output).read_text().splitlines() if "key" in (row := json.loads(line))]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass of the models that are opened from now on."""
    seen: list[int] = []

    def opened(*arguments: Any) -> Inference:
        found = open_for_inference(*arguments)
        found.model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].numel()))
        return found

    monkeypatch.setattr(run_eval, "open_for_inference", opened)
    return seen


def test_a_run_that_was_stopped_takes_over_what_it_had(
    settings: EvalSettings, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = tmp_path / "a" / "eval.json", tmp_path / "b" / "eval.json"
    evaluate_checkpoint(settings, whole)
    n_whole = len(passes)

    def until_the_third(*arguments: Any, **options: Any) -> Iterator[Event]:
        ends = 0
        for event in generate_rows(*arguments, **options):
            yield event
            ends += event.token is None
            if ends == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_wrapper, "generate_rows", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            evaluate_checkpoint(settings, output)
    assert not output.exists()
    assert sum(row["task"] == "demo_arithmetic" for row in rows(output)) == 3
    passes.clear()
    evaluate_checkpoint(settings, output)
    assert 0 < len(passes) < n_whole
    assert read(output) == read(whole)
    passes.clear()
    evaluate_checkpoint(replace(settings, batch_size=None), output)
    assert passes == []  # nothing is left to do, whatever the batch
    evaluate_checkpoint(settings, output)
    assert read(output) == read(whole)


def killed_at_append(n: int, part: float, work: Callable[[], object]) -> bool:
    """Do the work in a process that kills itself at its n-th append, of which a part is written; was it killed?"""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    append, count = answers.append_rows, 0

    def deadly(path: Path, added: Any) -> None:
        nonlocal count
        count += 1
        if count < n:
            return append(path, added)
        text = "".join(json.dumps(row) + "\n" for row in added)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text[: int(part * len(text))])
        os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(answers, "append_rows", deadly), suppress(BaseException):
        work()
    os._exit(0)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_results(
    settings: EvalSettings, tmp_path: Path
) -> None:
    output, whole = tmp_path / "a" / "eval.json", tmp_path / "b" / "eval.json"
    evaluate_checkpoint(settings, whole)
    deaths = 0
    for part in cycle((0.0, 0.4, 1.0)):
        if not killed_at_append(4, part, lambda: evaluate_checkpoint(settings, output)):
            break
        deaths += 1
        assert not output.exists()
    assert deaths >= 3
    assert read(output) == read(whole)
    texts = [{path.name: path.read_text() for path in samples_folder(place).iterdir()} for place in (output, whole)]
    assert texts[0] == texts[1] and texts[0].keys() == {"demo_arithmetic.jsonl", "choices.jsonl"}
    assert len(rows(output)) == len({row["key"] for row in rows(output)}) == N_ANSWERS


def test_a_longer_limit_takes_over_what_a_shorter_one_has(settings: EvalSettings, tmp_path: Path) -> None:
    output, whole = tmp_path / "a" / "eval.json", tmp_path / "b" / "eval.json"
    evaluate_checkpoint(replace(settings, limit=2), output)
    short = rows(output)
    evaluate_checkpoint(settings, output)
    evaluate_checkpoint(settings, whole)
    assert len(short) == 2 + 2 * 4 + 5 and rows(output)[: len(short)] == short and len(rows(output)) == N_ANSWERS
    assert read(output)["results"] == read(whole)["results"]


def test_answers_of_another_checkpoint_are_never_used(
    settings: EvalSettings, tmp_path: Path, passes: list[int], run: Any
) -> None:
    output, alone = tmp_path / "a" / "eval.json", tmp_path / "b" / "eval.json"
    evaluate_checkpoint(settings, output)
    n_whole = len(passes)
    stored = torch.load(run.checkpoint, weights_only=True)
    stored["model"]["embed_tokens.weight"] += 0.3
    torch.save(stored, tmp_path / "other.pt")
    (tmp_path / "tokenizer").symlink_to(run.folder / "tokenizer")
    other = replace(settings, checkpoint=tmp_path / "other.pt")
    evaluate_checkpoint(other, output)
    assert len(passes) >= 2 * n_whole
    evaluate_checkpoint(other, alone)
    assert read(output) == read(alone)
    passes.clear()
    evaluate_checkpoint(settings, output)
    assert passes == []  # those of the first are still there


def test_fresh_forgets_and_a_second_run_is_refused(settings: EvalSettings, tmp_path: Path, passes: list[int]) -> None:
    output, few = tmp_path / "eval.json", replace(settings, tasks=["demo_arithmetic"], limit=1)
    evaluate_checkpoint(few, output)
    once = [*passes]
    evaluate_checkpoint(few, output, fresh=True)
    assert passes == once * 2
    before = output.read_bytes()
    with closing(KeptAnswers(answers_file(output), {})), pytest.raises(PolygluError, match="another process"):
        evaluate_checkpoint(few, output)
    assert output.read_bytes() == before


def test_samples_are_there_for_reading(settings: EvalSettings, tmp_path: Path) -> None:
    output = tmp_path / "eval.json"
    folder = samples_folder(output)
    folder.mkdir()
    (folder / "earlier.jsonl").write_text("{}\n")
    evaluate_checkpoint(settings, output)
    assert {path.name for path in folder.iterdir()} == {"demo_arithmetic.jsonl", "choices.jsonl"}
    generated, chosen = (
        [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()] for task in settings.tasks
    )
    assert generated[5]["doc"] == {"question": "3 + 4 =", "answer": "8"} and generated[5]["doc_id"] == 5
    assert (generated[5]["output"], generated[5]["target"], generated[5]["correct"]) == (" 7\n#### 7", "8", False)
    assert chosen[0]["prompt"] == "Question: 3 + 4 =\nAnswer:" and chosen[0]["choices"][1] == " 21\n"
    assert len(chosen) == 6 and [len(output) for output in chosen[0]["output"]] == [2] * 4
    assert chosen[0]["output"][0][0] > -1 and chosen[0]["correct"] is True
    assert read(output)["samples"]["choices"][0] == {key: chosen[0][key] for key in chosen[0] if key != "doc"}
