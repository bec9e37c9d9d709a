"""Reading a hub's files while it fails in every way: the same bytes as from the disk, or one sentence."""

import io
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stub import SIGNATURE, Asked, Fault, HubStub, always, in_turn, local_hub
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.data import hub as hub_module
from polyglu.data import hub_errors
from polyglu.data.hub import HubUnreachable, Retries, dataset_files
from polyglu.errors import PolygluError

QUICK = Retries(attempts=4, first_wait=0.001, longest_wait=0.002)
IMPATIENT = replace(QUICK, timeout=0.5)
STUBBORN = replace(IMPATIENT, attempts=100)
PAGE = "https://huggingface.co/datasets/org/one"
CANARY = "hf_canaryABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """Run a hub for this process."""
    with local_hub(tmp_path / "hf", monkeypatch) as stub:
        yield stub


def table(rows: range) -> bytes:
    """Build a Parquet file of 50 rows a row group."""
    file = io.BytesIO()
    texts = pa.table({"n": list(rows), "text": [f"row {row} " * 20 for row in rows]})
    pq.write_table(texts, file, row_group_size=50, compression="none", use_dictionary=False)
    return file.getvalue()


TABLES = {"train-1.parquet": table(range(400)), "train-2.parquet": table(range(400, 600))}


def one_file(hub: HubStub, content: bytes, retries: Retries = QUICK) -> BinaryIO:
    """Open the only file of a dataset."""
    (file,) = dataset_files("org/one", None, "train", hub.commit("org/one", {"train.txt": content}), retries)
    hub.requests.clear()
    return file.open()


class Shaky:
    """Half of the answers fail, each in one of many ways, as a seed says."""

    def __init__(self, seed: int, hang: bool = False) -> None:
        self.random, self.hang = random.Random(seed), hang

    def __call__(self, asked: Asked) -> Fault | None:
        if asked.span is None or self.random.random() < 0.4:
            return None
        cut = self.random.randrange(-1, asked.span[1] - asked.span[0])
        faults = [
            Fault(cut=cut),
            Fault(cut=cut, reset=True),
            Fault(whole=True),
            Fault(whole=True, cut=max(cut, 0)),
            Fault(short=max(cut, 0)),
        ]
        faults += [Fault(status=status) for status in (408, 500, 502, 503, 504, 520)]
        faults += [Fault(status=429, headers={"Retry-After": "0"}), Fault(hang=self.hang, cut=max(cut, 0))]
        return self.random.choice(faults)


def test_any_read_equals_the_local_file_whatever_fails(hub: HubStub) -> None:
    content = random.Random(7).randbytes(2000)
    commit = hub.commit("org/one", {"train.txt": content})
    (file,) = dataset_files("org/one", None, "train", commit, STUBBORN)
    places = st.tuples(st.integers(0, 2100), st.integers(0, 700))

    @settings(deadline=None, max_examples=60)
    @given(seed=st.integers(0, 2**32), reads=st.lists(places, min_size=1, max_size=6), ahead=st.integers(20, 900))
    def check(seed: int, reads: list[tuple[int, int]], ahead: int) -> None:
        hub.plan = Shaky(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hub_module, "READ_AHEAD", ahead)
            remote, local = file.open(), io.BytesIO(content)
        for position, length in reads:
            assert remote.seek(position) == local.seek(position)
            assert remote.read(length) == local.read(length)
            assert remote.tell() == local.tell()
        assert remote.seek(-5, io.SEEK_END) == 1995
        assert remote.read() == content[-5:]

    check()
    assert len(hub.reads("train.txt")) > 500


@pytest.mark.parametrize("signed", [False, True])
def test_row_groups_are_read_by_pyarrow_while_connections_drop_and_hang(hub: HubStub, signed: bool) -> None:
    hub.signed = signed
    files = dataset_files("org/two", None, "train", hub.commit("org/two", TABLES), STUBBORN)
    for seed, file in enumerate(files):
        hub.plan = Shaky(seed, hang=True)
        remote, local = pq.ParquetFile(file.open()), pq.ParquetFile(io.BytesIO(TABLES[file.path]))
        assert remote.num_row_groups == local.num_row_groups > 3
        for group in (2, 0, 3, 1):
            assert remote.read_row_group(group, columns=["text"]) == local.read_row_group(group, columns=["text"])


def test_a_broken_read_continues_at_the_byte(hub: HubStub, caplog: pytest.LogCaptureFixture) -> None:
    stream = one_file(hub, bytes(range(200)), IMPATIENT)
    broken = (Fault(cut=60), Fault(status=503), Fault(cut=-1), Fault(cut=40, hang=True), Fault(cut=0, reset=True))
    hub.plan = in_turn("resolve", *broken)
    with caplog.at_level(logging.WARNING):
        assert stream.read() == bytes(range(200))
    assert hub.reads("train.txt") == [(0, 200), (60, 200), (60, 200), (60, 200), (100, 200), (100, 200)]
    said = [record.getMessage() for record in caplog.records if record.name.startswith("polyglu")]
    assert all(line.startswith("dataset org/one, file train.txt: ") for line in said)
    # Bytes that came make up for the failures before them.
    assert [line.split("attempt ")[1] for line in said] == [f"{n} of 4 in 0.0 s" for n in (2, 3, 4, 2, 3)]


def test_reading_ahead_is_bounded_and_nothing_is_read_twice(hub: HubStub) -> None:
    size = 2 * hub_module.READ_AHEAD + 1000
    content = random.Random(1).randbytes(size)
    stream = one_file(hub, content)
    assert b"".join(iter(lambda: stream.read(100_000), b"")) == content
    spans = hub.reads("train.txt")
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == size
    assert all(stop - start <= hub_module.READ_AHEAD for start, stop in spans) and len(spans) == 3


def test_it_gives_up_after_so_many_failures_in_a_row_and_can_go_on_later(hub: HubStub) -> None:
    stream = one_file(hub, b"0123456789" * 9)
    hub.plan = in_turn("resolve", Fault(cut=30), *[Fault(status=502)] * 3)
    sentence = (
        r"the hub could not serve dataset org/one, file train.txt \(status 502\).*the same command continues where"
    )
    with pytest.raises(HubUnreachable, match=sentence):
        stream.read(50)
    assert hub.reads("train.txt") == [(0, 90), (30, 90), (30, 90), (30, 90)]
    hub.plan = lambda asked: None
    assert stream.tell() == 0 and stream.read() == b"0123456789" * 9


def test_answers_without_a_byte_count_as_failures(hub: HubStub) -> None:
    stream = one_file(hub, b"0123456789")
    hub.plan = always("resolve", Fault(short=0))
    with pytest.raises(HubUnreachable, match=r"file train.txt .*\(the answer ended early"):
        stream.read()
    hub.plan = always("resolve", Fault(short=3))
    assert stream.read() == b"0123456789"


def test_giving_up_passes_through_pyarrow(hub: HubStub) -> None:
    file = dataset_files("org/two", None, "train", hub.commit("org/two", TABLES), QUICK)[0]
    stream = pq.ParquetFile(file.open())
    hub.plan = always("resolve", Fault(cut=-1))
    with pytest.raises(
        HubUnreachable, match="file train-1.parquet needs the Hugging Face hub, which cannot be reached"
    ):
        stream.read_row_group(1)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            Fault(status=403, code="GatedRepo"),
            f"file train.txt is gated: accept its licence at {PAGE} and set HF_TOKEN",
        ),
        (Fault(status=403), r"file train.txt: access denied \(403\): accept its licence at"),
        (Fault(status=401), r"file train.txt: access denied \(401\): accept its licence at"),
        (Fault(status=404, code="RepoNotFound"), "file train.txt was not found on the hub"),
        (Fault(status=404, code="EntryNotFound"), "dataset org/one, file train.txt is not on the hub"),
        (Fault(status=404), "dataset org/one, file train.txt is not on the hub"),
        (
            Fault(status=429, headers={"Retry-After": "3600"}),
            "file train.txt: the hub throttles .* wait 3600 s.*continues",
        ),
        (
            Fault(status=429, headers={"RateLimit": '"resolvers";r=0;t=777'}),
            "wait 777 s, or set HF_TOKEN, which raises",
        ),
    ],
)
def test_a_refusal_in_mid_file_is_one_sentence_at_once(hub: HubStub, fault: Fault, sentence: str) -> None:
    stream = one_file(hub, b"x" * 100)
    hub.plan = in_turn("resolve", Fault(cut=50), fault)
    with pytest.raises(PolygluError, match=sentence):
        stream.read()
    assert hub.reads("train.txt") == [(0, 100), (50, 100)]


def test_the_wait_is_what_the_hub_asks_for(hub: HubStub, caplog: pytest.LogCaptureFixture) -> None:
    stream = one_file(hub, b"text")
    hub.plan = in_turn("resolve", Fault(status=429, headers={"Retry-After": "1"}))
    with caplog.at_level(logging.WARNING):
        assert stream.read() == b"text"
    assert "file train.txt: status 429; attempt 2 of 4 in 1.0 s" in caplog.text


def test_waits_grow_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(hub_errors.time, "sleep", waits.append)
    target, error = hub_errors.Target("a/b", "dataset"), ConnectionError("broken")
    retries = Retries()
    for failures in range(1, retries.attempts):
        hub_errors.wait_or_raise(error, failures, target, retries)
    with pytest.raises(HubUnreachable, match="broken"):
        hub_errors.wait_or_raise(error, retries.attempts, target, retries)
    bounds = [min(2.0**index, retries.longest_wait) for index in range(retries.attempts - 1)]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert 100 < sum(waits) < 600


def test_the_token_goes_to_the_hub_only_and_is_never_said(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.signed = True
    said: list[str] = []
    with caplog.at_level(logging.WARNING):
        files_and_card = {**TABLES, "README.md": b"A card."}
        commit = hub.commit("org/name", files_and_card, gated=True, token=CANARY)
        files = dataset_files("org/name", None, "train", commit, QUICK)
        hub.plan = in_turn("/store/", Fault(cut=10), Fault(status=500), Fault(cut=-1))
        assert files[0].open().read() == TABLES[files[0].path]
        for fault in (Fault(status=403), Fault(status=404), Fault(status=500), Fault(status=400), Fault(cut=-1)):
            hub.plan = always("/store/", fault)
            with pytest.raises(PolygluError) as caught:
                files[0].open().read()
            said.append(str(caught.value))
    asked = {("store" in one.path, one.authorized) for one in hub.requests if "agent" not in one.path}
    assert asked == {(True, False), (False, True)}
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    everything = "\n".join([*said, caplog.text, *capfd.readouterr(), written.decode(errors="replace")])
    assert len(said) == 5 and "attempt 2 of 4" in everything and "A card." in everything
    for secret in (CANARY, SIGNATURE, "Signature="):
        assert secret not in everything
    assert not (tmp_path / "hf/token").exists()
