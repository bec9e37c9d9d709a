"""From local Parquet to finished, hashed chunks: python benchmarks/tokenize.py [--json FILE]

fast         polyglu data tokenize as it is: gigatoken, a sample compared with the tokenizer as it runs
reference    the same reader and writer, fed by tokenizers.encode_batch_fast

The two take turns on the same file, F R F R ..., set-up included, and must give the same bytes. The text is what is
installed beside this program: sources, documentation and data of Python packages, a file a document.
"""

import sys

sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

import os
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet
import typer
from measure import describe_machine
from rich.console import Console
from rich.table import Table

from polyglu.data.chunks import open_source
from polyglu.data.sources import TextSource
from polyglu.data.tokenize_dataset import tokenize_source
from polyglu.data.tokenizer import QWEN3, load_tokenizer
from polyglu.errors import run_command
from polyglu.files import write_json

SUFFIXES = {".py", ".pyi", ".txt", ".md", ".rst", ".h", ".hpp", ".c", ".js", ".json", ".html"}
MAX_BYTES = 1 << 20
PACKAGES = ("gigatoken", "tokenizers", "pyarrow", "numpy")
SIDES = {"fast": True, "reference": False}


def main(
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
    files: Annotated[list[Path] | None, typer.Option(help="Parquet files to read instead; column text.")] = None,
    megabytes: Annotated[int, typer.Option(help="Text to gather, if no files are given.", min=1)] = 200,
    rounds: Annotated[int, typer.Option(help="Turns of each side.", min=1)] = 3,
    tokenizer: Annotated[str, typer.Option(help="Hub name, folder or tokenizer.json.")] = QWEN3,
) -> None:
    """Measure both sides; print a table of medians and the ratio."""
    loaded = load_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        paths = files or [write_corpus(Path(folder) / "corpus.parquet", megabytes * 10**6)]
        size = sum(text_bytes(path) for path in paths)
        source = TextSource(files=tuple(map(str, paths)), output=str(Path(folder) / "out"), max_bad_share=1)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        digests, tokens = set(), 0
        for _ in range(rounds):
            for side, fast in SIDES.items():
                shutil.rmtree(source.output, ignore_errors=True)
                start = time.perf_counter()
                manifest = tokenize_source(source, loaded, 100_000_000, fast=fast)
                seconds[side].append(time.perf_counter() - start)
                digests.add(open_source(Path(source.output)).digest)
                tokens = manifest["tokens"]
    results: dict[str, Any] = {"text_megabytes": size / 1e6, "tokens": tokens, "identical": len(digests) == 1}
    results |= {"seconds": seconds, "ratios": [r / f for f, r in zip(*seconds.values(), strict=True)]}
    machine = describe_machine(PACKAGES)
    Console(width=120).print(as_table(machine, results))
    if json is not None:
        write_json(json, {"machine": machine, "results": results})
    if not results["identical"]:
        sys.exit("the two sides wrote different tokens")


def write_corpus(path: Path, size: int) -> Path:
    """Gather text files of the standard library and the installed packages, up to ``size`` bytes."""
    texts, total = [], 0
    for file in installed_files():
        text = file.read_bytes()
        if total >= size:
            break
        try:
            text.decode()
        except UnicodeDecodeError:
            continue
        texts.append(text)
        total += len(text)
    column = pa.array(texts, pa.binary()).cast(pa.string())
    pa.parquet.write_table(pa.table({"text": column}), path, compression="zstd", row_group_size=5000)
    return path


def installed_files() -> Iterator[Path]:
    """Text files of the standard library, then of the installed packages."""
    for key in ("stdlib", "purelib"):
        for folder, folders, names in os.walk(sysconfig.get_paths()[key]):
            folders[:] = sorted(name for name in folders if name not in ("__pycache__", "site-packages"))
            paths = (Path(folder, name) for name in sorted(names))
            yield from (path for path in paths if path.suffix in SUFFIXES and 0 < path.stat().st_size <= MAX_BYTES)


def text_bytes(path: Path) -> int:
    """Bytes of UTF-8 in the column of text."""
    column = pa.parquet.read_table(path, columns=["text"])["text"]
    return int(pa.compute.sum(pa.compute.binary_length(column)).as_py())


def as_table(machine: dict[str, Any], results: dict[str, Any]) -> Table:
    """Medians, with the least and the most."""
    ratios = results["ratios"]
    title = f"{results['text_megabytes']:,.0f} MB of text, {results['tokens']:,} tokens, identical: "
    title += f"{results['identical']}\n{', '.join(f'{key} {value}' for key, value in machine.items())}"
    table = Table("side", "seconds", "MB/s", "tokens/s", title=title)
    for side, seconds in results["seconds"].items():
        median = statistics.median(seconds)
        spread = f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        rates = (f"{results['text_megabytes'] / median:,.1f}", f"{results['tokens'] / median:,.0f}")
        table.add_row(side, spread, *rates)
    table.caption = f"reference / fast: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    return table


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
