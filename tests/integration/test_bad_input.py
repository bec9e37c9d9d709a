"""Bad input through the commands themselves: one sentence, exit code 2, no traceback, nothing half written."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from commands import READ_CHECKPOINT, Place, call, contents, refused
from httpx import Request, Response
from huggingface_hub.errors import GatedRepoError


@pytest.mark.parametrize("verb", READ_CHECKPOINT)
def test_the_good_files_are_good(place: Place, verb: str) -> None:
    code, said = call(place.line(READ_CHECKPOINT[verb]))
    assert code == 0, said


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


@pytest.mark.parametrize("command", ["train --config", "train --dry-run"])
def test_a_kernel_that_does_not_work_here_is_refused(place: Place, command: str) -> None:
    sentence = refused(place.line(f"{command} {{here}}/train.yaml --set model.kernels=triton"))
    assert "model.kernels: triton does not work here (cpu" in sentence and "choose auto" in sentence
    assert not list(place.out.rglob("step_*"))


@pytest.mark.parametrize(
    "command",
    [
        "eval --checkpoint {checkpoint} --tasks demo_arithmetic --data-dir {here} --limit 1 --output {taken}/r.json",
        "eval --checkpoint {checkpoint} --tasks demo_arithmetic --data-dir {here} --limit 1 --output {here}",
        "analyze --checkpoint {checkpoint} --output {taken}",
        "analyze --checkpoint {checkpoint} --output {taken}/figures",
        "ablate --checkpoint {checkpoint} --data {here}/text.jsonl --output {taken}",
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
