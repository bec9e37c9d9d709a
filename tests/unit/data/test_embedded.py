import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyglu.data.embedded import write_embedded_corpus
from polyglu.data.problems import arithmetic, is_held_out, mentions_held_out, other_mathematics
from polyglu.errors import PolygluError
from polyglu.files import sha256

TRAINING = ("math.jsonl", "stem.jsonl", "code.jsonl", "sft.jsonl")
SMALL: dict[str, Any] = dict(n_math=600, n_sft=900, n_test=100, stem_characters=400_000, code_characters=400_000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_embedded_corpus(folder, seed=0, **SMALL)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_test_problem_occurs_in_any_training_text(corpus: Path) -> None:
    """Scan everything that is trained on for each test question and its expression, in either order, however spaced."""
    training = "\n".join((corpus / name).read_text(encoding="utf-8") for name in TRAINING)
    expressions = re.findall(r"(?<!\d)(?=(\d\d)\s*([+\-\u2212\u2013])\s*(\d\d)(?!\d))", training)
    trained = {(first, "+" if sign == "+" else "-", second) for first, sign, second in expressions}
    assert len(trained) > 500
    for row in read(corpus / "arithmetic_test.jsonl"):
        first, sign, second = row["question"].split(": ")[1].split()[:3]
        assert row["question"] not in training
        assert (first, sign, second) not in trained and (second, sign, first) not in trained


def test_held_out_documents_are_not_trained_on(corpus: Path) -> None:
    for name in ("math", "stem", "code"):
        held_out = {row["text"] for row in read(corpus / f"heldout_{name}.jsonl")}
        assert held_out and not held_out.intersection(row["text"] for row in read(corpus / f"{name}.jsonl"))


def test_every_arithmetic_solution_is_right(corpus: Path) -> None:
    for row in read(corpus / "sft.jsonl"):
        user, assistant = row["messages"]
        expression = user["content"].split(": ")[1].removesuffix(" =")
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"].endswith(f"\n#### {eval(expression)}")
        *order, ones, tens = assistant["content"].split("\n")[0].split(", ")
        assert len(order) == ("-" in expression)  # only a difference begins with a comparison
        assert all(eval(comparison) for comparison in order)
        for step in (ones, tens):
            left, right = step.split("=")
            assert eval(re.sub(r"\b0(\d)", r"\1", left)) == int(right)
    for row in read(corpus / "arithmetic_test.jsonl"):
        assert str(eval(row["question"].split(": ")[1].removesuffix(" ="))) == row["answer"]


def test_same_bytes_again_and_others_for_another_seed(corpus: Path, tmp_path: Path) -> None:
    summary = write_embedded_corpus(tmp_path / "same", seed=0, **SMALL)
    other = write_embedded_corpus(tmp_path / "other", seed=10, **{**SMALL, "stem_characters": 1, "code_characters": 1})
    assert summary == json.loads((corpus / "corpus.json").read_text())
    for name, described in summary["files"].items():
        assert sha256(corpus / name) == sha256(tmp_path / "same" / name) == described["sha256"]
    assert other["files"]["sft.jsonl"]["sha256"] != summary["files"]["sft.jsonl"]["sha256"]


def test_sizes(corpus: Path) -> None:
    rows = {path.name: len(read(path)) for path in corpus.glob("*.jsonl")}
    assert rows["math.jsonl"] + rows["heldout_math.jsonl"] == 600
    assert (rows["sft.jsonl"], rows["arithmetic_test.jsonl"]) == (900, 100)
    for name in ("stem", "code"):
        assert 300_000 < sum(len(row["text"]) for row in read(corpus / f"{name}.jsonl")) <= 400_000


@given(st.integers(10, 99), st.sampled_from("+-"), st.integers(10, 99))
def test_split_ignores_the_order(first: int, sign: str, second: int) -> None:
    assert is_held_out(first, sign, second) == is_held_out(second, sign, first)
    for text in (f"x {first} {sign} {second} = y", f"({second}{sign}{first})", f"1 + {first} {sign} {second} - 1."):
        if is_held_out(first, sign, second):
            assert mentions_held_out(text)


def test_problems_are_distinct_and_split() -> None:
    held_out = [problem.question for problem in islice(arithmetic(0, held_out=True), 300)]
    trained = [problem.question for problem in islice(arithmetic(0, held_out=False), 300)]
    assert len({*held_out, *trained}) == 600
    assert all(mentions_held_out(question) for question in held_out)
    assert not any(mentions_held_out(question) for question in trained)


def test_other_problems_end_with_their_answer() -> None:
    for problem in islice(other_mathematics(0), 80):
        assert problem.steps.strip() and problem.document.startswith("Question: ")
        assert re.search(r"\n#### -?[\d.,/]+$", problem.document)
        assert len(problem.document) <= 1000


def test_too_many_problems_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match="distinct test problems, 100,000 were asked for"):
        write_embedded_corpus(
            tmp_path / "new", n_math=10, n_sft=10, n_test=100_000, stem_characters=1, code_characters=1
        )
    assert not (tmp_path / "new").exists()
