"""Tokenising a hub dataset as a person does, against a hub on the loopback device that fails on demand."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stub import SIGNATURE, Fault, HubStub, always, environment, in_turn, point_at
from huggingface_hub.utils import close_session

from polyglu.data.chunk_writer import end_cursor
from polyglu.data.sources import TextSource
from polyglu.data.tokenize_dataset import tokenize_source
from polyglu.data.tokenizer import Tokenizer, train_bpe
from polyglu.errors import PolygluError

ROOT = Path(__file__).parents[2]
CANARY = "hf_canaryABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHUNK_TOKENS = 200_000
CARD = (
    b"---\nconfigs:\n- {config_name: math, data_files: math/*.parquet}\n- {config_name: web, data_files: web/*}\n---\n"
)


def table(seed: int) -> bytes:
    """Build a Parquet file of 8 row groups, 3.9 MB, whose text column lies between others."""
    draw, file = random.Random(seed), io.BytesIO()
    words = [f"{draw.randrange(10_000)} plus {draw.randrange(100)} is a number" for _ in range(500)]
    columns = {
        "id": [str(row) for row in range(400)],
        "text": [" ".join(draw.choices(words, k=350)) for _ in range(400)],
        "raw": [draw.randbytes(900) for _ in range(400)],
    }
    pq.write_table(pa.table(columns), file, row_group_size=50, compression="none", use_dictionary=False)
    return file.getvalue()


TABLES = {f"math/{name}.parquet": table(seed) for seed, name in enumerate("abcd")}


@pytest.fixture
def hub() -> Iterator[HubStub]:
    """Start a hub with a gated dataset, whose files lie in a store of signed URLs."""
    with HubStub(signed=True) as stub:
        stub.commit("org/name", {"README.md": CARD, **TABLES, "web/x.jsonl": b"{}"}, gated=True, token=CANARY)
        yield stub


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(["12 plus 3 is a number " * 9], 270, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Tokenise the same files from the disk."""
    tmp_path = tmp_path_factory.mktemp("disk")
    for name, content in TABLES.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(content)
    files = tuple(str(tmp_path / "local" / name) for name in TABLES)
    tokenize_source(TextSource(files=files, output=str(tmp_path / "expected")), tokenizer, CHUNK_TOKENS)
    return chunks(tmp_path / "expected")


def chunks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("chunk_*.bin"))}


@contextmanager
def running(
    hub: HubStub, folder: Path, tokenizer: Tokenizer, token: str = CANARY, config: str = "math"
) -> Iterator[subprocess.Popen[str]]:
    """Run the command, its output and caches in ``folder``; it does not outlive the test."""
    tokenizer.save(folder / "tokenizer")
    given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    given |= environment(hub.url, folder / "hf") | {"OMP_NUM_THREADS": "1"} | ({"HF_TOKEN": token} if token else {})
    line = ["-m", "src.data.tokenize_dataset", "--dataset", "org/name", "--config", config, "--chunk-tokens"]
    line += [str(CHUNK_TOKENS), "--tokenizer", str(folder / "tokenizer"), "--output", str(folder / "out")]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, *line], cwd=ROOT, env=given, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def command_lines() -> Iterator[set[bytes]]:
    """Every command line that any process shows meanwhile."""
    seen: set[bytes] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):  # it has ended
                    seen.add(path.read_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc to see processes in")
def test_chunks_are_those_of_the_local_files_and_the_token_is_nowhere(
    hub: HubStub, tmp_path: Path, tokenizer: Tokenizer, local: dict[str, bytes]
) -> None:
    api = in_turn("auth-check", Fault(status=503))
    files = in_turn(
        "/store/.*parquet", Fault(cut=700), None, Fault(cut=200_000, reset=True), None,
        Fault(status=429, headers={"Retry-After": "0"}), Fault(cut=-1), None, None, Fault(status=500),
    )  # fmt: skip
    hub.plan = lambda asked: api(asked) or files(asked)
    with command_lines() as seen, running(hub, tmp_path, tokenizer) as process:
        said = "".join(process.communicate())
    assert process.returncode == 0, said
    assert chunks(tmp_path / "out") == local and len(local) > 5
    for failure in ("status 503", "status 429", "status 500", "peer closed connection", "attempt 2 of 10"):
        assert failure in said
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any("hf/hub" in str(path) for path in written) and any(b"tokenize_dataset" in line for line in seen)
    for secret in (CANARY, SIGNATURE):
        assert secret not in said
        assert not [path for path, content in written.items() if secret.encode() in content]
        assert not [line for line in seen if secret.encode() in line]
    assert not (tmp_path / "hf/token").exists() and not (tmp_path / "hf/stored_tokens").exists()
    assert {asked.authorized for asked in hub.requests if "/store/" in asked.path} == {False}


def test_a_killed_run_goes_on_at_its_row_group_and_commit(
    hub: HubStub, tmp_path: Path, tokenizer: Tokenizer, local: dict[str, bytes]
) -> None:
    hub.plan = always("/store/.*d.parquet", Fault(hang=True))
    manifest, end = tmp_path / "out/manifest.json", {"file": 0, "row_group": 0}
    with running(hub, tmp_path, tokenizer) as process:
        while (end["file"], end["row_group"]) < (2, 1) and process.poll() is None:
            time.sleep(0.05)
            if manifest.exists():
                end = end_cursor(json.loads(manifest.read_text()))
        process.kill()
        said = "".join(process.communicate())
    assert process.returncode == -signal.SIGKILL, said
    end = end_cursor(json.loads(manifest.read_text()))
    assert end["file"] == 2 and end["row_group"] >= 1

    assert hub.reads("a.parquet") and hub.reads("b.parquet")
    hub.plan = lambda asked: None
    hub.requests.clear()
    hub.commit("org/name", {"README.md": CARD, "math/a.parquet": table(99)})  # meanwhile
    with running(hub, tmp_path, tokenizer) as process:
        said = "".join(process.communicate())
    assert process.returncode == 0, said
    assert chunks(tmp_path / "out") == local
    assert not hub.reads("[ab].parquet")
    text = pq.read_metadata(io.BytesIO(TABLES["math/c.parquet"])).row_group(end["row_group"]).column(1)
    reads = hub.reads("c.parquet")
    assert len(reads) > 1 and all(first >= text.data_page_offset for first, _ in reads)


@pytest.mark.parametrize(
    ("token", "config", "sentence"),
    [
        (
            "",
            "math",
            "dataset org/name is gated: accept its licence at https://huggingface.co/datasets/org/name and set",
        ),
        ("hf_of_another", "math", "dataset org/name is gated: accept its licence at"),
        (CANARY, "maths", "dataset org/name has no configuration 'maths'; it has math, web."),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    hub: HubStub, tmp_path: Path, tokenizer: Tokenizer, token: str, config: str, sentence: str
) -> None:
    with running(hub, tmp_path, tokenizer, token, config) as process:
        output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert errors.splitlines()[-1].startswith(f"error: {sentence}") and "Traceback" not in errors
    assert len([line for line in errors.splitlines() if line.startswith("error")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_to_the_commit_it_was_begun_with(
    hub: HubStub, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(hub.url, tmp_path / "hf", monkeypatch)
    old = hub.commit("org/small", {"train.jsonl": b'{"text": "12 plus 3"}\n'})
    source = TextSource(dataset="org/small", output=str(tmp_path / "out"))
    first = tokenize_source(source, tokenizer, CHUNK_TOKENS)
    assert first["source"]["revision"] == old
    new = hub.commit("org/small", {"train.jsonl": b'{"text": "another"}\n'})
    assert tokenize_source(source, tokenizer, CHUNK_TOKENS) == first
    with pytest.raises(PolygluError, match=f"was made with revision {old}, not {new}"):
        tokenize_source(source.model_copy(update={"revision": new}), tokenizer, CHUNK_TOKENS)
    close_session()
