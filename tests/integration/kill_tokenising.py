"""Kill tokenising at seeded moments, each time run it again, and compare the bytes with those of an uninterrupted run.

    python tests/integration/kill_tokenising.py FOLDER FIRST_SEED LAST_SEED

Each attempt is a forked process. Even seeds kill it at a call of the interpreter into the system (before or after a
read, write, flush, fsync, rename, truncate or removal, in any of its threads), odd ones after a time.
"""

import gzip
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from polyglu.data import documents, readers
from polyglu.data.encoding import risky_blocks
from polyglu.data.manifest import read_manifest
from polyglu.data.sources import TextSource
from polyglu.data.tokenize_dataset import tokenize_source
from polyglu.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from polyglu.data.verify import verify

CHUNK_TOKENS = 3000
CALLS = {"read", "write", "flush", "fsync", "replace", "truncate", "unlink", "stat", "mkdir", "open"}


def write_source(folder: Path) -> list[Path]:
    """Files of every kind, bad records in all of them."""
    generator = random.Random(0)
    texts: list[Any] = [
        " ".join(str(generator.randrange(10**6)) for _ in range(generator.choice([1, 5, 30, 200]))) for _ in range(400)
    ]
    for place in range(0, 400, 37):
        texts[place] = generator.choice([None, "", " \n", "<|endoftext|> 1 2", "\u07fd\u0301 3"])
    lines = [json.dumps({"text": text}) for text in texts[200:]]
    lines[20] = "{oops}"
    pa.parquet.write_table(pa.table({"text": texts[:200]}), folder / "a.parquet", row_group_size=70)
    (folder / "b.jsonl").write_text("\n".join(lines[:120]))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[120:]).encode()))
    return [folder / name for name in ("a.parquet", "b.jsonl", "c.jsonl.gz")]


def kill_at_call(number: int) -> None:
    """Kill this process before or after its ``number``-th call that may touch a file."""
    counted = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal counted
        if event in ("c_call", "c_return") and getattr(argument, "__name__", "") in CALLS:
            counted += 1
            if counted == number:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(watch)
    sys.setprofile(watch)


def attempt(files: list[Path], tokenizer: Tokenizer, output: Path, call: int | None, seconds: float | None) -> bool:
    """Tokenise in a process of its own, which may be killed; return whether it was."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if call is not None:
                kill_at_call(call)
            source = TextSource(files=tuple(map(str, files)), output=str(output), max_bad_share=1)
            tokenize_source(source, tokenizer, CHUNK_TOKENS)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        raise SystemExit(f"{output}: tokenising failed with status {status}")
    return killed


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_what_is_left(output: Path, whole: dict[str, bytes]) -> None:
    """What the manifest lists is on disk, and final."""
    manifest = read_manifest(output)
    if manifest is not None:
        for chunk in manifest["chunks"]:
            assert (output / chunk["file"]).read_bytes() == whole[chunk["file"]], chunk
        recorded = manifest["quarantine"]["bytes"]
        if recorded:
            assert (output / "quarantine.jsonl").read_bytes()[:recorded] == whole["quarantine.jsonl"][:recorded]


def main(folder: Path, first: int, last: int) -> None:
    readers.BLOCK_BYTES, documents.BATCH_BYTES = 4096, 6000  # many blocks and batches, of little text
    risky_blocks()
    files = write_source(folder)
    train_bpe(["the sum of 1 and 2 is 3 "] * 9, 280, folder / "bpe")
    tokenizer = load_tokenizer(str(folder / "bpe"))
    started = time.perf_counter()
    assert not attempt(files, tokenizer, folder / "whole", None, None)
    duration = time.perf_counter() - started
    whole = content(folder / "whole")
    report = {"chunks": sum(name.endswith(".bin") for name in whole), "kills": 0, "equal": 0}
    for seed in range(first, 2 * last - first):
        if seed >= last and report["kills"] >= 1.25 * (last - first):
            break  # on a machine whose speed changes, some moments lie behind the end
        generator = random.Random(seed)
        output = folder / f"broken_{seed}"
        for _ in range(generator.choice([1, 1, 2, 3])):
            call = generator.randrange(1, 900) if seed % 2 == 0 else None
            killed = attempt(files, tokenizer, output, call, None if call else generator.random() * duration)
            report["kills"] += killed
            if not killed:
                break
            check_what_is_left(output, whole)
        attempt(files, tokenizer, output, None, None)
        assert content(output) == whole and not verify(output).faults, seed
        report["equal"] += 1
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
