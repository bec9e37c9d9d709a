"""A hub on the loopback device: as much of its API as ``huggingface_hub`` and ``datasets`` use, and faults on demand.

    with HubStub() as hub:
        commit = hub.commit("org/name", {"README.md": b"...", "data/train.parquet": b"..."})
        hub.plan = in_turn("parquet", Fault(cut=1000), Fault(status=503))
        point_at(hub.url, tmp_path / "hf", monkeypatch)     # this process; environment(hub.url, home) is for another

Repositories are kept whole at each commit. ``requests`` records what was asked, in order.
"""

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import datasets
import pytest
from hub_handler import SIGNATURE, Asked, Fault, Files, Handler, Plan, Repository, Server, drop
from huggingface_hub import constants
from huggingface_hub.utils import close_session

__all__ = ["SIGNATURE", "Asked", "Fault", "HubStub", "always", "environment", "in_turn", "local_hub", "point_at"]


def in_turn(pattern: str, *faults: Fault | None) -> Plan:
    """Faults for the first requests whose path matches, one each; then none."""
    left, lock = list(faults), threading.Lock()

    def plan(asked: Asked) -> Fault | None:
        with lock:
            return left.pop(0) if left and re.search(pattern, asked.path) else None

    return plan


def always(pattern: str, fault: Fault) -> Plan:
    return lambda asked: fault if re.search(pattern, asked.path) else None


class HubStub:
    """The server; ``url`` is its endpoint."""

    def __init__(self, page: int = 1000, signed: bool = False) -> None:
        self.page = page
        """Entries a page of a listing."""
        self.signed = signed
        """Whether files lie in a store of another host, under signed URLs."""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Asked] = []
        self.plan: Plan = lambda asked: None
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.connections: set[socket.socket] = set()
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.stub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def store(self) -> str:
        return f"http://localhost:{self._server.server_port}"

    def commit(self, name: str, files: Files | Path, **settings: Any) -> str:
        """Add a commit, which becomes the newest; ``name`` is org/name, of a model with ``models/`` before it."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        repository = self.repositories.setdefault(name, Repository())
        for key, value in settings.items():
            setattr(repository, key, value)
        content = [
            repository.newest,
            name,
            *(f"{path} {hashlib.sha1(files[path]).hexdigest()}" for path in sorted(files)),
        ]
        repository.newest = hashlib.sha1("\n".join(content).encode()).hexdigest()
        repository.commits[repository.newest] = dict(files)
        return repository.newest

    def reads(self, pattern: str) -> list[tuple[int, int]]:
        """Byte ranges asked for of the files whose path matches, in order, redirects apart."""
        marker = "/store/" if self.signed else "/resolve/"
        with self.lock:
            asked = [one for one in self.requests if marker in one.path and re.search(pattern, one.path)]
        return [one.span for one in asked if one.method == "GET" and one.span is not None]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        with self.lock:
            for connection in self.connections:
                drop(connection)
        self._server.server_close()  # waits for the connections' threads


def environment(url: str, home: Path) -> dict[str, str]:
    """Variables that point another process at a hub, with caches and token store of its own."""
    return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}


def point_at(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process at a hub; the libraries have read their environment at import."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    moved = {constants._HF_DEFAULT_ENDPOINT: url, constants.ENDPOINT: url, constants.HF_HOME: str(home)}
    for module in (constants, datasets.config):
        for name, value in vars(module).items():
            if name.isupper() and not name.startswith("_") and isinstance(value, str | Path):
                new = str(value)
                for old, target in moved.items():
                    new = target + new.removeprefix(old) if new.startswith(old) else new
                monkeypatch.setattr(module, name, type(value)(new))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


@contextmanager
def local_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """Run a hub for this process."""
    with HubStub() as hub:
        point_at(hub.url, home, monkeypatch)
        yield hub
        close_session()
