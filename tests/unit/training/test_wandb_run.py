"""W&B's library against a server on this machine: a run goes on whatever the server does, and is one run to it."""

import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from polyglu.model.config import WandbSection
from polyglu.training import wandb_run
from polyglu.training.metrics import METRICS_FILE, MetricsLog, read_metrics
from polyglu.training.wandb_run import open_wandb

wandb = pytest.importorskip("wandb")
KEY = "0123456789abcdef" * 2 + "feedf00d"
VALUES = {
    "train/loss": 2.5, "train/lr": 1e-3, "train/tau": 0.7, "train/tokens_per_sec": 1.0, "train/mfu": 0.1,
    "train/mfu_attention": 0.12,
    "train/peak_memory_gb": 1.0,
}  # fmt: skip
ENTITY = {"id": "e", "name": "somebody"}
PROJECT = {"id": "p", "name": "polyglu", "entity": ENTITY}


class Server(ThreadingHTTPServer):
    """As much of W&B's server as its library needs; ``fault`` says how it misbehaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = ""
        self.released = threading.Event()
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.alerts: list[tuple[str, str, str]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no news."""

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or ""
        if "query Viewer" in query:
            return {"viewer": {"id": "u", "entity": "somebody", "username": "x", "flags": "{}", "teams": {"edges": []}}}
        if "query RunResumeStatus" in query:
            rows = self.history.get(name)
            bucket = rows and {
                "id": "b", "name": name, "displayName": name, "config": "{}", "tags": [], "wandbConfig": '{"t": 1}',
                "summaryMetrics": json.dumps(rows[-1]), "historyTail": json.dumps([json.dumps(rows[-1])]),
                "historyLineCount": len(rows), "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]",
            }  # fmt: skip
            return {"model": {**PROJECT, "bucket": bucket}}
        if "mutation UpsertBucket" in query:
            bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": PROJECT}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
        if "mutation CreateRunFiles" in query:
            url = f"http://127.0.0.1:{self.server_port}/files/"
            files = [{"name": file, "uploadUrl": url + file} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "mutation NotifyScriptableRunAlert" in query:
            self.alerts.append((variables["title"], variables["text"], variables["severity"]))
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}

    def stream(self, run: str, content: dict[str, Any]) -> None:
        if history := content.get("files", {}).get("wandb-history.jsonl"):
            rows = self.history.setdefault(run, [])
            rows[history["offset"] :] = [json.loads(line) for line in history["content"]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.fault == "hang":
            self.server.released.wait(60)
        if self.server.fault in ("hang", "close"):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        answer: dict[str, Any] = {}
        if self.path.startswith("/graphql") and not self.server.fault:
            request = json.loads(body)
            answer = {"data": self.server.answer(request["query"], request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        text = json.dumps(answer).encode()
        self.send_response({"error": 500, "wrong key": 401}.get(self.server.fault, 200))
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = respond  # noqa: N815  # the base class's names


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that works, a made-up key for it, and waits that are short."""
    server = Server()
    with suppress(Exception):
        wandb.teardown()  # an earlier test's
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    waits = {"INIT_SECONDS": 5.0, "FINISH_SECONDS": 3.0, "REQUEST_SECONDS": 1.0, "REQUEST_RETRIES": 1}
    for name, value in waits.items():
        monkeypatch.setattr(wandb_run, name, value)
    (tmp_path / "run").mkdir()
    yield server
    server.released.set()
    with suppress(Exception):
        wandb.teardown(0)
    for process in [item for item in gc.get_objects() if type(item) is subprocess.Popen]:
        process.poll()  # W&B forgets its process when that was killed
    server.shutdown()
    server.server_close()


def open_log(folder: Path, mode: Any = "online", start_step: int = 0, wandb_id: str | None = None) -> MetricsLog:
    return MetricsLog(folder / "run", WandbSection(mode=mode), {"a": 1}, start_step, 100, wandb_id)


def steps(rows: list[dict[str, Any]]) -> list[tuple[int, int | None]]:
    return [(row["step"], row.get("repeated")) for row in rows]


def two_lives(folder: Path, mode: str) -> str:
    """A run with a rollback that is killed after step 3 and resumed at 2; its id."""
    log = open_log(folder, mode)
    for step in (1, 2):
        log.log(step, VALUES)
    log.rewind(1, attempt=1)
    log.log(2, VALUES, attempt=1)
    log.log(3, VALUES, attempt=1)
    log.event(3, "quiet", "A note.")
    log.event(3, "loss spike", "High.", "warning")
    log.event(3, "loss spike", "High again.", "warning")
    log.close()
    run_id = log.wandb_id
    assert run_id is not None
    resumed = open_log(folder, mode, start_step=2, wandb_id=run_id)
    assert resumed.wandb_id == run_id
    resumed.log(3, VALUES, attempt=1)
    resumed.log(4, VALUES, attempt=1)
    resumed.event(4, "rollback", "Bad.", "error")
    resumed.close()
    assert steps(read_metrics(folder / "run" / METRICS_FILE)) == [(1, None), (2, 1), (3, None), (4, None)]
    return run_id


AT_THE_SERVER = [(1, None), (2, None), (2, 1), (3, None), (3, None), (4, None)]
ALERTS = [
    ("loss spike", "step 3: High.", "WARN"),
    ("quiet", "step 3: A note.", "INFO"),
    ("rollback", "step 4: Bad.", "ERROR"),
]


def kept_files(folder: Path, name: str) -> bytes:
    """What W&B has written into the one folder of that name when its process has ended."""
    wandb.teardown(0)
    (kept,) = (folder / "run/wandb").glob(f"{name}/*.wandb")
    return kept.read_bytes()


def assert_key_is_nowhere(folder: Path, *texts: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert not any(KEY in text for text in texts)


def test_a_resumed_run_is_one_run_and_repeated_steps_are_shown(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    run_id = two_lives(tmp_path, "online")
    assert steps(server.history[run_id]) == AT_THE_SERVER
    assert sorted(server.alerts) == ALERTS
    assert_key_is_nowhere(tmp_path, caplog.text, *capfd.readouterr())


def test_pieces_kept_offline_are_joined_by_a_sync(server: Server, tmp_path: Path) -> None:
    run_id = two_lives(tmp_path, "offline")
    assert server.history == {}
    command = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "run/wandb")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert steps(server.history[run_id]) == AT_THE_SERVER
    assert sorted(server.alerts) == ALERTS


@pytest.mark.parametrize("fault", ["refused", "error", "hang", "close", "wrong key"])
def test_a_server_that_is_not_there_leaves_the_run_offline(
    server: Server,
    tmp_path: Path,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(wandb_run, "INIT_SECONDS", 1.0)
    server.fault = fault
    if fault == "refused":
        server.shutdown()
        server.server_close()
    log = open_log(tmp_path)
    log.log(1, VALUES)
    log.event(1, "loss spike", "High.", "warning")
    log.close()
    (warning,) = [message for message in caplog.messages if message.startswith("W&B fails")]
    assert warning.endswith("it goes on offline.")
    assert steps(read_metrics(tmp_path / "run" / METRICS_FILE)) == [(1, None)]
    assert b"train/tokens_per_sec" in kept_files(tmp_path, f"offline-run-*-{log.wandb_id}")
    assert_key_is_nowhere(tmp_path, caplog.text, *capfd.readouterr())


@pytest.mark.timeout(120)
def test_a_server_that_is_lost_does_not_hold_the_end_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds; by itself the library asks for many minutes whether an alert has arrived."""
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 1.0)
    log = open_log(tmp_path)
    server.fault = "hang"
    for step in range(1, 20):
        log.log(step, VALUES)
    log.event(20, "loss spike", "High.", "warning")
    log.close()
    assert b"train/tokens_per_sec" in kept_files(tmp_path, f"run-*-{log.wandb_id}")


def test_without_its_process_the_run_goes_on_offline_and_then_without(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def kill() -> None:
        found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
        (pid,) = [int(line.split()[0]) for line in found.stdout.splitlines() if "bin/wandb-core" in line]
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    log = open_log(tmp_path)
    for step in range(1, 8):
        if step in (3, 5):
            kill()
            time.sleep(0.2)  # until the library sees its connection closed
        log.log(step, VALUES)
    log.event(8, "loss spike", "High.", "warning")
    log.close()
    ends = [message.rpartition("): ")[2] for message in caplog.messages if message.startswith("W&B fails")]
    assert ends == ["it goes on offline.", "training goes on without it; metrics stay in the run's folder."]
    assert [step for step, _ in steps(read_metrics(tmp_path / "run" / METRICS_FILE))] == list(range(1, 8))


def test_a_fault_of_the_library_is_told_without_the_key(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError(f"no run for {KEY}")

    monkeypatch.setattr(wandb, "init", fail)
    log = open_log(tmp_path)
    log.log(1, VALUES)
    log.close()
    assert caplog.text.count("RuntimeError: no run for <key>") == 2 and KEY not in caplog.text


@pytest.mark.parametrize(
    ("mode", "key", "modes"),
    [
        ("auto", True, ["online", "offline"]),
        ("auto", False, ["offline"]),
        ("online", False, ["online", "offline"]),
        ("offline", True, ["offline"]),
        ("disabled", True, None),
    ],
)
def test_where_a_run_goes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, key: bool, modes: list[str] | None
) -> None:
    tried: list[str] = []

    def record(**options: Any) -> None:
        tried.append(options["mode"])
        raise RuntimeError

    monkeypatch.setattr(wandb, "init", record)
    if not key:
        monkeypatch.delenv("WANDB_API_KEY")
    run = open_wandb(tmp_path, WandbSection(mode=mode), {}, None)
    assert (tried if run is not None else None) == modes
