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
from polyglu.data.sources import Shard, TextSource
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
    return TextSource(files=(str(text_file),), output=str(output), **{"max_bad_share": 1.0, **settings})


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
    assert manifest["bad_records"] == {"empty": 2, "not_text": 2, "lone_surrogate": 1}
    assert manifest["rows"] == len(documents) + 5
    records = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(record["row"], record["kind"]) for record in records] == [
        (3, "empty"), (100, "not_text"), (500, "not_text"), (501, "lone_surrogate"), (502, "empty"),
    ]  # fmt: skip
    assert {record["file"] for record in records} == {str(text_file)}
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
    assert (manifest["documents"], manifest["bad_records"]) == (2, {"not_text": 1})


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
        ('{"text": "1 2 3 4 5 6"}', {"max_tokens": 3}, "the first document of .* more tokens than max_tokens 3"),
        ('{"text": ""}', {}, r"holds no text in 'text' \(bad records: 1 empty\)"),
        ("", {}, r"holds no text in 'text' \(bad records: none\)"),
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


def test_bad_records_above_the_share_stop_the_job_until_it_is_raised(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    lines = ['{"text": "1 2 3"}', "{oops}", '{"text": "<|im_end|> 4"}', '{"text": " "}', '{"text": "' + "5" * 99 + '"}']
    text.write_text("\n".join(lines * 400))
    settings = {"max_document_bytes": 50, "max_bad_share": 0.59}
    with pytest.raises(PolygluError, match=r"1,200 of the first 2,000 rows .*\(400 empty, 400 not_json, 400 special"):
        tokenize_source(source_of(text, tmp_path / "out", **settings), tokenizer, CHUNK_TOKENS)
    records = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert len(records) == 1600
    assert json.loads(records[0]) == {
        "file": str(text), "row_group": 0, "row": 1, "kind": "not_json", "bytes": 6, "kept": False,
    }  # fmt: skip
    with pytest.raises(PolygluError, match="interrupted"):
        open_source(tmp_path / "out")
    settings["max_bad_share"] = 0.6
    manifest = tokenize_source(source_of(text, tmp_path / "out", **settings), tokenizer, CHUNK_TOKENS)
    assert manifest["bad_records"] == dict.fromkeys(("not_json", "special_token_text", "empty", "too_long"), 400)
    assert (manifest["rows"], manifest["documents"], manifest["quarantine"]["records"]) == (2000, 800, 1600)
    fresh = tokenize_source(source_of(text, tmp_path / "fresh", **settings), tokenizer, CHUNK_TOKENS)
    assert fresh == manifest and content(tmp_path / "fresh") == content(tmp_path / "out")


def test_shards_together_hold_what_one_worker_writes(text_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = text_file.read_text().splitlines(keepends=True)
    paths = [tmp_path / f"{index}.jsonl" for index in range(5)]
    for index, path in enumerate(paths):
        path.write_text("".join(lines[index::5]))
    source = TextSource(files=tuple(map(str, paths)), output=str(tmp_path / "out"))
    manifests = [tokenize_source(source, tokenizer, CHUNK_TOKENS, shard=Shard(index, 6)) for index in range(6)]
    assert [manifest["source"]["shard"] for manifest in manifests] == [{"index": index, "of": 6} for index in range(6)]
    assert [[file["path"] for file in manifest["source"]["files"]] for manifest in manifests] == [
        *([str(path)] for path in paths), [],
    ]  # fmt: skip
    assert manifests[5]["complete"] and not manifests[5]["chunks"]
    tokenize_source(source.model_copy(update={"output": str(tmp_path / "whole")}), tokenizer, CHUNK_TOKENS)
    folders = [tmp_path / "out" / f"shard_{index}_of_6" for index in range(5)]
    parts = [open_source(folder) for folder in folders]
    whole = open_source(tmp_path / "whole")
    tokens = [token for part in parts for token in part.read(0, part.n_tokens).tolist()]
    assert tokens == whole.read(0, whole.n_tokens).tolist()
    budget = [
        tokenize_source(
            source.model_copy(update={"max_tokens": 6000, "output": str(tmp_path / "budget")}),
            tokenizer, CHUNK_TOKENS, shard=Shard(index, 6),
        )["tokens"]
        for index in range(6)
    ]  # fmt: skip
    assert all(500 < tokens <= 1000 for tokens in budget[:5]) and budget[5] == 0


def test_a_file_size_limit_leaves_whole_chunks_and_a_sentence(
    text_file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The system refuses a write in the middle of a chunk, as on a full disk."""
    tokenizer.save(tmp_path / "bpe")
    command = [sys.executable, "-m", "polyglu.data.tokenize_dataset", "--files", str(text_file)]
    command += ["--tokenizer", str(tmp_path / "bpe"), "--chunk-tokens", "10000", "--output"]
    limited = ["prlimit", "--fsize=30000", *command, str(tmp_path / "out")]
    refused = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "cannot be written (File too large): mend that and run the same command again; the 0 fin" in refused.stderr
    assert [path.name for path in (tmp_path / "out").glob("*.bin*")] == []
    subprocess.run([*command, str(tmp_path / "out")], check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_processes_on_one_folder(text_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "bpe")
    big = tmp_path / "big.jsonl"
    big.write_text(text_file.read_text() * 30)
    command = [sys.executable, "-m", "polyglu.data.tokenize_dataset", "--files", str(big), "--output"]
    command += [str(tmp_path / "out"), "--tokenizer", str(tmp_path / "bpe"), "--chunk-tokens", "5000"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = sorted((process.wait(), process.communicate()[1]) for process in processes)
    assert ends[0][0] == 0 and (ends[1][0] == 0 or "another process is writing" in ends[1][1])
    assert open_source(tmp_path / "out").manifest["complete"]
