"""Secrets of the environment reach neither files nor output of a round of tokenising, training and reporting."""

import logging
import sys
from pathlib import Path

import pytest
from commands import Place

from polyglu import cli

SECRETS = {"HF_TOKEN": "hf_canaryABCDEFGHIJKLMNOPQRSTUVWXYZ", "WANDB_API_KEY": "c0ffee" * 6 + "c0ff"}


def polyglu(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "argv", ["polyglu", *line.split()])
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
    finally:
        root.handlers[:], root.level = handlers, level  # a command sets up logging for its own process


def test_secrets_are_in_no_file_and_no_output(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, secret in {**SECRETS, "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, secret)
    (tmp_path / "home").mkdir()
    tokenised = tmp_path / "tokenised"
    tokenise = f"data tokenize --files {place.here}/text.jsonl --tokenizer {place.here}/tokenizer --output {tokenised}"
    polyglu(tokenise, monkeypatch)
    polyglu(f"train --config {place.here}/train.yaml --set wandb.mode=offline", monkeypatch)
    polyglu(f"data report {tokenised} --output {tmp_path / 'report'}", monkeypatch)
    said = "".join(capfd.readouterr())
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kinds = {path.suffix for path in written}
    assert "report" in said and kinds >= {".wandb", ".log", ".jsonl", ".yaml", ".pt", ".bin", ".png"}
    for secret in SECRETS.values():
        assert secret not in said
        assert not [path for path, content in written.items() if secret.encode() in content]
