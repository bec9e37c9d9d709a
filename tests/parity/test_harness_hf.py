"""The harness's stock ``hf`` model on an exported checkpoint gives the scores and answers of our own adapter."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import TEXTS, Exported
from lm_eval.evaluator import evaluate

from polyglu.evaluation.model_wrapper import HarnessModel
from polyglu.evaluation.task_loading import load_tasks
from polyglu.inference import open_for_inference

pytest.importorskip("accelerate", reason="the harness's hf model needs the package accelerate")
from lm_eval.models.huggingface import HFLM  # noqa: E402

KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "answer": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "four"], do_sample: false, max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    questions = [*TEXTS, "one", "2 + 2 =", "two three one two four three three one"]
    rows = [{"q": question, "choices": [" four", " 1", " two three"]} for question in questions]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in KINDS.items():
        text = f"task: {name}\n" + DATA.replace("FILE", str(folder / "rows.jsonl")) + kind
        (folder / f"{name}.yaml").write_text(text)
    return load_tasks(list(KINDS), Path(tempfile.mkdtemp(dir=folder)), include_path=folder)


def answers(model: Any, tasks: dict[str, Any]) -> dict[str, list[Any]]:
    """What a model answered to each request of each task, in the order of the samples."""
    samples = evaluate(model, tasks, bootstrap_iters=0)["samples"]
    ordered = {name: sorted(kept, key=lambda sample: sample["doc_id"]) for name, kept in samples.items()}
    return {name: [sample["resps"] for sample in kept] for name, kept in ordered.items()}


@pytest.mark.filterwarnings("ignore")  # the harness's own
@pytest.mark.parametrize(("scope", "batch_size"), [("causal", 1), ("causal", 4), ("document", 1), ("sequence", 1)])
def test_stock_model_agrees(
    exported: Exported, pair: Callable[..., Any], tasks: dict[str, Any], scope: str, batch_size: int
) -> None:
    checkpoint, folder = exported(routing_scope=scope)
    opened = open_for_inference(checkpoint)
    ours = answers(HarnessModel(opened.model, opened.tokenizer, opened.tau), tasks)
    stock = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=batch_size)
    theirs = answers(stock, tasks)
    assert ours["answer"] == theirs["answer"] and len({str(answer) for answer in ours["answer"]}) > 1
    for task in ("choice", "rolling"):
        numbers, others = (torch.tensor(numbers_of(found[task])) for found in (ours, theirs))
        assert len(numbers) >= 6 and numbers.std() > 1
        torch.testing.assert_close(numbers, others, atol=1e-4, rtol=0)


def numbers_of(responses: list[Any]) -> list[float]:
    """All log-likelihoods in what was answered, and verdicts as 0 or 1."""
    if isinstance(responses, list | tuple):
        return [number for inner in responses for number in numbers_of(inner)]
    return [float(responses)]
