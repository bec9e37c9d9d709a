import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from polyglu import files
from polyglu.data.chunks import open_source
from polyglu.data.sources import TextSource
from polyglu.data.tokenize_dataset import main, tokenize_source
from polyglu.data.tokenizer import Tokenizer, train_bpe
from polyglu.errors import PolygluError

CHUNK_TOKENS = 700


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(["the sum of 1 and 2 is 3 "] * 9, 270, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents from shorter than a batch to longer than several chunks, some rows without one."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    lengths = [*(generator.randrange(1, 40) for _ in range(900)), 900, 3, 5]
    generator.shuffle(lengths)
    rows: list[Any] = [{"text": " ".join(str(generator.randrange(1000)) for _ in range(length))} for length in lengths]
    for place, value in ((3, ""), (100, None), (500, 7), (501, "\ud800"), (502, " \n")):
        rows.insert(place, {"text": value})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source_of(text_file: Path, output: Path, **settings: Any) -> TextSource:
    return TextSource(files=(str(text_file),), output=str(output), **settings)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents_of(text_file: Path, tokenizer: Tokenizer) -> list[list[int]]:
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    kept = [text for text in texts if isinstance(text, str) and text.strip() and text != "\ud800"]
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in kept]


def test_all_documents_in_order(text_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = tokenize_source(source_of(text_file, tmp_path / "out"), tokenizer, CHUNK_TOKENS)
    source = open_source(tmp_path / "out")
    documents = documents_of(text_file, tokenizer)
    assert source.read(0, source.n_tokens).tolist() == [token for document in documents for token in document]
    assert manifest["skipped"] == {"empty": 2, "not_text": 2, "lone_surrogate": 1}
    assert manifest["documents"] == len(documents)


@pytest.mark.parametrize("budget", [50, 699, 700, 701, 12_345, 10**9])
def test_budget_ends_with_a_document_and_is_never_exceeded(
    text_file: Path, tokenizer: Tokenizer, tmp_path: Path, budget: int
) -> None:
    tokenize_source(source_of(text_file, tmp_path / "out", max_tokens=budget), tokenizer, CHUNK_TOKENS)
    source = open_source(tmp_path / "out")
    taken: list[int] = []
    for document in documents_of(text_file, tokenizer):
        if len(taken) + len(document) > budget:
            break
        taken += document
    assert source.read(0, source.n_tokens).tolist() == taken
    assert len(taken) <= budget and taken[-1] == tokenizer.eos_id


class Death(BaseException):
    """The process ends between two writes."""


@pytest.mark.parametrize("budget", [None, 15_000])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    text_file: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    whole = source_of(text_file, tmp_path / "whole", max_tokens=budget)
    tokenize_source(whole, tokenizer, CHUNK_TOKENS)
    broken = source_of(text_file, tmp_path / "broken", max_tokens=budget)
    replace, left, deaths = os.replace, 0, 0

    def mortal(*arguments: Any) -> None:
        nonlocal left
        if not left:
            raise Death
        left -= 1
        replace(*arguments)

    monkeypatch.setattr(files.os, "replace", mortal)
    for left in [0, 1, 1, 2, 3, 1, 2, 5, 10**9]:  # noqa: B007  # read by mortal
        try:
            tokenize_source(broken, tokenizer, CHUNK_TOKENS)
        except Death:
            deaths += 1
            with pytest.raises(PolygluError, match="interrupted|holds no tokenised data"):
                open_source(tmp_path / "broken")
    assert deaths == 8
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


def test_continuation_may_begin_at_a_row_without_the_field(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "one"}\n{"body": "x"}\n{"text": "two and more"}\n')
    chunk_tokens, replace, writes = len(tokenizer.encode("one")) + 1, os.replace, 0

    def mortal(*arguments: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == 4:  # manifest, first chunk, manifest, second chunk
            raise Death
        replace(*arguments)

    monkeypatch.setattr(files.os, "replace", mortal)
    with pytest.raises(Death):
        tokenize_source(source_of(text, tmp_path / "out"), tokenizer, chunk_tokens)
    manifest = tokenize_source(source_of(text, tmp_path / "out"), tokenizer, chunk_tokens)
    assert (manifest["documents"], manifest["skipped"]) == (2, {"not_text": 1})


def test_killed_process_continues_with_the_same_bytes(text_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "bpe")
    text = tmp_path / "big.jsonl"
    text.write_text(text_file.read_text() * 20)
    command = [sys.executable, "-m", "polyglu.data.tokenize_dataset", "--files", str(text), "--chunk-tokens", "10000"]
    command += ["--tokenizer", str(tmp_path / "bpe"), "--output"]
    process = subprocess.Popen([*command, str(tmp_path / "broken")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "broken" / "chunk_00002.bin").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(PolygluError, match="interrupted"):
        open_source(tmp_path / "broken")
    subprocess.run([*command, str(tmp_path / "broken")], check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


def test_complete_data_is_left_alone(text_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = source_of(text_file, tmp_path / "out")
    first = tokenize_source(source, tokenizer, CHUNK_TOKENS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert tokenize_source(source, tokenizer, CHUNK_TOKENS) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_settings_are_refused(text_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = source_of(text_file, tmp_path / "out", max_tokens=5000)
    tokenize_source(source, tokenizer, CHUNK_TOKENS)
    other = train_bpe(["quite another text "] * 9, 270, tmp_path / "other")
    with pytest.raises(PolygluError, match="was made with tokenizer"):
        tokenize_source(source, other, CHUNK_TOKENS)
    with pytest.raises(PolygluError, match="chunk_tokens 700, not 800"):
        tokenize_source(source, tokenizer, 800)
    with pytest.raises(PolygluError, match="max_tokens 5000, not 6000"):
        tokenize_source(source.model_copy(update={"max_tokens": 6000}), tokenizer, CHUNK_TOKENS)
    changed = tmp_path / "b.jsonl"
    changed.write_text(text_file.read_text() + "\n")
    with pytest.raises(PolygluError, match="was made with files"):
        tokenize_source(source.model_copy(update={"files": (str(changed),)}), tokenizer, CHUNK_TOKENS)


def test_second_process_on_the_same_folder_is_refused(text_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(PolygluError, match="another process"):
            tokenize_source(source_of(text_file, tmp_path / "out"), tokenizer, CHUNK_TOKENS)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ('{"body": "x", "id": 1}', {}, "no field 'text'; its fields are body, id"),
        ('{"text": "1 2 3 4 5 6"}', {"max_tokens": 3}, "the first document has"),
        ('{"text": ""}', {}, "holds no text in 'text'"),
        ("", {}, "holds no text"),
    ],
)
def test_bad_sources_leave_nothing_behind(
    tokenizer: Tokenizer, tmp_path: Path, row: str, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(row + "\n")
    with pytest.raises(PolygluError, match=message):
        tokenize_source(source_of(tmp_path / "a.jsonl", tmp_path / "out", **settings), tokenizer, CHUNK_TOKENS)
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file_is_refused(text_file: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(PolygluError, match="is a file"):
        tokenize_source(source_of(text_file, text_file), tokenizer, CHUNK_TOKENS)


def test_sources_file(text_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "bpe")
    entries = {name: {"files": [str(text_file)], "output": str(tmp_path / name)} for name in ("math", "code")}
    path = tmp_path / "sources.yaml"
    path.write_text(json.dumps({"tokenizer": str(tmp_path / "bpe"), "chunk_tokens": 500, "sources": entries}))
    main(sources=path, source=["code"])
    assert not (tmp_path / "math").exists()
    main(sources=path, all_sources=True)
    assert open_source(tmp_path / "math").digest == open_source(tmp_path / "code").digest
    with pytest.raises(PolygluError, match="either --all or --source"):
        main(sources=path)
    with pytest.raises(PolygluError, match="no source 'maths'; it has math, code"):
        main(sources=path, source=["maths"])
    with pytest.raises(PolygluError, match="set --max-tokens, --tokenizer there"):
        main(sources=path, all_sources=True, max_tokens=5, tokenizer="other")
    with pytest.raises(PolygluError, match="give --output"):
        main(dataset="a/b")
    with pytest.raises(PolygluError, match="give either 'dataset'"):
        main(output=tmp_path / "new")
    with pytest.raises(PolygluError, match="max_tokens"):
        main(files=[text_file], output=tmp_path / "new", max_tokens=-1)
