import json
import os
from pathlib import Path
from typing import Any

import pytest
from task_data import MATH, STEM, gsm8k, math, mmlu, write_all, write_rows

from polyglu.errors import PolygluError
from polyglu.evaluation.local_data import needed_columns, split_files
from polyglu.evaluation.run_eval import EvalSettings, evaluate_checkpoint
from polyglu.evaluation.suites import SUITES
from polyglu.evaluation.task_loading import HARNESS_TASKS, load_tasks

GUIDE = ("gsm8k", "minerva_math", "minerva_math500")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def loaded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    scratch = tmp_path_factory.mktemp("scratch")
    return load_tasks([*SUITES["paper"], *GUIDE], scratch, data_dir=data)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise AssertionError(f"asked the hub for {path}")

    monkeypatch.setattr("polyglu.evaluation.task_loading.resolve_revision", refuse)


def prompt(loaded: dict[str, Any], name: str, index: int = 0) -> tuple[str, Any]:
    task = loaded["tasks"][name]
    document = task.eval_docs[index]
    return task.doc_to_text(document), task.doc_to_target(document)


def test_the_harness_s_own_definitions_read_local_files(loaded: dict[str, Any]) -> None:
    tasks = loaded["tasks"]
    assert len(tasks) == 9 + 19 + 1 + 7 + 1 and all(len(task.eval_docs) == 2 for task in tasks.values())
    assert set(loaded["group_map"]["minerva_math"]) == {name for name in tasks if name.startswith("minerva_math_")}
    assert len(loaded["group_map"]["mmlu_stem"]) == 19
    assert prompt(loaded, "gsm8k") == ("Question: 3 + 1 =\nAnswer:", "One more.\n#### 4")
    assert tasks["gsm8k"].VERSION == 3.0 and tasks["gsm8k"].config.num_fewshot == 5
    assert [ensemble.name for ensemble in tasks["gsm8k"]._filters] == ["strict-match", "flexible-extract"]
    assert prompt(loaded, "hellaswag") == ("Sums: A child adds 3 and 1. It", 1)
    assert prompt(loaded, "mmlu_anatomy") == ("0 + 1 =\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:", 1)
    assert prompt(loaded, "lambada_openai") == ("After 3 comes", " 4")
    assert prompt(loaded, "arc_challenge") == ("Question: 3 + 1?\nAnswer:", 1)
    assert tasks["mmlu_anatomy"].config.num_fewshot == 5 and tasks["minerva_math_algebra"].config.num_fewshot == 4


@pytest.mark.parametrize("name", ["minerva_math_algebra", "minerva_math500"])
def test_a_right_answer_in_another_form_is_right(loaded: dict[str, Any], name: str) -> None:
    task = loaded["tasks"][name]
    document = task.eval_docs[1]
    assert document["answer"] == r"\frac{4}{3}"
    answer = "So. Final Answer: The final answer is ${}$. I hope it is correct."
    for said, right in ((r"\frac{4}{3}", 1), (r"\frac{8}{6}", 1), (r"\frac{5}{3}", 0)):
        assert task.process_results(document, [answer.format(said)]) == {"exact_match": right, "math_verify": right}


def test_everything_runs_from_local_files_to_results(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process alone: forked ones may wait forever, for locks of its threads or for the signal to end."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was forked"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "")
    settings = EvalSettings(
        run.checkpoint, tasks=GUIDE, suite="paper", data_dir=data, device="cpu", num_fewshot=0,
        perplexity={"math": run.data / "held.jsonl"},
    )  # fmt: skip
    found = evaluate_checkpoint(settings, tmp_path / "eval.json")
    results = found["results"]
    assert {*SUITES["paper"], *GUIDE} <= results.keys()
    assert results["gsm8k"]["num_fewshot"] == 0 and results["gsm8k"]["version"] == "3.0"
    assert results["minerva_math"]["math_verify,none"] == 0.0 and len(results["mmlu_stem"]["tasks"]) == 19
    assert results["lambada_openai"]["higher_is_better"] == {"perplexity": False, "acc": True}
    rows = {row["name"]: row for row in found["published"]}
    assert rows["piqa"]["published"] == 58.87 and rows["boolq"]["published"] is rows["boolq"]["difference"] is None
    assert rows["piqa"]["difference"] == pytest.approx(100 * results["piqa"]["acc,none"] - 58.87)
    assert rows["math"]["difference"] == pytest.approx(found["perplexity"]["math"]["perplexity"] - 3.56)
    assert rows["code"]["value"] is None
    assert json.loads((tmp_path / "eval.json").read_text()) == found


@pytest.mark.parametrize(
    "layout",
    [
        "gsm8k/{}.jsonl",
        "gsm8k/{}.jsonl.gz",
        "gsm8k/main/{}/0000.parquet",
        "openai/gsm8k/main/{}-00000-of-00001.parquet",
    ],
)
def test_layouts_of_a_task(tmp_path: Path, layout: str) -> None:
    for split, n in (("train", 6), ("test", 1)):
        write_rows(tmp_path / "data" / layout.format(split), [gsm8k(index) for index in range(n)])
    found = load_tasks(["gsm8k"], tmp_path / "scratch", data_dir=tmp_path / "data")
    assert prompt(found, "gsm8k")[0] == "Question: 0 + 1 =\nAnswer:"


def test_one_file_for_all_subjects_of_math(tmp_path: Path) -> None:
    rows = [math(index) | {"type": name} for index, name in enumerate(MATH.values())]
    write_rows(tmp_path / "minerva_math/test.parquet", rows)
    found = load_tasks(["minerva_math"], tmp_path / "scratch", data_dir=tmp_path)
    assert prompt(found, "minerva_math_num_theory")[0] == "Problem:\nWhat is $4/3$?\n\nSolution:"
    assert all(len(task.eval_docs) == 1 for task in found["tasks"].values())


def files_of(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def test_parts_of_a_split_are_complete_or_told(tmp_path: Path) -> None:
    two = files_of(tmp_path / "two", "test-00001-of-00002.parquet", "test-00000-of-00002.parquet", "latest.parquet")
    assert [path.name[:10] for path in split_files(two, "test")] == ["test-00000", "test-00001"]
    (two / "test-00000-of-00002.parquet").unlink()
    with pytest.raises(PolygluError, match="two has 1 of 2 parts of the split 'test'"):
        split_files(two, "test")
    both = files_of(tmp_path / "both", "test.jsonl", "test.parquet")
    with pytest.raises(PolygluError, match=r"several files .*\(test.jsonl, test.parquet\)"):
        split_files(both, "test")
    assert split_files(files_of(tmp_path / "none", "train.jsonl", "test.csv", "contest.jsonl"), "test") == []


def bad(folder: Path, name: str, rows: list[dict[str, Any]] | str, train: int = 5) -> Path:
    path = folder / name
    write_rows(path.with_name("train.jsonl"), [gsm8k(index) for index in range(train)])
    path.write_text(rows) if isinstance(rows, str) else write_rows(path, rows)
    return path


@pytest.mark.parametrize(
    ("rows", "train", "said"),
    [
        ([{"question": "a", "reply": "b"}], 5, "has the columns 'question', 'reply'; task 'gsm8k' reads 'answer', "),
        ([{"question": "a", "answer": None}], 5, "column 'answer', which task 'gsm8k' reads, has rows without one"),
        ([gsm8k(1), {"question": "a"}], 5, "column 'answer', which task 'gsm8k' reads, has rows without one"),
        ('{"question": "a"\n', 5, "cannot be read"),
        ('["question"]\n', 5, "line 1 is not an object"),
        ('{"question": 1, "answer": "a"}\n{"question": "b", "answer": "a"}\n', 5, "cannot be read"),
        ("", 5, "has the columns none"),
        ([gsm8k(1)], 4, "has 4 rows of task 'gsm8k', whose prompts take 5 examples"),
    ],
)
def test_bad_data_are_one_sentence(tmp_path: Path, rows: Any, train: int, said: str) -> None:
    bad(tmp_path, "gsm8k/test.jsonl", rows, train)
    with pytest.raises(PolygluError, match=f"{tmp_path}/gsm8k/.*{said}"):
        load_tasks(["gsm8k"], tmp_path / "scratch", data_dir=tmp_path)


def test_missing_data_say_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        PolygluError, match=r"no folder mmlu_abstract_algebra or mmlu_stem or mmlu with the split 'test'"
    ):
        load_tasks(["mmlu_stem"], tmp_path / "scratch", data_dir=tmp_path)
    with pytest.raises(PolygluError, match="--data-dir .*nowhere is not a folder"):
        load_tasks(["gsm8k"], tmp_path / "scratch", data_dir=tmp_path / "nowhere")
    write_rows(tmp_path / "gsm8k/test.jsonl", [gsm8k(1)])
    with pytest.raises(
        PolygluError, match="examples for its prompts from the split 'train', which .*pass --num-fewshot 0"
    ):
        load_tasks(["gsm8k"], tmp_path / "scratch", data_dir=tmp_path)
    assert load_tasks(["gsm8k"], tmp_path / "scratch", data_dir=tmp_path, num_fewshot=0)["tasks"]


def test_a_shared_file_must_tell_its_subjects(tmp_path: Path) -> None:
    for split in ("test", "dev"):
        write_rows(tmp_path / f"mmlu/{split}.jsonl", [mmlu(1)])
    with pytest.raises(PolygluError, match="rows of several tasks and has no column subject or type"):
        load_tasks(["mmlu_stem"], tmp_path / "scratch", data_dir=tmp_path)
    rows = [mmlu(index) | {"subject": subject} for subject in STEM[1:] for index in range(5)]
    for split in ("test", "dev"):
        write_rows(tmp_path / f"mmlu/{split}.jsonl", rows)
    with pytest.raises(PolygluError, match="no rows of 'abstract_algebra'"):
        load_tasks(["mmlu_stem"], tmp_path / "scratch", data_dir=tmp_path)


def test_columns_follow_from_the_definition() -> None:
    hellaswag = str(HARNESS_TASKS / "hellaswag/utils.process_docs")
    read = needed_columns({"process_docs": hellaswag, "doc_to_text": "{{query}}"})
    assert read == {"ctx_a", "ctx_b", "activity_label", "endings", "label"}
    winogrande = str(HARNESS_TASKS / "winogrande/preprocess_winogrande.doc_to_choice")
    assert needed_columns({"doc_to_choice": winogrande}) == {"sentence", "option1", "option2"}
    template = "{{a.text[0]}} {% if b is defined %}{{b}}{% endif %} {% for c in d %}{{c}}{% endfor %}"
    assert needed_columns({"doc_to_text": template, "doc_to_target": "label", "doc_to_choice": ["x"]}) == {
        "a",
        "d",
        "label",
    }
    assert needed_columns({"doc_to_text": "Answer:", "doc_to_target": 3}) == set()


def test_unknown_suite_is_told(run: Any) -> None:
    with pytest.raises(PolygluError, match="unknown suite 'papr'; there is paper"):
        evaluate_checkpoint(EvalSettings(run.checkpoint, suite="papr"))
