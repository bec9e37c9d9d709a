"""Bad input through the commands themselves: one sentence, exit code 2, no traceback, nothing half written."""

import contextlib
import io
import json
import logging
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
import yaml
from httpx import Request, Response
from huggingface_hub.errors import GatedRepoError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyglu import cli
from polyglu.data.chunks import open_source
from polyglu.data.inspect import document_lengths
from polyglu.data.tokenizer import train_bpe
from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model, load_checkpoint, read_checkpoint, save_portable

SMALL = {"d_model": 16, "d_ff": 24, "n_layers": 1, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 8, "seq_length": 64}
READ_CHECKPOINT = {
    "eval": "eval --checkpoint {checkpoint} --tasks demo_arithmetic --data-dir {here} --limit 1 --output {out}/r.json",
    "analyze": "analyze --checkpoint {checkpoint} --output {out}",
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


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    texts = [f"{a} + {b} = {a + b}" for a in range(20) for b in range(20)]
    tokenizer = train_bpe(texts, 280, folder / "tokenizer")
    train_bpe(["other words entirely"] * 9, 270, folder / "other")
    config = ModelConfig(vocab_size=tokenizer.vocab_size, routing_scope="causal", **SMALL)
    save_portable(folder / "good.pt", create_model(config).state_dict(), config, 3, 0.5, tokenizer.identity())
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "arithmetic_test.jsonl").write_text(json.dumps({"question": "1 + 1 =", "answer": "2"}) + "\n")
    messages = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    (folder / "sft.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 4)
    code, said = call(
        f"data tokenize --files {folder}/text.jsonl --tokenizer {folder}/tokenizer --output {folder}/data"
    )
    assert code == 0, said
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Place:
    here, out = tmp_path / "here", tmp_path / "out"
    shutil.copytree(good, here)
    loop = {
        "checkpoint_dir": f"{out}/checkpoints", "run_dir": f"{out}/run", "micro_batch_size": 2, "grad_accum_steps": 1,
        "warmup_steps": 1, "precision": "fp32",
    }  # fmt: skip
    model = read_checkpoint(here / "good.pt").config.model_dump()
    train = {
        "model": model,
        "data": {"sources": {"a": {"path": f"{here}/data", "mix": 1.0, "mix_end": 1.0}}},
        "training": {**loop, "total_steps": 4, "checkpoint_every": 4},
        "wandb": {"mode": "disabled"},
    }
    sft = {
        "data": {"files": [f"{here}/sft.jsonl"], "tokenizer": f"{good}/tokenizer"},
        "training": {**loop, "init_from": f"{here}/good.pt"},
        "wandb": {"mode": "disabled"},
    }
    (here / "train.yaml").write_text(yaml.safe_dump(train))
    (here / "sft.yaml").write_text(yaml.safe_dump(sft))
    return Place(here, out)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands set up logging for their own process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def call(line: str) -> tuple[int, str]:
    """Run ``polyglu`` in this process; exit code and the sentence of the error, if any."""
    said = io.StringIO()
    with mock.patch.object(sys, "argv", ["polyglu", *line.split()]), contextlib.redirect_stderr(said):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
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


@pytest.mark.parametrize("verb", READ_CHECKPOINT)
def test_the_good_files_are_good(place: Place, verb: str) -> None:
    code, said = call(place.line(READ_CHECKPOINT[verb]))
    assert code == 0, said


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.write_text, (self.trace, "executed")


def plain_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [torch.save, plain_pickle], ids=["torch file", "plain pickle"])
@pytest.mark.parametrize("verb", READ_CHECKPOINT)
def test_malicious_checkpoint_is_never_executed(place: Place, verb: str, save: Callable[..., None]) -> None:
    evil, trace = place.here / "evil.pt", place.here / "trace"
    content = torch.load(place.checkpoint, weights_only=True) | {"tokenizer": Malicious(trace)}
    save(*((content, evil) if save is torch.save else (evil, content)))
    sentence = refused(place.line(READ_CHECKPOINT[verb], checkpoint=evil))
    assert "evil.pt is not a checkpoint" in sentence and "nothing in it was executed" in sentence
    assert not trace.exists() and not place.out.exists()


@pytest.mark.parametrize("verb", ["train", "sft"])
@pytest.mark.parametrize("manifest", ["matching", "not matching"])
def test_malicious_resume_state_is_never_executed(place: Place, verb: str, manifest: str) -> None:
    line = place.line(f"{verb} --config {{here}}/{verb}.yaml")
    assert call(line)[0] == 0
    (step,) = (place.out / "checkpoints/ds_checkpoint").iterdir()
    trace = place.here / "trace"
    torch.save({"model": Malicious(trace), "optimizer": {}}, step / "state.pt")
    if manifest == "matching":
        values = json.loads((step / "manifest.json").read_text())
        values["files"]["state.pt"] = sha256((step / "state.pt").read_bytes()).hexdigest()
        (step / "manifest.json").write_text(json.dumps(values))
    before = contents(place.out)
    for folder in (step, step.parent):
        assert "step_" in refused(f"{line} --set training.resume_from={folder}")
    assert not trace.exists()
    assert contents(place.out) == before


def spoil(place: Place, kind: str) -> Path:
    path, data = place.here / "bad.pt", place.checkpoint.read_bytes()
    state = torch.load(place.checkpoint, weights_only=True)
    whole = {
        "empty": b"", "text": b"model: 1\n", "JSON": b'{"model": 1}', "cut in half": data[: len(data) // 2],
        "one byte short": data[:-1], "zip garbage": b"PK\x03\x04" + bytes(range(256)), "zeros": bytes(1000),
    }  # fmt: skip
    if kind in whole:
        path.write_bytes(whole[kind])
    elif kind == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"garbage")
    elif kind == "safetensors garbage":
        path = path.with_suffix(".safetensors")
        path.write_bytes(bytes(range(200)))
    elif kind == "folder without files":
        path.mkdir()
    else:
        other = {
            "list": [1, 2],
            "state dict": state["model"],
            "number": 5,
            "another model": {"model": {"w": torch.ones(2)}},
        }
        torch.save(other[kind], path)
    return path


@pytest.mark.parametrize(
    "kind",
    ["empty", "text", "JSON", "cut in half", "one byte short", "zip garbage", "zeros", "another zip", "list", "number",
     "safetensors garbage", "folder without files", "state dict", "another model"],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused(place: Place, kind: str) -> None:
    path = spoil(place, kind)
    for verb in ("generate", "analyze", "sft"):
        assert str(path) in refused(place.line(READ_CHECKPOINT[verb], checkpoint=path))
    assert not place.out.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": "x"}, "step: .*'x'"),
        ({"step": None}, "step"),
        ({"step": -1}, "step"),
        ({"tau": None}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"tau": 0.0}, "tau"),
        ({"config": [1]}, r"\[1\]"),
        ({"config": {"d_modell": 3}}, "unknown key 'd_modell'; did you mean 'd_model'"),
        ({"config": {**SMALL, "d_ff": 25}}, "weight"),
        ({"tokenizer": "name"}, "tokenizer"),
        ({"tokenizer": {"name": 5}}, r"tokenizer\.name"),
        ({"model": [1]}, "weights are not named"),
        ({"model": {1: torch.ones(1)}}, "weights are not named"),
        ({"embed_tokens.weight": 5}, "'embed_tokens.weight' is not a tensor"),
        ({"embed_tokens.weight": torch.ones(2, 2, dtype=torch.int64)}, "'embed_tokens.weight' is not a tensor"),
        ({"embed_tokens.weight": torch.ones(2, 2).to_sparse()}, "'embed_tokens.weight' is not a tensor"),
        (
            {"embed_tokens.weight": torch.full((2, 2), torch.nan)},
            "'embed_tokens.weight' has values that are not finite",
        ),
        ({"embed_tokens.weight": torch.ones(2, 2)}, r"'embed_tokens.weight' has shape \(2, 2\)"),
    ],
)
def test_right_keys_with_wrong_values_are_refused(good: Path, tmp_path: Path, change: Any, named: str) -> None:
    content = torch.load(good / "good.pt", weights_only=True)
    for key, value in change.items():
        (content["model"] if "." in key else content)[key] = value
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(PolygluError, match=rf"bad\.pt.*{named}"):
        load_checkpoint(tmp_path / "bad.pt")


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(key=st.sampled_from(["format", "model", "config", "step", "tau", "tokenizer"]), value=plain_values)
def test_any_plain_value_in_a_checkpoint_is_understood_or_refused(
    good: Path, tmp_path: Path, key: str, value: Any
) -> None:
    content = torch.load(good / "good.pt", weights_only=True)
    torch.save({**content, key: value}, tmp_path / "any.pt")
    try:
        model, step, tau = load_checkpoint(tmp_path / "any.pt")
    except PolygluError as error:
        assert "any.pt" in str(error)
    else:
        assert isinstance(step, int) and step >= 0 and 0 < tau < float("inf") and not model.training


@quick
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_checkpoint_with_damaged_bytes_never_ends_in_a_traceback(good: Path, tmp_path: Path, places: Any) -> None:
    data = bytearray((good / "good.pt").read_bytes())
    for position, value in places:
        data[int(position * len(data))] = value
    (tmp_path / "damaged.pt").write_bytes(data)
    try:
        load_checkpoint(tmp_path / "damaged.pt")
    except PolygluError as error:
        assert "damaged.pt" in str(error)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested dictionaries and lists are."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


@quick
@given(data=st.data())
def test_any_value_in_a_manifest_is_understood_or_refused(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "data"
    shutil.copytree(good / "data", folder, dirs_exist_ok=True)
    manifest = json.loads((good / "data/manifest.json").read_text())
    *outer, last = data.draw(st.sampled_from(list(paths_of(manifest))))
    inner = manifest
    for key in outer:
        inner = inner[key]
    inner[last] = data.draw(plain_values)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        source = open_source(folder)
    except PolygluError as error:
        assert str(folder) in str(error)
    else:
        assert len(source.read(0, source.n_tokens)) == source.n_tokens
        assert source.eos_id < source.vocab_size and document_lengths(source).sum() <= source.n_tokens


@pytest.mark.parametrize("line", ["train --config", "sft --config", "data tokenize --all --sources"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"# nothing but a comment\n", "is empty"),
        (b"model: \xff\xfe", "is not UTF-8 text"),
        (b"day: 2023-13-45", "is not valid YAML"),
        (b"[" * 1500, "is not valid YAML"),
        (b"!!python/object/apply:os.mkdir [executed]", "is not valid YAML"),
        (None, "is a folder"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, line: str, content: bytes | None, said: str) -> None:
    path = tmp_path / "config.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    sentence = refused(f"{line} {path}")
    assert str(path) in sentence and said in sentence
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"] and not Path("executed").exists()


def test_an_override_that_is_no_yaml_is_refused(place: Place) -> None:
    sentence = refused(place.line("train --config {here}/train.yaml --set training.total_steps=["))
    assert "override 'training.total_steps=['" in sentence


@pytest.mark.parametrize(
    "command",
    [
        "eval --checkpoint {checkpoint} --tasks demo_arithmetic --data-dir {here} --limit 1 --output {taken}/r.json",
        "eval --checkpoint {checkpoint} --tasks demo_arithmetic --data-dir {here} --limit 1 --output {here}",
        "analyze --checkpoint {checkpoint} --output {taken}",
        "analyze --checkpoint {checkpoint} --output {taken}/figures",
        "data tokenize --files {here}/text.jsonl --tokenizer {here}/tokenizer --output {taken}",
        "data tokenize --files {here}/text.jsonl --tokenizer {here}/tokenizer --output {taken}/data",
        "sft --config {here}/sft.yaml --set training.checkpoint_dir={taken}/c",
        "sft --config {here}/sft.yaml --set training.run_dir={taken}",
        "train --config {here}/train.yaml --set training.run_dir={taken}",
    ],
)
def test_output_that_cannot_be_written_is_refused_before_any_work(place: Place, command: str) -> None:
    taken = place.here / "taken"
    taken.write_text("mine")
    before = contents(place.here)
    sentence = refused(place.line(command, taken=taken))
    assert str(taken) in sentence or str(place.here) in sentence
    assert contents(place.here) == before and not place.out.exists()


@pytest.mark.parametrize("verb", ["eval", "analyze", "generate"])
def test_tokenizer_of_another_checkpoint_is_refused(place: Place, verb: str) -> None:
    command = READ_CHECKPOINT[verb].replace("analyze", "analyze --tokenizer {here}/other")
    command = command if verb == "analyze" else f"{command} --tokenizer {{here}}/other"
    assert "other' is not the one" in refused(place.line(command))
    assert not place.out.exists()


def test_tokenizer_of_other_data_is_refused(place: Place) -> None:
    line = "eval --checkpoint {checkpoint} --perplexity a={here}/more --output {out}/r.json"
    tokenised = "data tokenize --files {here}/text.jsonl --tokenizer {here}/other --output {here}/more"
    assert call(place.line(tokenised))[0] == 0
    assert "was tokenised with" in refused(place.line(line))
    assert "was made with tokenizer" in refused(place.line(tokenised.replace("more", "data")))
    assert "is not the one" in refused(place.line("data inspect {here}/data --tokenizer {here}/other"))
    assert not place.out.exists()


HUB = {
    "tokenize": ("data tokenize --dataset some/data --tokenizer {here}/tokenizer --output {out}/data", "some/data"),
    "sft": (
        "sft --config {here}/sft.yaml --set data.files=[] --set data.dataset=some/data --set data.splits=[low]",
        "some/data",
    ),
    "eval": (
        "eval --checkpoint {checkpoint} --tasks hub_task --include-path {here} --limit 1 --output {out}/r.json",
        "some/data",
    ),
    "generate": ("generate --checkpoint {checkpoint} --prompt 1 --tokenizer some/tokenizer", "some/tokenizer"),
}
HUB_TASK = """
task: hub_task
dataset_path: some/data
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
"""


@pytest.mark.parametrize("verb", HUB)
def test_no_hub_access_names_what_was_needed(place: Place, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    (place.here / "hub_task.yaml").write_text(HUB_TASK)
    command, needed = HUB[verb]
    assert f"{needed} needs the Hugging Face hub, which cannot be reached" in refused(place.line(command))
    assert not place.out.exists()


@pytest.mark.parametrize("verb", ["tokenize", "sft", "eval"])
def test_a_gated_dataset_says_where_to_accept_its_licence(
    place: Place, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gated(*_: Any, **__: Any) -> None:
        raise GatedRepoError("gated", response=Response(403, request=Request("GET", "https://huggingface.co")))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", gated)
    (place.here / "hub_task.yaml").write_text(HUB_TASK)
    sentence = refused(place.line(HUB[verb][0]))
    assert "some/data is gated: accept its licence at https://huggingface.co/datasets/some/data" in sentence
    assert not place.out.exists()


@pytest.mark.parametrize("rows", ["", '{"text": ""}\n{"text": " \\n"}\n', '{"text": null}\n'])
def test_documents_without_text_are_refused(place: Place, rows: str) -> None:
    (place.here / "empty.jsonl").write_text(rows)
    tokenize = "data tokenize --files {here}/empty.jsonl --tokenizer {here}/tokenizer --output {out}/a/b"
    assert "empty.jsonl holds no text" in refused(place.line(tokenize))
    assert "empty.jsonl" in refused(place.line("sft --config {here}/sft.yaml --set data.files=[{here}/empty.jsonl]"))
    assert not place.out.exists()


@pytest.mark.parametrize(
    ("test_file", "said"), [("", "could not be loaded"), ('{"a": 1}\n', "'question' is undefined"), ("x", "JSON")]
)
def test_a_tasks_data_that_do_not_fit_are_refused(place: Place, test_file: str, said: str) -> None:
    (place.here / "arithmetic_test.jsonl").write_text(test_file)
    sentence = refused(place.line(READ_CHECKPOINT["eval"]))
    assert "task 'demo_arithmetic'" in sentence and said in sentence
    assert not place.out.exists()


def test_prompts_longer_than_the_context(place: Place) -> None:
    words = "1+1=" * 100
    assert "the model takes at most 64" in refused(place.line("generate --checkpoint {checkpoint} --prompt " + words))
    problem = {"question": words, "answer": "2"}
    (place.here / "arithmetic_test.jsonl").write_text(json.dumps(problem) + "\n")
    code, said = call(place.line(READ_CHECKPOINT["eval"]))
    assert code == 0 and "1 of 1 prompts were cut on the left to fit into 64 tokens" in said
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": "2"}]
    (place.here / "sft.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert "within 64 tokens (0 used, 0 tools, 0 malformed, 1 too_long)" in refused(place.line(READ_CHECKPOINT["sft"]))


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_unknown_device_is_refused(place: Place, verb: str) -> None:
    assert "device 'tpu0' cannot be used here" in refused(place.line(READ_CHECKPOINT[verb] + " --device tpu0"))


@pytest.mark.parametrize("option", ["--config a", "--split b", "--revision c"])
def test_options_of_the_hub_are_refused_with_local_files(place: Place, option: str) -> None:
    line = "data tokenize --files {here}/text.jsonl --tokenizer {here}/tokenizer --output {out}/data "
    assert "belongs to a hub dataset" in refused(place.line(line + option))
    assert not place.out.exists()
