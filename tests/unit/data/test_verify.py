import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EOS, random_documents, write_sealed, write_token_source

from polyglu.data import verify as module
from polyglu.data.manifest import read_manifest
from polyglu.data.verify import main, require_intact, verify
from polyglu.errors import PolygluError

CHUNK_TOKENS = 40
TOKENS = 230


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six chunks, the last one shorter, and a quarantine of three records."""
    folder = write_token_source(
        tmp_path / "math", random_documents(np.random.default_rng(0), TOKENS), chunk_tokens=CHUNK_TOKENS
    )
    lines = [{"file": "a.jsonl", "row_group": 0, "row": row, "kind": "empty", "bytes": 0} for row in (3, 8, 9)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "quarantine.jsonl").write_bytes(data)
    entry = {"records": 3, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, quarantine=entry, bad_records={"empty": 3})
    return folder


def rewrite(folder: Path, **changed: Any) -> dict[str, Any]:
    """Change a manifest and seal it again: what a faulty writer would leave."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("sha256", "format_version"):
        manifest.pop(key)
    manifest.update(changed)
    write_sealed(folder, manifest)
    return manifest


def unfinished(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    end = {"file": 0, "row_group": 0, "row": 1, "tokens": 0}
    rewrite(folder, complete=False, chunks=[{**chunk, "end": end} for chunk in manifest["chunks"]])


def faults(folder: Path) -> dict[str, str]:
    return {fault.file: fault.text for fault in verify(folder).faults}


def test_intact_data_has_no_fault_and_its_counts(folder: Path) -> None:
    (folder / "README.md").write_text("notes are let be")
    (folder / "report.json").write_text("{}")
    read: list[int] = []
    result = verify(folder, read.append)
    tokens = np.concatenate([np.fromfile(file, "<u4") for file in sorted(folder.glob("chunk_*.bin"))])
    assert result.faults == ()
    assert (result.tokens, result.documents, result.chunks) == (TOKENS, int((tokens == EOS).sum()), 6)
    assert sum(read) == 4 * TOKENS
    names = ("manifest.json", "quarantine.jsonl")
    assert result.bytes == 4 * TOKENS + sum((folder / name).stat().st_size for name in names)
    assert require_intact(folder) == result


def corrupt(folder: Path, rng: np.random.Generator) -> set[str]:
    """Do one random harm to a folder; the names of the files that are then wrong."""
    files = sorted(path for path in folder.iterdir())
    path = files[rng.integers(len(files))]
    chunks = [file for file in files if file.suffix == ".bin"]
    content = bytearray(path.read_bytes())
    match rng.choice(["flip", "cut", "grow", "remove", "extra", "swap"], p=[0.4, 0.15, 0.1, 0.1, 0.1, 0.15]):
        case "flip":
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[: rng.integers(len(content))])
        case "grow":
            path.write_bytes(content + rng.bytes(rng.integers(1, 9)))
        case "remove":
            path.unlink()
        case "extra":
            name = rng.choice(["chunk_00006.bin", "chunk_0.bin", "CHUNK_00001 (copy).bin", "more.parquet", "a.bin.tmp"])
            path = folder / name
            path.write_bytes(content)
        case "swap":
            first, second = (chunks[index] for index in rng.choice(len(chunks), 2, replace=False))
            one, two = first.read_bytes(), second.read_bytes()
            first.write_bytes(two)
            second.write_bytes(one)
            return {first.name, second.name}
    return {path.name}


def test_every_one_of_1000_random_corruptions_is_found(folder: Path) -> None:
    rng = np.random.default_rng(0)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len({good[name] for name in good}) == len(good), "two equal files: swapping them would be no harm"
    for attempt in range(1000):
        wrong = corrupt(folder, rng)
        found = faults(folder)
        assert wrong <= found.keys(), (attempt, wrong, found)
        # Without its manifest nothing else of the data can be judged; otherwise nothing but the harm is named.
        assert found.keys() == wrong, (attempt, wrong, found)
        for path in folder.iterdir():
            if path.name not in good:
                path.unlink()
        for name in wrong & good.keys():
            (folder / name).write_bytes(good[name])
    assert faults(folder) == {}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("data")
    write_token_source(folder, random_documents(np.random.default_rng(1), 90), chunk_tokens=30)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert faults(folder).keys() == {path.name}


def test_each_fault_says_what_is_wrong_and_what_to_do(folder: Path) -> None:
    (folder / "chunk_00000.bin").unlink()
    (folder / "chunk_00001.bin").write_bytes(b"123")
    one, two = folder / "chunk_00002.bin", folder / "chunk_00003.bin"
    (folder / "x").write_bytes(one.read_bytes())
    one.write_bytes(two.read_bytes())
    shutil.move(folder / "x", two)
    content = bytearray((folder / "chunk_00004.bin").read_bytes())
    content[5] ^= 4
    (folder / "chunk_00004.bin").write_bytes(content)
    (folder / "quarantine.jsonl").write_text("{}\n")
    (folder / "chunk_00099.bin").write_bytes(b"1234")
    (folder / "chunk_00006.bin.tmp").write_bytes(b"1234")
    found = faults(folder)
    assert "is missing; restore it" in found.pop("chunk_00000.bin")
    assert "has 3 bytes, expected 160 (40 tokens); restore it" in found.pop("chunk_00001.bin")
    assert "has the content of chunk_00003.bin" in found.pop("chunk_00002.bin")
    assert "has the content of chunk_00002.bin" in found.pop("chunk_00003.bin")
    assert "SHA-256 differs" in found.pop("chunk_00004.bin")
    assert re.search(r"has 3 bytes, expected \d+; restore it", found.pop("quarantine.jsonl"))
    assert found.pop("chunk_00099.bin") == "is not in the manifest; remove it."
    assert found.pop("chunk_00006.bin.tmp") == "was left by an interrupted run; remove it."
    assert found == {}


def test_a_broken_or_missing_manifest_is_named(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"rows": ', '"rows": 1'))
    assert faults(folder)["manifest.json"].startswith("was changed after it was written")
    path.write_text(text.replace("\n", "\n "))
    assert "reformatted" in faults(folder)["manifest.json"]
    path.unlink()
    assert "is missing" in faults(folder)["manifest.json"]
    (folder / "shard_0_of_2").mkdir()
    assert "polyglu data merge" in faults(folder)["manifest.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"documents": -1}, "ends of"),
        ({"vocab_size": 5}, "outside the tokenizer's vocab_size 5"),
        ({"eos_id": 9}, "ends of"),
        ({"file": "chunk_00007.bin"}, "names chunk_00007.bin where chunk_00005.bin belongs"),
        ({"bad_records": {"empty": 2}}, "counts other bad records"),
        ({"records": 2}, "has 3 lines, its manifest says 2"),
    ],
)
def test_what_a_faulty_writer_would_seal_is_found(folder: Path, change: dict[str, Any], said: str) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    last = manifest["chunks"][-1]
    for key, value in change.items():
        if key == "documents":
            last["documents"] += value
            manifest["documents"] += value
        elif key == "file":
            (folder / last["file"]).rename(folder / str(value))
            last["file"] = value
        elif key in manifest:
            manifest[key] = value
        else:
            manifest["tokenizer" if key in manifest["tokenizer"] else "quarantine"][key] = value
    write_sealed(folder, manifest)
    assert any(said in text for text in faults(folder).values()), faults(folder)


def test_complete_data_ends_with_a_whole_document(tmp_path: Path) -> None:
    folder = write_token_source(tmp_path / "cut", [1, 2, EOS, 3, 4, EOS, 5], chunk_tokens=4)
    assert "ends with token 5" in faults(folder)["chunk_00001.bin"]
    unfinished(folder)
    assert faults(folder).keys() == {"manifest.json"}


def test_unfinished_data_is_checked_as_far_as_it_goes(folder: Path) -> None:
    unfinished(folder)
    (folder / "chunk_00006.bin.tmp").write_bytes(b"12")  # being written when the run was stopped
    (folder / "chunk_00006.bin").write_bytes(b"1234")  # finished, but not yet listed
    with open(folder / "quarantine.jsonl", "a") as file:
        file.write("{}\n")
    found = faults(folder)
    assert found.keys() == {"manifest.json"} and "not finished" in found["manifest.json"]
    (folder / "chunk_00009.bin").write_bytes(b"1234")
    (folder / "chunk_00002.bin").write_bytes(b"1234")
    (folder / "quarantine.jsonl").write_text("{}\n")
    assert faults(folder).keys() == {"manifest.json", "chunk_00009.bin", "chunk_00002.bin", "quarantine.jsonl"}


def test_a_quarantine_that_the_manifest_does_not_know_is_a_fault(tmp_path: Path) -> None:
    folder = write_token_source(tmp_path / "data", [1, EOS])
    (folder / "quarantine.jsonl").write_text("{}\n")
    assert faults(folder).keys() == {"quarantine.jsonl"}


def test_a_file_that_cannot_be_read_is_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "_scan", refuse)
    found = faults(folder)
    assert len(found) == 6 and all("Input/output error" in text for text in found.values())


@pytest.mark.parametrize("block", [1, 7, 40, 64])
def test_the_size_of_blocks_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK_TOKENS", block)
    assert faults(folder) == {}


def test_the_command_lists_every_fault_and_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([folder])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "230 tokens" in said and "6 chunks" in said
    (folder / "chunk_00001.bin").unlink()
    (folder / "chunk_00004.bin").write_bytes(b"")
    with pytest.raises(PolygluError, match="listed above"):
        main([folder])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(folder / f"chunk_0000{index}.bin") for index in (1, 4)]
    with pytest.raises(PolygluError, match=r"chunk_00001.bin is missing.*1 more"):
        require_intact(folder)
    with pytest.raises(PolygluError, match="is no folder"):
        main([folder / "nothing"])
