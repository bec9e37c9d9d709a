import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyglu.data import merge as module
from polyglu.data.chunk_writer import ChunkWriter, DocumentBatch
from polyglu.data.chunks import open_source
from polyglu.data.manifest import new_manifest, read_manifest, write_manifest
from polyglu.data.merge import find_shards, main, merge
from polyglu.data.quarantine import EMPTY, BadRecord
from polyglu.data.sources import Shard, TextSource
from polyglu.data.tokenize_dataset import tokenize_source
from polyglu.data.tokenizer import train_bpe
from polyglu.data.verify import verify
from polyglu.errors import PolygluError
from polyglu.files import NewFile

EOS = 0
TOKENIZER = {"name": "toy", "fingerprint": "f" * 64, "vocab_size": 50, "eos_id": EOS}
FILES = [f"part_{index}.jsonl" for index in range(7)]
SHARDS = 3
Documents = dict[str, list[list[int]]]


def documents() -> Documents:
    """Some documents a file; no two alike, and one file without any."""
    rng, found = np.random.default_rng(0), Documents()
    for number, file in enumerate(FILES):
        found[file] = [[number + 1, *rng.integers(1, 50, rng.integers(0, 25)).tolist()] for _ in range(4 + number)]
    found[FILES[4]] = []
    return found


def write(folder: Path, files: list[str], texts: Documents, shard: dict[str, int] | None = None, **other: Any) -> Path:
    """Tokenised data of some files; each has a bad record behind its documents."""
    source: dict[str, Any] = {
        "files": [{"path": file, "bytes": len(texts[file])} for file in files],
        "text_field": "text",
    }
    if shard is not None:
        source["shard"] = shard
    folder.mkdir(parents=True)
    manifest = new_manifest({**TOKENIZER, **other}, source, chunk_tokens=30)
    writer = ChunkWriter(folder, manifest, files)
    for number, file in enumerate(files):
        tokens = [[*document, EOS] for document in texts[file]]
        n = len(tokens)
        writer.add(
            DocumentBatch(
                tokens=np.array(sum(tokens, []), dtype=np.uint32),
                ends=np.cumsum([len(document) for document in tokens], dtype=np.int64),
                row_of=np.arange(n),
                positions=np.array([[number, 0, row] for row in range(n + 1)]),
                bad=[BadRecord(n, EMPTY, 0)],
            )
        )
    writer.finish()
    writer.close()
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder with the shards of three workers."""
    for index in range(SHARDS):
        place = {"index": index, "of": SHARDS}
        write(tmp_path / f"out/shard_{index}_of_{SHARDS}", FILES[index::SHARDS], documents(), place)
    return tmp_path / "out"


def change(folder: Path, alter: Callable[[dict[str, Any]], Any]) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    alter(manifest)
    write_manifest(folder, manifest)


def texts_of(folder: Path, eos: int = EOS) -> list[tuple[int, ...]]:
    source = open_source(folder)
    tokens = source.read(0, source.n_tokens)
    return [tuple(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == eos) + 1)[:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def shards_of(output: Path) -> list[Path]:
    return [output / f"shard_{index}_of_{SHARDS}" for index in range(SHARDS)]


def test_merged_shards_are_what_one_worker_makes(output: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one", FILES, documents())
    manifest, done = merge(output, find_shards(output))
    whole = read_manifest(one)
    assert done and whole is not None and read_manifest(output) == manifest
    assert sorted(texts_of(output)) == sorted(texts_of(one))
    for key in ("tokens", "documents", "rows", "bad_records", "tokenizer", "chunk_tokens", "complete"):
        assert manifest[key] == whole[key], key
    assert manifest["source"] == {**whole["source"], "shards": SHARDS}
    assert not any("end" in chunk for chunk in manifest["chunks"])
    lines = [(folder / "quarantine.jsonl").read_text().splitlines() for folder in (output, one)]
    assert sorted(lines[0]) == sorted(lines[1]) and len(lines[0]) == len(FILES)
    assert verify(output).faults == ()
    assert texts_of(output) == list(itertools.chain.from_iterable(map(texts_of, shards_of(output))))


def test_the_order_in_which_shards_are_named_does_not_matter(output: Path, tmp_path: Path) -> None:
    merge(tmp_path / "a", shards_of(output))
    merge(tmp_path / "b", shards_of(output)[::-1])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_chunks_are_linked_not_copied(output: Path) -> None:
    merge(output, find_shards(output))
    assert (output / "chunk_00000.bin").samefile(output / "shard_0_of_3/chunk_00000.bin")


def no_links(*_: Any) -> None:
    raise OSError(95, "Operation not supported")


def test_without_hard_links_chunks_are_copied(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(tmp_path / "linked", shards_of(output))
    monkeypatch.setattr(os, "link", no_links)
    merge(output, find_shards(output))
    assert contents(output) == contents(tmp_path / "linked")
    assert not (output / "chunk_00000.bin").samefile(output / "shard_0_of_3/chunk_00000.bin")


def test_a_copy_of_damaged_bytes_is_refused(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    chunk = output / "shard_1_of_3/chunk_00001.bin"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(PolygluError, match="chunk_00001.bin has other bytes"):
        merge(output, find_shards(output))
    assert not (output / "manifest.json").exists() and not list(output.glob("*.tmp"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("links", [True, False])
def test_killed_at_any_moment_and_run_again_it_ends_the_same(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    folders = shards_of(output)
    merge(tmp_path / "whole", folders)
    expected = contents(tmp_path / "whole")
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    steps = {"link": os.link, "replace": os.replace, "fsync": os.fsync}
    kills, left_over = 0, 0
    for moment in itertools.count():
        place, left = tmp_path / f"stopped_{moment}", [moment]

        def stop(real: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*arguments, **named)

            return run

        with monkeypatch.context() as patch:
            for name, real in steps.items():
                patch.setattr(os, name, stop(real))
            patch.setattr(NewFile, "discard", lambda self: self.file.close())  # the dead do not tidy up
            try:
                merge(place, folders)
            except Killed:
                kills += 1
                left_over += len(list(place.glob("*.tmp")))
                assert not (place / "manifest.json").exists() or contents(place) == expected
            else:
                break
        merge(place, folders)
        assert contents(place) == expected, moment
    assert kills > 10 and left_over


def test_merged_data_needs_nothing(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(output, None, verify=True)
    assert "3 shards" in capsys.readouterr().out
    before = contents(output)
    assert merge(output, find_shards(output))[1] is False
    for folder in find_shards(output):
        shutil.rmtree(folder)
    main(output, None, verify=False)
    assert "nothing to do" in capsys.readouterr().out
    assert contents(output) == before
    (output / "chunk_00001.bin").unlink()
    with pytest.raises(PolygluError, match="chunk_00001.bin is missing"):
        merge(output, [])


def test_shards_without_files_have_no_chunks(tmp_path: Path) -> None:
    texts = {"a": [[1, 2], [3]]}
    folders = [write(tmp_path / f"s{i}", ["a"][i::3], texts, {"index": i, "of": 3}) for i in range(3)]
    manifest, _ = merge(tmp_path / "out", folders)
    assert len(manifest["chunks"]) == 1 and texts_of(tmp_path / "out") == [(1, 2, 0), (3, 0)]


def test_other_data_in_the_output_is_refused(output: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", FILES, documents())
    before = contents(other)
    with pytest.raises(PolygluError, match="other data than these shards"):
        merge(other, shards_of(output))
    (other / "manifest.json").unlink()
    with pytest.raises(PolygluError, match="is of other data"):
        merge(other, shards_of(output))
    before.pop("manifest.json")
    assert contents(other) == before
    (tmp_path / "q").mkdir()
    (tmp_path / "q/quarantine.jsonl").write_text("{}")
    with pytest.raises(PolygluError, match="quarantine.jsonl is of other data"):
        merge(tmp_path / "q", shards_of(output))


def test_each_fault_of_the_shards_has_its_sentence(output: Path, tmp_path: Path) -> None:
    def refused(alter: Callable[[list[Path]], Any], message: str) -> None:
        place = tmp_path / "spoilt"
        shutil.copytree(output, place)
        altered = alter(shards_of(place))
        folders = altered if isinstance(altered, list) else shards_of(place)
        with pytest.raises(PolygluError, match=message) as error:
            merge(place, folders)
        assert str(error.value).count("\n") == 0 and not list(place.glob("*.*")), message
        shutil.rmtree(place)

    def set_source(index: int, **values: Any) -> Callable[[list[Path]], None]:
        return lambda folders: change(folders[index], lambda manifest: manifest["source"].update(values))

    def set_any(index: int, **values: Any) -> Callable[[list[Path]], None]:
        return lambda folders: change(folders[index], lambda manifest: manifest.update(values))

    def unfinished(folders: list[Path]) -> None:
        change(folders[1], lambda manifest: manifest.update(complete=False))

    def change_fingerprint(folders: list[Path]) -> None:
        change(folders[2], lambda manifest: manifest["tokenizer"].update(fingerprint="e" * 64))

    def no_shard(folders: list[Path]) -> None:
        change(folders[0], lambda manifest: manifest["source"].pop("shard"))

    part_1 = json.loads((output / "shard_1_of_3/manifest.json").read_text())["source"]["files"][0]
    part_2 = [part_1, *json.loads((output / "shard_2_of_3/manifest.json").read_text())["source"]["files"][1:]]
    refused(lambda folders: folders[:1] + folders[2:], "of 3 shards, these are missing: 1;")
    refused(lambda folders: [*folders, folders[1]], "are both shard 1 of 3")
    refused(set_source(2, shard={"index": 2, "of": 4}), "is one of 3 shards, .* one of 4")
    refused(no_shard, "is no shard")
    refused(lambda folders: [*folders, output / "nothing"], "nothing holds no tokenised data")
    refused(unfinished, r"is not finished; run its tokenize command \(--shard 1/3\)")
    refused(change_fingerprint, "tokenizer fingerprint f+, .* with e+")
    refused(set_any(1, chunk_tokens=31), "chunk_tokens 30, .* with 31")
    refused(set_source(1, text_field="body"), "text_field text, .* with body")
    refused(set_source(1, max_tokens=9), "max_tokens None, .* with 9")
    refused(set_source(2, files=part_2), "part_1.jsonl is in .* and in")
    refused(set_source(2, files=part_2[:1]), "has 3 files where 2 of all 6 are its share")
    refused(lambda folders: (folders[1] / "chunk_00000.bin").unlink(), "chunk_00000.bin is missing")
    refused(lambda folders: (folders[1] / "chunk_00000.bin").write_bytes(b"1"), "has 1 bytes")
    refused(lambda folders: (folders[2] / "quarantine.jsonl").write_bytes(b"1"), "quarantine.jsonl was changed")
    refused(lambda folders: (folders[2] / "quarantine.jsonl").unlink(), "quarantine.jsonl was changed or removed")


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_tokenised_by_several_workers_the_documents_are_those_of_one(tmp_path: Path, workers: int) -> None:
    files, texts = [], []
    for index in range(5):
        rows = [{"text": f"file {index} row {row} " + "word " * (7 * row % 11)} for row in range(20)]
        texts += [row["text"] for row in rows]
        lines = [*map(json.dumps, rows), '{"text": " "}']
        (tmp_path / f"{index}.jsonl").write_text("".join(line + "\n" for line in lines))
        files.append(str(tmp_path / f"{index}.jsonl"))
    tokenizer = train_bpe(texts, 280, tmp_path / "bpe")
    one = TextSource(files=tuple(files), output=str(tmp_path / "one"), max_bad_share=0.1)
    whole = tokenize_source(one, tokenizer, chunk_tokens=64)
    several = one.model_copy(update={"output": str(tmp_path / "several")})
    for index in range(workers):
        tokenize_source(several, tokenizer, chunk_tokens=64, shard=Shard(index, workers))
    manifest, _ = merge(tmp_path / "several", find_shards(tmp_path / "several"))
    assert verify(tmp_path / "several").faults == ()
    assert sorted(texts_of(tmp_path / "several", tokenizer.eos_id)) == sorted(
        texts_of(tmp_path / "one", tokenizer.eos_id)
    )
    assert manifest["source"] == {**whole["source"], "shards": workers}
    for key in ("tokens", "documents", "rows", "bad_records"):
        assert manifest[key] == whole[key], key
    assert (tmp_path / "several/quarantine.jsonl").read_text().count("\n") == 5


def test_merged_data_has_the_budget_of_all_shards(output: Path) -> None:
    for folder in shards_of(output):
        change(folder, lambda manifest: manifest["source"].update(max_tokens=1000))
    assert merge(output, find_shards(output))[0]["source"]["max_tokens"] == 3000


def test_no_shards_no_merge(tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match="holds no shards"):
        merge(tmp_path / "nowhere", [])


def test_verify_finds_flipped_bits_before_merging(output: Path) -> None:
    chunk = output / "shard_2_of_3/chunk_00000.bin"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 8
    chunk.write_bytes(content)
    with pytest.raises(PolygluError, match="SHA-256 differs"):
        main(output, None, verify=True)
    assert not (output / "manifest.json").exists()


def test_blocks_do_not_change_what_is_written(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(tmp_path / "a", shards_of(output))
    monkeypatch.setattr(module, "BLOCK_BYTES", 7)
    monkeypatch.setattr(os, "link", no_links)
    merge(tmp_path / "b", shards_of(output))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
