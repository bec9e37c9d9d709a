"""The HTTP side of the hub on the loopback device (``hub_stub.py``): how each request is answered, or fails."""

import hashlib
import json
import re
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

if TYPE_CHECKING:
    from hub_stub import HubStub

Files = Mapping[str, bytes]
SIGNATURE = "c2lnbmF0dXJl"
"""What the store's URLs are signed with: nobody may see it in a log."""


@dataclass(frozen=True)
class Asked:
    """One request, as recorded."""

    method: str
    path: str
    span: tuple[int, int] | None
    """First byte, and the one after the last; None if no range was asked for."""
    authorized: bool
    """Whether an ``Authorization`` header came along."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer."""

    status: int | None = None
    """Answer this instead."""
    code: str = ""
    """``X-Error-Code``."""
    message: str = ""
    """``X-Error-Message``."""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    """Send so many bytes of the body, then drop the connection; -1: drop it without an answer."""
    reset: bool = False
    """Drop it with a TCP reset."""
    hang: bool = False
    """Never answer, or stop after ``cut`` bytes without a word."""
    whole: bool = False
    """Ignore the range."""
    short: int | None = None
    """Answer in good order with so many bytes of the range."""


Plan = Callable[[Asked], Fault | None]


@dataclass
class Repository:
    commits: dict[str, Files] = field(default_factory=dict)
    newest: str = ""
    gated: bool = False
    """Its page is public, its files are not."""
    private: bool = False
    token: str = ""
    """The token that opens it."""


def drop(connection: socket.socket, reset: bool = False) -> None:
    try:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        else:
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # gone already


class Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 64
    stub: "HubStub"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # connections break here by intention


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        with self.server.stub.lock:
            self.server.stub.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.stub.lock:
            self.server.stub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        stub, url = self.server.stub, urlsplit(self.path)
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        asked = Asked(
            self.command,
            unquote(url.path),
            (int(span[1]), int(span[2]) + 1) if span else None,
            "Authorization" in self.headers,
        )
        with stub.lock:
            stub.requests.append(asked)
        self._fault = stub.plan(asked) or Fault()
        if self._fault.hang and self._fault.cut is None:
            stub.stopping.wait()
            self.close_connection = True
        elif self._fault.cut == -1:
            self._break()
        elif self._fault.status is not None:
            self._refuse(self._fault.status, self._fault.code, self._fault.message)
        else:
            self._answer(asked, parse_qs(url.query), form)

    def _answer(self, asked: Asked, query: dict[str, list[str]], form: dict[str, list[str]]) -> None:
        if found := re.fullmatch(
            r"/api/(models/|datasets/)([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.*))?)?)?", asked.path
        ):
            kind, name, verb, revision, path = found.groups()
            self._api(kind, name, verb or "revision", revision, path or "", query, form)
        elif found := re.fullmatch(r"/(datasets/|)([^/]+/[^/]+)/resolve/([^/]+)/(.+)", asked.path):
            self._resolve(found[1] or "models/", found[2], found[3], found[4])
        elif (found := re.fullmatch(r"/store/(.+/.+?)/([0-9a-f]{40})/(.+)", asked.path)) and SIGNATURE in self.path:
            self._file(self.server.stub.repositories[found[1]].commits[found[2]][found[3]], asked.span)
        else:
            self._refuse(404)

    def _api(
        self, kind: str, name: str, verb: str, revision: str | None, path: str, query: dict[str, list[str]],
        form: dict[str, list[str]],
    ) -> None:  # fmt: skip
        if (at := self._find(kind, name, revision, files=verb == "auth-check")) is None:
            return
        commit, files = at
        if verb == "revision":
            self._json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})
        elif verb == "auth-check":
            self._json({})
        elif verb == "paths-info":
            self._json([_entry(files, file) for file in form["paths"] if file in files])
        elif verb == "tree":
            self._tree(files, path, query)
        else:
            self._refuse(404)

    def _tree(self, files: Files, path: str, query: dict[str, list[str]]) -> None:
        prefix = f"{path}/" if path else ""
        inside = {file for file in files if file.startswith(prefix)}
        folders = {str(parent) for file in inside for parent in Path(file).parents} - {".", path}
        entries = sorted(inside | {folder for folder in folders if folder.startswith(prefix)})
        if query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry.removeprefix(prefix)]
        if path and not entries:
            self._refuse(404, "EntryNotFound")
            return
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.server.stub.page
        link = {}
        if end < len(entries):
            base = f"{self.server.stub.url}{urlsplit(self.path).path}?recursive={query.get('recursive', ['false'])[0]}"
            link["Link"] = f'<{base}&cursor={end}>; rel="next"'
        self._json([_entry(files, entry) for entry in entries[start:end]], link)

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        if (at := self._find(kind, name, revision, files=True)) is None:
            return
        commit, files = at
        about = {"X-Repo-Commit": commit}
        if path not in files:
            self._refuse(404, "EntryNotFound", headers=about)
            return
        about["ETag"] = f'"{hashlib.sha1(f"{commit}/{path}".encode()).hexdigest()}"'
        if self.server.stub.signed and path != "README.md":
            about |= {"X-Linked-ETag": about["ETag"], "X-Linked-Size": str(len(files[path]))}
            key = name if kind == "datasets/" else f"models/{name}"
            about["Location"] = f"{self.server.stub.store}/store/{key}/{commit}/{quote(path)}?Signature={SIGNATURE}"
            self._send(302, b"", about)
        else:
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            self._file(files[path], (int(span[1]), int(span[2]) + 1) if span else None, about)

    def _find(self, kind: str, name: str, revision: str | None, files: bool) -> tuple[str, Files] | None:
        """Commit and files of a repository, or None after a refusal."""
        key = name if kind == "datasets/" else f"models/{name}"
        repository = self.server.stub.repositories.get(key)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None:
            self._refuse(404, "RepoNotFound")
            return None
        if given != repository.token and (repository.private or (repository.gated and files)):
            code = "GatedRepo" if repository.gated else "RepoNotFound"
            self._refuse(403 if given and repository.gated else 401, code)
            return None
        commit = repository.newest if revision in (None, "main") else revision
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def _file(self, content: bytes, span: tuple[int, int] | None, headers: Mapping[str, str] | None = None) -> None:
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **(headers or {})}
        if span is None or self._fault.whole:
            self._send(200, content, headers)
        elif span[0] >= len(content):
            self._refuse(416)
        else:
            stop = min(span[1], len(content))
            stop = stop if self._fault.short is None else min(stop, span[0] + self._fault.short)
            headers["Content-Range"] = f"bytes {span[0]}-{stop - 1}/{len(content)}"
            self._send(206, content[span[0] : stop], headers)

    def _json(self, content: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(
            status, b"", {**self._fault.headers, **(headers or {}), **{key: text for key, text in said.items() if text}}
        )

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self._fault.cut
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None and cut < len(body):
            if self._fault.hang:
                self.server.stub.stopping.wait()
            self._break()

    def _break(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        drop(self.connection, self._fault.reset)


def _entry(files: Files, path: str) -> dict[str, Any]:
    oid = hashlib.sha1(path.encode()).hexdigest()
    if path in files:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": oid}
    return {"type": "directory", "path": path, "size": 0, "oid": oid}
