"""The hub is a small HTTP server on the loopback device, which answers as the hub does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest

from polyglu.data.hub import HubUnreachable, resolve_revision, stream_rows
from polyglu.data.sft_dataset import load_conversations
from polyglu.data.sources import TextSource
from polyglu.data.tokenize_dataset import main, tokenize_source
from polyglu.data.tokenizer import Tokenizer, train_bpe
from polyglu.errors import PolygluError

COMMIT, NEWER = "c" * 40, "d" * 40
ANSWERS: dict[str, tuple[int, str | None]] = {
    "open/data": (200, None),
    "no/such": (404, "RepoNotFound"),
    "private/data": (401, None),
    "gated/data": (403, "GatedRepo"),
    "forbidden/data": (403, None),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Start the server; the yielded dictionary holds the newest commit, which a test may move."""
    state = {"newest": COMMIT}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repository = "/".join(self.path.split("?")[0].split("/")[3:5])
            status, code = ANSWERS.get(repository, (404, "RepoNotFound"))
            if status == 403 and code == "GatedRepo" and "auth-check" not in self.path:
                status, code = 200, None  # a gated dataset's page is public
            body = json.dumps({"id": repository, "sha": state["newest"], "error": "no"}).encode()
            if "/revision/missing" in self.path:
                status, code = 404, "RevisionNotFound"
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def rows_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Let datasets stream a local file for a hub dataset; returns the calls."""
    calls: list[dict[str, Any]] = []
    load = datasets.load_dataset
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {index}"}) + "\n" for index in range(500)))

    def load_dataset(name: str, config: str | None, **settings: Any) -> Any:
        calls.append({"name": name, "config": config, **settings})
        if config == "mistyped":
            raise ValueError("BuilderConfig 'mistyped' not found. Available: ['4plus']")
        return load("json", data_files=str(path), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(["row 1 "] * 9, 262, tmp_path_factory.mktemp("bpe"))


def test_revision_is_a_commit(hub: dict[str, str]) -> None:
    assert resolve_revision("open/data") == COMMIT


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("no/such", "dataset no/such was not found on the hub: check the name"),
        ("private/data", "dataset private/data.*set HF_TOKEN"),
        ("forbidden/data", "dataset forbidden/data.*https://huggingface.co/datasets/forbidden/data.*HF_TOKEN"),
        ("not a name", "'not a name' is not a hub name"),
    ],
)
def test_no_access_is_one_sentence(hub: dict[str, str], repository: str, message: str) -> None:
    with pytest.raises(PolygluError, match=message):
        resolve_revision(repository)


def test_unknown_revision_is_one_sentence(hub: dict[str, str]) -> None:
    with pytest.raises(PolygluError, match="no such revision"):
        resolve_revision("open/data", "missing")


def test_gated_dataset_says_where_to_accept_and_leaves_nothing(
    hub: dict[str, str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = TextSource(dataset="gated/data", output=str(tmp_path / "out"))
    page = "https://huggingface.co/datasets/gated/data"
    with pytest.raises(PolygluError, match=f"is gated: accept its licence at {page} and set HF_TOKEN"):
        tokenize_source(source, tokenizer, 100)
    assert not (tmp_path / "out").exists()


def test_without_network_it_says_so(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachable, match="dataset a/b needs the Hugging Face hub, which cannot be reached"):
        resolve_revision("a/b")
    tokenizer.save(tmp_path / "bpe")
    with pytest.raises(HubUnreachable, match="a/b"):
        main(dataset="a/b", output=tmp_path / "out", tokenizer=str(tmp_path / "bpe"))
    assert not (tmp_path / "out").exists()


def test_rows_are_streamed_at_the_commit(hub: dict[str, str], rows_of_the_hub: list[dict[str, Any]]) -> None:
    rows = stream_rows("open/data", "4plus", "train", COMMIT, skip=498)
    assert [row["text"] for row in rows] == ["row 498", "row 499"]
    expected = {"name": "open/data", "config": "4plus", "split": "train", "revision": COMMIT, "streaming": True}
    assert rows_of_the_hub == [expected]


def test_mistyped_configuration_lists_the_known_ones(
    hub: dict[str, str], rows_of_the_hub: list[dict[str, Any]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = TextSource(dataset="open/data", config="mistyped", output=str(tmp_path / "out"))
    with pytest.raises(PolygluError, match=r"config mistyped.*Available: \['4plus'\]"):
        tokenize_source(source, tokenizer, 100)
    assert not (tmp_path / "out").exists()


def test_continuation_reads_the_recorded_commit(
    hub: dict[str, str], rows_of_the_hub: list[dict[str, Any]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = TextSource(dataset="open/data", output=str(tmp_path / "out"))
    first = tokenize_source(source, tokenizer, 100)
    assert first["source"]["revision"] == COMMIT
    hub["newest"] = NEWER
    assert tokenize_source(source, tokenizer, 100) == first
    with pytest.raises(PolygluError, match=f"was made with revision {COMMIT}, not {NEWER}"):
        tokenize_source(source.model_copy(update={"revision": NEWER}), tokenizer, 100)
    assert {call["revision"] for call in rows_of_the_hub} == {COMMIT}


def test_conversations_of_a_gated_dataset(hub: dict[str, str], tokenizer: Tokenizer) -> None:
    with pytest.raises(PolygluError, match="is gated"):
        load_conversations(
            files=[], dataset="gated/data", config=None, splits=("low",), revision=None,
            tokenizer=tokenizer, seq_length=9, max_conversations=None,
        )  # fmt: skip
