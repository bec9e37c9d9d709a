"""Which commit and which files, by the real client libraries, from a loopback hub that fails on demand."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hub_stub import Asked, Fault, HubStub, always, in_turn, local_hub, point_at

from polyglu.data import hub_errors
from polyglu.data.hub import HubUnreachable, Retries, dataset_files, download_file, resolve_revision
from polyglu.errors import PolygluError

QUICK = Retries(attempts=4, first_wait=0.001, longest_wait=0.002)
PAGE = "https://huggingface.co/datasets/org/name"
CANARY = "hf_canaryABCDEFGHIJKLMNOPQRSTUVWXYZ"
FILES = {
    "README.md": b"""---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/*.parquet}
  - {split: test, path: small/held/out.parquet}
- config_name: large
  data_files: large/*.jsonl
---
A card.
""",
    "small/b.parquet": b"the second file",
    "small/a.parquet": b"the first",
    "small/held/out.parquet": b"for tests",
    "large/rows.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "large/empty.jsonl": b"",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """Run a hub that holds org/name, for this process."""
    with local_hub(tmp_path / "hf", monkeypatch) as stub:
        stub.commit("org/name", FILES)
        yield stub


def test_revision_is_the_newest_commit(hub: HubStub) -> None:
    first = hub.repositories["org/name"].newest
    second = hub.commit("org/name", {**FILES, "more": b""})
    assert resolve_revision("org/name") == resolve_revision("org/name", "main") == second != first
    assert resolve_revision("org/name", first) == first


def test_files_of_a_split_in_the_order_of_datasets(hub: HubStub) -> None:
    hub.page = 2
    commit = resolve_revision("org/name")
    small = dataset_files("org/name", "small", "train", commit, QUICK)
    assert [(file.path, file.kind) for file in small] == [
        ("small/a.parquet", ".parquet"),
        ("small/b.parquet", ".parquet"),
    ]
    assert [file.bytes for file in small] == [len(FILES[file.path]) for file in small]
    (held,) = dataset_files("org/name", "small", "test", commit, QUICK)
    assert held.open().read() == FILES["small/held/out.parquet"]
    large = dataset_files("org/name", "large", "train", commit, QUICK)
    assert {file.path: file.open().read() for file in large} == {
        path: FILES[path] for path in ("large/empty.jsonl", "large/rows.jsonl")
    }


@pytest.mark.parametrize("name", ["train.txt", "data/train-00000-of-00001.jsonl.gz", "data/träin 100% #1?&+.json"])
def test_any_file_name_without_a_card(hub: HubStub, name: str) -> None:
    (file,) = dataset_files("org/bare", None, "train", hub.commit("org/bare", {name: b"content"}), QUICK)
    assert (file.path, file.bytes, file.open().read()) == (name, 7, b"content")


def test_sizes_of_many_files_take_few_requests(hub: HubStub) -> None:
    many = {f"data/train-{index:05d}-of-01200.txt": b"x" * (index % 7) for index in range(1200)}
    files = dataset_files("org/many", None, "train", hub.commit("org/many", many), QUICK)
    assert {file.path: file.bytes for file in files} == {path: len(content) for path, content in many.items()}
    assert [file.path for file in files] == sorted(many)
    assert len(hub.requests) < 20 and sum("paths-info" in asked.path for asked in hub.requests) == 3


def test_bytes_are_those_of_the_pinned_commit(hub: HubStub) -> None:
    old = hub.commit("org/moving", {"train.txt": b"the old text"})
    hub.commit("org/moving", {"train.txt": b"a new and longer text", "train2.txt": b""})
    (file,) = dataset_files("org/moving", None, "train", old, QUICK)
    stream = file.open()
    assert stream.read(4) == b"the "
    hub.commit("org/moving", {})
    assert stream.read() == b"old text"
    assert file.open().read() == b"the old text"


@pytest.mark.parametrize(
    ("repository", "sentence"),
    [
        ("no/such", "dataset no/such was not found on the hub: check the name"),
        ("org/private", "dataset org/private was not found on the hub: .* if it is private or gated, .* set HF_TOKEN"),
        ("not a name", "'not a name' is not a hub name of the form owner/name"),
    ],
)
def test_no_access_is_one_sentence(hub: HubStub, repository: str, sentence: str) -> None:
    hub.commit("org/private", FILES, private=True, token="hf_other")
    with pytest.raises(PolygluError, match=sentence):
        resolve_revision(repository)


def test_unknown_revision_is_one_sentence(hub: HubStub) -> None:
    with pytest.raises(
        PolygluError, match=f"dataset org/name has no such revision; its history is at {PAGE}/commits/main"
    ):
        resolve_revision("org/name", "missing")
    with pytest.raises(PolygluError, match="has no such revision"):
        dataset_files("org/name", "small", "train", "e" * 40, QUICK)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault(status=403), rf"dataset org/name: access denied \(403\): accept its licence at {PAGE} and set HF_TOKEN"),
        (Fault(status=401), rf"dataset org/name: access denied \(401\): accept its licence at {PAGE} and set HF_TOKEN"),
        (
            Fault(status=401, message=hub_errors.INVALID_TOKEN),
            r"does not accept the token it was given \(401\); set HF_TOKEN to one from https://huggingface.co/settings/tokens",
        ),
        (
            Fault(status=429),
            r"dataset org/name: the hub throttles this machine \(429\); wait some minutes, or set HF_TOKEN",
        ),
        (Fault(status=503), r"the hub could not serve dataset org/name \(status 503\); try again later\.$"),
        (Fault(cut=-1), "dataset org/name needs the Hugging Face hub, which cannot be reached"),
        (Fault(hang=True), "dataset org/name needs the Hugging Face hub, which cannot be reached .*timed out"),
    ],
)
def test_every_refusal_is_one_sentence(
    hub: HubStub, fault: Fault, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries = replace(QUICK, timeout=0.5) if fault.hang else QUICK
    if fault.hang:
        monkeypatch.setattr(hub_errors, "LONGEST_SILENCE", 0.5)  # access is checked without a time limit
    commit = resolve_revision("org/name")
    hub.plan = always("/api/", fault)
    for ask in (
        lambda: resolve_revision("org/name", retries=retries),
        lambda: dataset_files("org/name", "small", "train", commit, retries),
    ):
        with pytest.raises(PolygluError, match=sentence) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_passing_failures_are_waited_out_everywhere(hub: HubStub) -> None:
    bad = Fault(status=520)  # one that the client library does not retry
    hub.plan = in_turn("/api/datasets/org/name$", bad, Fault(cut=-1))
    assert resolve_revision("org/name", retries=QUICK) == hub.repositories["org/name"].newest
    for where in ("README", "auth-check", "yaml", "dataset_infos", "tree", "paths-info"):
        commit = hub.commit("org/name", {**FILES, where: b""})  # another one, of which nothing is cached
        hub.plan = in_turn(where, bad, bad)
        assert len(dataset_files("org/name", "small", "train", commit, QUICK)) == 2, where
        assert hub.plan(Asked("GET", where, None, False)) is None, f"{where} was never asked for"


def test_a_description_out_of_reach_is_not_taken_for_none(hub: HubStub) -> None:
    files = {
        "train.jsonl": b"{}\n",
        "other.jsonl": b"{}\n",
        ".huggingface.yaml": b"configs:\n- {config_name: a, data_files: other.jsonl}\n",
    }
    commit = hub.commit("org/described", files)
    hub.plan = always("yaml", Fault(status=520))
    with pytest.raises(HubUnreachable, match="could not serve dataset org/described"):
        dataset_files("org/described", None, "train", commit, QUICK)
    hub.plan = lambda asked: None
    assert [file.path for file in dataset_files("org/described", None, "train", commit, QUICK)] == ["other.jsonl"]


def test_data_prepared_earlier_do_not_stand_in(hub: HubStub) -> None:
    prepared = Path(datasets.config.HF_DATASETS_CACHE) / "org___name/small/0.0.0/abc"
    prepared.mkdir(parents=True)
    (prepared / "dataset_info.json").write_text("{}")
    hub.plan = always("/tree/", Fault(status=520))
    with pytest.raises(HubUnreachable, match="could not serve dataset org/name"):
        dataset_files("org/name", "small", "train", resolve_revision("org/name"), QUICK)


def test_gated_dataset_says_where_to_accept_before_any_listing(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.commit("org/name", FILES, gated=True, token=CANARY)
    assert resolve_revision("org/name") == commit  # its page is public
    hub.requests.clear()
    for token in ("", "hf_of_someone_else"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            PolygluError, match=f"dataset org/name is gated: accept its licence at {PAGE} and set HF_TOKEN"
        ):
            dataset_files("org/name", "small", "train", commit, QUICK)
    assert {asked.path for asked in hub.requests if "agent" not in asked.path} == {"/api/datasets/org/name/auth-check"}
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert len(dataset_files("org/name", "small", "train", commit, QUICK)) == 2


def test_without_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", tmp_path, monkeypatch)
    for ask in (
        lambda: resolve_revision("a/b", retries=QUICK),
        lambda: dataset_files("a/b", None, "train", "c" * 40, QUICK),
    ):
        with pytest.raises(
            HubUnreachable, match="dataset a/b needs the Hugging Face hub, which cannot be reached .*refused"
        ):
            ask()


def test_offline_mode_says_so_at_once(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sentence = "needs the Hugging Face hub, but HF_HUB_OFFLINE is set; unset it, or use a local copy"
    with pytest.raises(HubUnreachable, match=f"dataset org/name {sentence}"):
        resolve_revision("org/name")
    with pytest.raises(HubUnreachable, match=f"dataset org/name {sentence}"):
        dataset_files("org/name", "small", "train", "c" * 40)
    assert not hub.requests


@pytest.mark.parametrize(
    ("files", "config", "split", "sentence"),
    [
        (FILES, "smal", "train", "dataset org/odd has no configuration 'smal'; it has small, large"),
        (FILES, None, "train", "dataset org/odd has several configurations; give one: small, large"),
        (FILES, "small", "validation", "has no split 'validation' in configuration 'small'; it has train, test"),
        ({"train.txt": b""}, "x", "train", "has no configuration 'x'; it has default"),
        ({"train.csv": b"a\n1\n"}, None, "train", "is made of csv files, which cannot be read here"),
        ({"train.jsonl.xz": b""}, None, "train", "train.jsonl.xz is of an unknown kind"),
        ({"notes.xyz": b""}, None, "train", "dataset org/odd cannot be read by the library datasets: "),
        ({"README.md": b"---\nconfigs: [\n---\n"}, None, "train", "cannot be read by the library datasets: "),
        ({"README.md": b"---\nconfigs: 3\n---\n", "a.txt": b""}, None, "train", "cannot be read by the library"),
        ({"odd.py": b"import os; os.abort()", "a.txt": b""}, None, "train", "scripts are no longer supported"),
        ({"README.md": b"---\nconfigs:\n- {config_name: a, data_files: n/*.txt}\n---\n"}, None, "train", "cannot be"),
    ],
)  # fmt: skip
def test_a_dataset_that_does_not_fit_is_one_sentence(
    hub: HubStub, files: dict[str, bytes], config: str | None, split: str, sentence: str
) -> None:
    with pytest.raises(PolygluError, match=sentence) as caught:
        dataset_files("org/odd", config, split, hub.commit("org/odd", files), QUICK)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, HubUnreachable)


def test_data_files_of_another_place_are_refused(hub: HubStub) -> None:
    hub.commit("org/other", {"secret.txt": b""})
    for place in ("hf://datasets/org/other/secret.txt", f"{hub.url}/datasets/org/other/resolve/main/secret.txt"):
        card = f"---\nconfigs:\n- {{config_name: a, data_files: '{place}'}}\n---\n".encode()
        with pytest.raises(PolygluError, match="dataset org/odd (names a data file outside|cannot be read by)"):
            dataset_files("org/odd", None, "train", hub.commit("org/odd", {"README.md": card, "a.txt": b""}), QUICK)


def test_of_many_configurations_the_likely_ones_are_listed(hub: HubStub) -> None:
    names = [f"CC-MAIN-20{year}-{week}" for year in range(13, 25) for week in range(10, 14)] + ["sample-10BT"]
    card = "---\nconfigs:\n" + "".join(f"- {{config_name: {name}, data_files: a.txt}}\n" for name in names) + "---\n"
    commit = hub.commit("org/crawl", {"README.md": card.encode(), "a.txt": b""})
    with pytest.raises(
        PolygluError, match="no configuration 'sample10BT'; it has sample-10BT, .* and 29 more"
    ) as caught:
        dataset_files("org/crawl", "sample10BT", "train", commit, QUICK)
    assert len(str(caught.value)) < 500


def test_a_local_folder_of_the_same_name_is_no_dataset(
    hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/name/train.txt").write_text("not this")
    monkeypatch.chdir(tmp_path)
    assert len(dataset_files("org/name", "small", "train", resolve_revision("org/name"), QUICK)) == 2


def test_download_comes_from_the_cache_when_the_hub_is_away(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("models/org/words", {"tokenizer.json": json.dumps({"a": 1}).encode()})
    path = download_file("org/words", "tokenizer.json")
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(PolygluError, match="model org/words, file no.json is not on the hub"):
        download_file("org/words", "no.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert download_file("org/words", "tokenizer.json") == path
    with pytest.raises(HubUnreachable, match="model org/none needs the Hugging Face hub, but HF_HUB_OFFLINE is set"):
        download_file("org/none", "tokenizer.json")
