"""Running ``polyglu`` inside the test process, on small files that a test may spoil."""

import contextlib
import io
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from polyglu import cli

READ_CHECKPOINT = {
    "eval": "eval --checkpoint {checkpoint} --tasks demo_arithmetic --data-dir {here} --limit 1 --output {out}/r.json",
    "analyze": "analyze --checkpoint {checkpoint} --output {out} --documents 2 --tokens 8",
    "ablate": "ablate --checkpoint {checkpoint} --data {here}/text.jsonl --output {out} --max-tokens 100",
    "generate": "generate --checkpoint {checkpoint} --prompt 1 --max-new-tokens 2",
    "sft": "sft --config {here}/sft.yaml --set training.init_from={checkpoint}",
    "train": "train --config {here}/train.yaml --set training.resume_from={checkpoint}",
}
"""Verb -> a command line that reads a checkpoint; with a good one it succeeds."""


@dataclass(frozen=True)
class Place:
    """Small good files to spoil, and a folder ``out`` into which nothing may be written."""

    here: Path
    out: Path

    @property
    def checkpoint(self) -> Path:
        return self.here / "good.pt"

    def line(self, command: str, **names: Any) -> str:
        return command.format(**{"here": self.here, "out": self.out, "checkpoint": self.checkpoint, **names})


def call(line: str) -> tuple[int, str]:
    """Run ``polyglu`` in this process; exit code and the sentence of the error, if any."""
    said, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with mock.patch.object(sys, "argv", ["polyglu", *line.split()]), contextlib.redirect_stderr(said):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            root.handlers[:], root.level = handlers, level  # a command sets up logging for its own process
    sentences = [text for text in said.getvalue().splitlines() if text.startswith("error: ")]
    assert len(sentences) <= 1 and "Traceback" not in said.getvalue()
    return code, sentences[0] if sentences else said.getvalue()


def refused(line: str) -> str:
    """Run a command that must be refused; return the sentence."""
    code, sentence = call(line)
    assert code == 2 and sentence.startswith("error: "), sentence
    return sentence


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
