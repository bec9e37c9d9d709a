"""Small data for tests: token sources written by hand, in the documented format."""

import hashlib
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

EOS = 0


def write_token_source(
    folder: Path, tokens: Sequence[int], *, vocab_size: int = 64, chunk_tokens: int = 1000, fingerprint: str = "f" * 64
) -> Path:
    """Write tokens as chunks and a manifest, without the code under test."""
    folder.mkdir(parents=True, exist_ok=True)
    array, chunks = np.asarray(tokens, dtype="<u4"), []
    for index, start in enumerate(range(0, len(array), chunk_tokens)):
        data = array[start : start + chunk_tokens].tobytes()
        file = folder / f"chunk_{index:05d}.bin"
        file.write_bytes(data)
        ends = int((array[start : start + chunk_tokens] == EOS).sum())
        chunks.append(
            {"file": file.name, "tokens": len(data) // 4, "documents": ends, "sha256": hashlib.sha256(data).hexdigest()}
        )
    manifest = {
        "tokenizer": {"name": "test", "fingerprint": fingerprint, "vocab_size": vocab_size, "eos_id": EOS},
        "source": {},
        "chunk_tokens": chunk_tokens,
        "chunks": chunks,
        "tokens": len(array),
        "documents": int((array == EOS).sum()),
        "rows": int((array == EOS).sum()),
        "bad_records": {},
        "quarantine": {"records": 0, "bytes": 0, "sha256": hashlib.sha256().hexdigest()},
        "complete": True,
    }
    write_sealed(folder, manifest)
    return folder


def write_sealed(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest as documented: its SHA-256 over its content, keys sorted."""
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    content = {**manifest, "format_version": 2, "sha256": seal}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def retokenized(folder: Path, fingerprint: str) -> None:
    """Make written data that of a tokenizer with another fingerprint."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["format_version"], manifest["sha256"]
    manifest["tokenizer"]["fingerprint"] = fingerprint
    write_sealed(folder, manifest)


def free_port() -> int:
    """A port on which nobody listens just now."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def random_documents(
    rng: np.random.Generator, n_tokens: int, vocab_size: int = 64, mean_length: int = 20
) -> np.ndarray:
    """Tokens ``[n_tokens]`` of documents of random lengths, EOS after each. Each token depends on the one before."""
    steps = rng.integers(1, 4, n_tokens)
    tokens = np.cumsum(steps) % (vocab_size - 1) + 1
    tokens[rng.random(n_tokens) < 1 / mean_length] = EOS
    tokens[-1] = EOS
    return tokens
