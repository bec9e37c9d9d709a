import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import typer
from models import sharp_model
from typer.testing import CliRunner

from polyglu.errors import PolygluError
from polyglu.evaluation import run_eval, task_loading
from polyglu.evaluation.run_eval import EvalSettings, evaluate_checkpoint
from polyglu.evaluation.task_loading import load_tasks
from polyglu.files import sha256
from polyglu.inference import Inference

CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}, cache_dir: "{cache}"}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: ["8", "7", "21", "14", "35", "37"]
doc_to_target: "{{{{[8, 7, 21, 14, 35, 37].index(answer | int)}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

app = typer.Typer()
app.command()(run_eval.main)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def settings_for(run: Any, **changes: Any) -> EvalSettings:
    return replace(EvalSettings(run.checkpoint, tasks=["demo_arithmetic"], data_dir=run.data, device="cpu"), **changes)


def test_generated_answers_are_scored_exactly(run: Any) -> None:
    results = evaluate_checkpoint(settings_for(run))
    # The last problem's answer in the file is wrong: five of six.
    assert results["results"]["demo_arithmetic"]["exact_match,strict-match"] == pytest.approx(5 / 6)
    assert results["results"]["demo_arithmetic"]["exact_match_stderr,strict-match"] > 0
    assert results["results"]["demo_arithmetic"]["n_samples"] == 6
    sample = results["samples"]["demo_arithmetic"][0]
    assert sample["prompt"] == "Question: 3 + 4 =\nAnswer:" and sample["target"] == "7"
    assert sample["output"] == " 7\n#### 7" and sample["metrics"] == {"exact_match": 1.0}
    assert [sample["correct"] for sample in results["samples"]["demo_arithmetic"]] == [True] * 5


def test_conversations_are_scored_for_a_fine_tuned_checkpoint(run: Any) -> None:
    results = evaluate_checkpoint(settings_for(run, tasks=["demo_arithmetic_chat"], apply_chat_template=True))
    assert results["results"]["demo_arithmetic_chat"]["exact_match,strict-match"] == pytest.approx(5 / 6)
    sample = results["samples"]["demo_arithmetic_chat"][0]
    assert sample["prompt"] == "<|im_start|>user\n3 + 4 =<|im_end|>\n<|im_start|>assistant\n"


def test_scores_are_the_same_at_any_batch_size(run: Any, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    text = CHOICE_TASK.format(file=run.data / "arithmetic_test.jsonl", cache=tmp_path / "cache")
    (tasks / "choice.yaml").write_text(text)
    settings = settings_for(
        run, tasks=["demo_arithmetic", "local_choice"], include_path=tasks, perplexity={"held": run.data / "held.jsonl"}
    )
    single, *others = [evaluate_checkpoint(replace(settings, batch_size=size)) for size in (1, 8, None)]
    assert single["results"]["local_choice"]["acc,none"] > 0.5
    for other in others:
        assert other["results"] == single["results"]
        held, expected = ({**found["perplexity"]["held"]} for found in (other, single))
        each, of_single = held.pop("each"), expected.pop("each")
        assert held == pytest.approx(expected, rel=1e-5) and each["sha256"] == of_single["sha256"]
        assert each["nats"] == pytest.approx(of_single["nats"], rel=1e-5)


def test_few_shot_examples_and_defaults(run: Any, tmp_path: Path) -> None:
    text = CHOICE_TASK.format(file=run.data / "arithmetic_test.jsonl", cache=tmp_path / "cache")
    (tmp_path / "mmlu.yaml").write_text(text.replace("local_choice", "mmlu_stem") + "fewshot_split: test\n")
    (tmp_path / "choice.yaml").write_text(text + "fewshot_split: test\n")

    def shots(name: str, number: int, **changes: Any) -> int:
        folder = tmp_path / f"{name}{number}"
        return int(load_tasks([name], folder, include_path=tmp_path, **changes)["tasks"][name].config.num_fewshot)

    assert shots("local_choice", 0) == 0
    assert shots("mmlu_stem", 0) == 5
    assert shots("mmlu_stem", 1, num_fewshot=2) == shots("local_choice", 1, num_fewshot=2) == 2
    results = evaluate_checkpoint(settings_for(run, tasks=["local_choice"], include_path=tmp_path, num_fewshot=2))
    assert results["results"]["local_choice"]["num_fewshot"] == 2
    assert results["samples"]["local_choice"][0]["prompt"].count("Question:") == 3


def test_examples_and_system_instruction_are_turns_of_the_conversation(run: Any, tmp_path: Path) -> None:
    text = CHOICE_TASK.format(file=run.data / "arithmetic_test.jsonl", cache=tmp_path / "cache")
    text = text.replace("Question: {{question}}\\nAnswer:", "{{question}}") + "fewshot_split: test\n"
    (tmp_path / "choice.yaml").write_text(text)
    settings = settings_for(run, tasks=["local_choice"], include_path=tmp_path, num_fewshot=2, limit=1)
    results = evaluate_checkpoint(replace(settings, apply_chat_template=True, system_instruction="Add."))
    turns = results["samples"]["local_choice"][0]["prompt"].split("<|im_start|>")
    assert [turn.partition("\n")[0] for turn in turns[1:]] == ["system", *["user", "assistant"] * 3]
    assert turns[1] == "system\nAdd.<|im_end|>\n"
    assert turns[2].endswith(" =<|im_end|>\n") and turns[3].removesuffix("<|im_end|>\n") != turns[3]
    assert turns[-2:] == ["user\n3 + 4 =<|im_end|>\n", "assistant\n"]
    plain = evaluate_checkpoint(replace(settings, system_instruction="Add."))
    assert plain["samples"]["local_choice"][0]["prompt"].startswith("Add.")


def test_command_line_writes_whole_results(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "results" / "eval.json"
    arguments = (
        f"--checkpoint {run.checkpoint} --tasks demo_arithmetic demo_arithmetic_chat --output {output} --limit 2 "
    )
    arguments += f"--data-dir {run.data} --perplexity first={run.data}/held.jsonl second={run.data}/held.jsonl"
    outcome = CliRunner().invoke(app, arguments.split())
    assert outcome.exit_code == 0, outcome.output
    results = json.loads(output.read_text())
    assert set(results["results"]) == {"demo_arithmetic", "demo_arithmetic_chat"}
    assert results["results"]["demo_arithmetic"]["n_samples"] == 2
    assert results["perplexity"]["first"] == results["perplexity"]["second"]
    assert results["perplexity"]["first"]["perplexity"] < 20
    assert results["checkpoint"]["sha256"] == sha256(run.checkpoint)
    assert (results["checkpoint"]["step"], results["checkpoint"]["tau"]) == (500, 0.6)
    assert results["settings"]["limit"] == 2 and results["settings"]["perplexity"]["first"].endswith("held.jsonl")
    assert {"python", "torch", "transformers", "lm_eval", "polyglu"} <= set(results["versions"])
    assert results["routing_scope"]["scope"] == "causal"
    assert {file.name for file in output.parent.iterdir()} == {"eval.json", "eval.answers.jsonl", "eval.samples"}


def test_repeated_runs_agree(run: Any) -> None:
    first, second = (evaluate_checkpoint(settings_for(run, limit=3)) for _ in range(2))
    for key in ("seconds", "finished_at"):
        del first[key], second[key]
    assert first == second


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": []}, "nothing to evaluate"),
        ({"data_dir": Path("nowhere")}, "arithmetic_test.jsonl, which does not exist; check --data-dir"),
        ({"data_dir": None}, "--data-dir"),
        ({"include_path": Path("nowhere")}, "--include-path nowhere"),
        ({"perplexity": {"held": Path("nowhere.jsonl")}}, "nowhere.jsonl does not exist"),
        ({"checkpoint": Path("nowhere.pt")}, "nowhere.pt does not exist"),
        ({"tokenizer": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_bad_settings_are_one_sentence(run: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PolygluError, match=said):
        evaluate_checkpoint(settings_for(run, **changes))


def test_unknown_task_names_the_near_ones_and_writes_nothing(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "eval.json"
    arguments = f"--checkpoint {run.checkpoint} --tasks gsm8kk --output {output}".split()
    outcome = CliRunner().invoke(app, arguments)
    assert isinstance(outcome.exception, PolygluError)
    assert "unknown task 'gsm8kk'; did you mean gsm8k" in str(outcome.exception)
    assert not list(tmp_path.iterdir())


def hub_task(folder: Path) -> Path:
    text = CHOICE_TASK.format(file="x", cache="y").replace("dataset_path: json", "dataset_path: someone/some-data")
    lines = [line for line in text.splitlines() if "dataset_kwargs" not in line]
    (folder / "hub.yaml").write_text("\n".join(lines).replace("local_choice", "hub_choice"))
    return folder


def test_no_network_names_the_data_set(tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match=r"someone/some-data.*hub.*cannot be reached"):
        load_tasks(["hub_choice"], tmp_path / "scratch", include_path=hub_task(tmp_path))


def test_a_gated_data_set_says_where_to_accept_its_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_args: Any, **_kwargs: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'someone/some-data' is a gated dataset on the Hub.")

    monkeypatch.setattr(task_loading, "resolve_revision", lambda _path: "0" * 40)
    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(PolygluError, match="https://huggingface.co/datasets/someone/some-data and set HF_TOKEN"):
        load_tasks(["hub_choice"], tmp_path / "scratch", include_path=hub_task(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        "--output {folder}",
        "--output {folder}/eval.json --perplexity held",
        "--output {folder}/eval.json --batch-size 0",
        "--output {folder}/eval.json --batch-size some",
    ],
)
def test_bad_arguments_are_found_before_any_work(run: Any, tmp_path: Path, arguments: str) -> None:
    line = f"--checkpoint {run.checkpoint} --tasks demo_arithmetic {arguments.format(folder=tmp_path)}"
    outcome = CliRunner().invoke(app, line.split())
    assert isinstance(outcome.exception, PolygluError)
    assert not list(tmp_path.iterdir())


def test_two_sources_of_one_name_are_refused(run: Any, tmp_path: Path) -> None:
    held = f"{run.data}/held.jsonl"
    line = f"--checkpoint {run.checkpoint} --output {tmp_path}/eval.json --perplexity a={held} --perplexity a={held}"
    outcome = CliRunner().invoke(app, line.split())
    assert "has two sources 'a'" in str(outcome.exception) and not list(tmp_path.iterdir())


def test_nothing_is_left_outside(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = set(cache.rglob("*.arrow"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    evaluate_checkpoint(settings_for(run, limit=1))
    assert set(cache.rglob("*.arrow")) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "ahead"),
    [({}, True), ({"routing": "static"}, False), ({"n_activations": 1}, False), ({"ffn": "swiglu"}, False)],
)
def test_only_routing_by_the_text_sees_ahead(opened: Inference, settings: dict[str, Any], ahead: bool) -> None:
    note = run_eval._scope_note(opened._replace(model=sharp_model(**settings), routing_scope="sequence"))
    assert ("not those of a language" in note) == ahead
