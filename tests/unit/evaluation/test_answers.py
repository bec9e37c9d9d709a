import json
import logging
import os
import resource
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from polyglu.errors import EXIT_INTERRUPTED, PolygluError, run_command
from polyglu.evaluation.answers import Answers, Asker, KeptAnswers, Question, answers_file, stoppable

MODEL: dict[str, Any] = {"checkpoint": "a" * 64, "tau": 0.5}
QUESTIONS = [Question(Asker("sums", "1.0", number), {"prompt_ids": [number], "until": ["é"]}) for number in range(4)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "results" / "eval.answers.jsonl"


def keep(file: Path, *texts: str, model: dict[str, Any] = MODEL, fresh: bool = False) -> None:
    with closing(KeptAnswers(file, model, fresh)) as kept:
        kept.add(zip(QUESTIONS, texts, strict=False))


def found(file: Path, model: dict[str, Any] = MODEL) -> list[Any]:
    with closing(KeptAnswers(file, model)) as kept:
        return kept.known(QUESTIONS, "test")


def test_answers_are_there_at_once_and_for_the_next_run(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(KeptAnswers(file, MODEL)) as kept:
        assert kept.known(QUESTIONS, "test") == [None] * 4
        kept.add([(QUESTIONS[0], "sieben 日本")])
        assert "sieben" in file.read_text()  # while the run lives
        kept.add([(QUESTIONS[2], [-0.1, True])])
        assert kept.known(QUESTIONS, "test") == ["sieben 日本", None, [-0.1, True], None]
    with caplog.at_level(logging.INFO):
        assert found(file) == ["sieben 日本", None, [-0.1, True], None]
    assert f"test: 2 of 4 answers are taken over from {file}" in caplog.text
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0]["model"] == MODEL
    assert [(row["task"], row["doc"], row["answer"]) for row in rows[1:]] == [
        ("sums", 0, "sieben 日本"),
        ("sums", 2, [-0.1, True]),
    ]


def test_an_answer_is_kept_once(file: Path) -> None:
    keep(file, "a", "b")
    size = file.stat().st_size
    keep(file, "x", "b")
    assert file.stat().st_size == size and found(file) == ["a", "b", None, None]


@pytest.mark.parametrize("change", [{"checkpoint": "b" * 64}, {"tau": 0.4}, {"dtype": "torch.bfloat16"}])
def test_answers_of_another_model_or_setting_are_not_used(file: Path, change: dict[str, Any]) -> None:
    keep(file, "a", "b")
    assert found(file, MODEL | change) == [None] * 4
    keep(file, "other", model=MODEL | change)
    assert found(file) == ["a", "b", None, None]  # and both may lie in one file
    assert found(file, MODEL | change) == ["other", None, None, None]


def test_what_a_key_depends_on() -> None:
    asker, content = QUESTIONS[0]
    assert Question(asker._replace(doc=9), content).key == QUESTIONS[0].key
    others = [
        Question(asker._replace(task="other"), content),
        Question(asker._replace(version="2.0"), content),
        Question(asker, content | {"prompt_ids": [0, 1]}),
        Question(asker, content | {"until": []}),
    ]
    assert len({question.key for question in (QUESTIONS[0], *others)}) == 5


def test_a_torn_end_is_cut_off_and_the_file_goes_on(file: Path) -> None:
    keep(file, "a", "b", "c")
    whole = file.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole), 7):
        file.write_bytes(whole[:end])
        assert found(file) == ["a", "b", None, None]
    keep(file, "a", "b", "c")
    assert file.read_bytes() == whole


def test_damaged_lines_are_told_and_passed_over(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep(file, "seven", "b", "c")
    lines = file.read_text().splitlines()
    for damage in (
        "not json",
        "[1]",
        "{}",
        '{"seal": 3}',
        lines[1].replace("seven", "eight"),
        lines[1][:-9] + '"}',
        "",
    ):
        caplog.clear()
        file.write_text("\n".join([lines[0], damage, *lines[2:]]) + "\n")
        assert found(file) == [None, "b", "c", None]
        assert "1 damaged line" in caplog.text and "computed again" in caplog.text
    file.write_bytes(b"\xff\xfe\x00" * 50)
    assert found(file) == [None] * 4
    keep(file, "a")
    assert found(file)[0] == "a"


def test_fresh_forgets(file: Path) -> None:
    keep(file, "a", "b")
    keep(file, "new", fresh=True)
    assert found(file) == ["new", None, None, None]


def test_two_runs_at_once_are_refused(file: Path) -> None:
    with closing(KeptAnswers(file, MODEL)), pytest.raises(PolygluError, match=r"another process .* another --output"):
        KeptAnswers(file, MODEL)
    keep(file, "a")  # a run that has ended holds nothing


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(PolygluError, match=r"results .*is a file"):
        KeptAnswers(tmp_path / "results/eval.answers.jsonl", MODEL)


def test_a_full_disk_is_an_error_and_leaves_whole_lines(file: Path) -> None:
    keep(file, "a")
    before = file.read_bytes()
    kept = KeptAnswers(file, MODEL)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left"):
            kept.add([(QUESTIONS[1], "b" * 100)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
        kept.close()
    assert file.read_bytes() == before


def test_nothing_is_kept_without_a_file() -> None:
    answers = Answers()
    answers.add([(QUESTIONS[0], "a")])
    assert answers.known(QUESTIONS, "test") == [None] * 4
    answers.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_sentence(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with stoppable(answers_file(tmp_path / "eval.json")):
            os.kill(os.getpid(), number)
            raise AssertionError("went on")

    with pytest.raises(SystemExit) as raised:
        run_command(work)
    assert raised.value.code == EXIT_INTERRUPTED
    said = capsys.readouterr().err
    assert said.startswith("interrupted: ") and f"{tmp_path}/eval.answers.jsonl" in said and said.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) == before
