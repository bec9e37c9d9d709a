"""Peak memory of polyglu data tokenize on inputs that are hard on it.

Run it as python benchmarks/tokenize_memory.py [--json FILE].

Each input is made, tokenised by the command in a process of its own, and removed. What is printed is that process's
largest resident memory, imports and tokenizer included, as the system counted it.
"""

import sys

sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

import json as json_library
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import typer
from measure import describe_machine
from rich.console import Console
from rich.table import Table

from polyglu.data.tokenizer import QWEN3
from polyglu.errors import run_command
from polyglu.files import write_json

MB = 10**6
AT_RISK = "\u07fd\u0301"
PACKAGES = ("gigatoken", "tokenizers", "pyarrow", "numpy")


def main(
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Hub name, folder or tokenizer.json.")] = QWEN3,
) -> None:
    """Measure each input; print a table."""
    results = {}
    for name, write in INPUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            # In another process: the memory of this one would count as that of the command, which it starts.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                file = pool.submit(write, Path(folder), np.random.default_rng(0)).result()
            results[name] = {"file_mb": file.stat().st_size / MB, **tokenise(file, Path(folder) / "out", tokenizer)}
    machine = describe_machine(PACKAGES)
    table = Table("input", "file, MB", "tokens", "seconds", "peak, MB", title=str(machine))
    for name, row in results.items():
        table.add_row(name, *(f"{row[key]:,.0f}" for key in ("file_mb", "tokens", "seconds", "peak_mb")))
    Console(width=120).print(table)
    if json is not None:
        write_json(json, {"machine": machine, "results": results})


def tokenise(file: Path, output: Path, tokenizer: str) -> dict[str, float]:
    """Run the command on a file; its tokens, seconds and peak memory."""
    command = [sys.executable, "-m", "polyglu.data.tokenize_dataset", "--files", str(file), "--output", str(output)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--tokenizer", tokenizer, "--max-bad-share", "1"], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"tokenising {file.name} ended with exit code {process.returncode}")
    kilobytes = usage.ru_maxrss / 1024 if sys.platform == "darwin" else usage.ru_maxrss
    manifest = json_library.loads((output / "manifest.json").read_text())
    return {"tokens": manifest["tokens"], "seconds": time.perf_counter() - start, "peak_mb": kilobytes * 1024 / MB}


def words(random: np.random.Generator, size: int) -> str:
    """Random letters with a space now and then: hardly a word comes twice."""
    letters = random.integers(97, 123, size).astype(np.uint8)
    letters[random.random(size) < 1 / 9] = 32
    return letters.tobytes().decode()


def _parquet(folder: Path, texts: list[str], **settings: Any) -> Path:
    pa.parquet.write_table(pa.table({"text": texts}), folder / "text.parquet", **settings)
    return folder / "text.parquet"


def one_row_group(folder: Path, random: np.random.Generator) -> Path:
    page = words(random, 50_000)
    starts = random.integers(0, 45_000, 120_000).tolist()
    return _parquet(folder, [page[start : start + 5000] for start in starts], row_group_size=10**9)


def unseen_words(folder: Path, random: np.random.Generator) -> Path:
    return _parquet(folder, [words(random, 5000) for _ in range(60_000)], row_group_size=1000)


def long_documents(folder: Path, random: np.random.Generator) -> Path:
    texts = [words(random, 1000) for _ in range(20_000)]
    for place in (900, 5900, 10_900):
        texts.insert(place, words(random, 100 * MB))
    return _parquet(folder, texts, row_group_size=4000)


def at_risk(folder: Path, random: np.random.Generator) -> Path:
    long = [AT_RISK + words(random, 3_900_000), AT_RISK + "1" * 3_900_000, AT_RISK + "2" * 3_900_000]
    return _parquet(folder, [words(random, 1000) for _ in range(1000)] + long)


def long_line(folder: Path, random: np.random.Generator) -> Path:
    path = folder / "text.jsonl"
    with open(path, "w") as file:
        for size in [1000] * 1000 + [300 * MB] + [1000] * 1000:
            file.write(json_library.dumps({"text": words(random, size)}) + "\n")
    return path


INPUTS: dict[str, Callable[[Path, np.random.Generator], Path]] = {
    "600 MB in one row group": one_row_group,
    "300 MB of words that never come twice": unseen_words,
    "three documents of 100 MB, row groups of 4,000": long_documents,
    "documents of 3.9 MB at risk, two of a token a byte": at_risk,
    "a line of 300 MB": long_line,
}


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
